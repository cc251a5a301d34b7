"""README, docs/ and results/: links lead somewhere, sentences are short, generated pages are fresh, examples run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "results"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted(RESULTS.glob("*.md"))]
NOTES = {DOCS / "decisions" / f"{name}.md" for name in ("rate-distortion", "rate-distortion-2", "fast-path")}
GENERATED = {DOCS / "reference" / "cli.md"}  # prose of the parser
FENCES = ("python", "sh", "text")
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.M | re.S)
MEDIAN_WORDS, MOST_WORDS = 16, 40
OF_README = DOCS / "start" / "mlx.md"  # README's own example, which test_readme.py runs
RUN_ELSEWHERE = {OF_README, DOCS / "guide" / "batches.md"}  # the second by test_mlx_batching.py


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tool(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """`text` without fenced blocks, comments and inline code."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.S)
    return re.sub(r"(`+).+?\1", "code", text)


# --- sentences


def sentences(text: str) -> list[str]:
    """Sentences of prose: code, tables, headings, pictures and targets of links left out; a list item ends a sentence."""
    text = re.sub(r"^(    .*|#.*|\|.*|:::.*|!\[.*)$", "", without_code(text), flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text)
    found = []
    for paragraph in paragraphs:
        words = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", paragraph.strip())
        found += re.split(r"(?<=[.!?])[*\"')]*\s+", " ".join(words.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


def test_splitter_of_sentences():
    text = (
        "# A heading of words\n\nOne two. Three `a. b` four, v3.11 of [five. six](x.md)\ngoes on!\n\n| a. b | c |\n\n"
        "- item one\n- item two. And more\n\n```sh\nnot. this\n```\n"
    )
    expected = ["One two.", "Three code four, v3.11 of five.", "six goes on!", "item one", "item two.", "And more"]
    assert sentences(text) == expected
    assert words("Three - four, (five)") == 3


@pytest.mark.parametrize("path", [ROOT / "README.md", *(set(PAGES) - NOTES - GENERATED)], ids=name_of)
def test_sentences_are_short(path):
    found = sentences(text_of(path))
    longest = max(found, key=words)
    assert words(longest) <= MOST_WORDS, longest
    assert statistics.median(map(words, found)) <= MEDIAN_WORDS


# --- links


def anchors(path: Path) -> set[str]:
    """What headings of a page are linked by."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(path)), re.M)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()).strip() for head in heads]
    return {re.sub(r"\s+", "-", head) for head in plain}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", without_code(text_of(path))):
        if re.match(r"[a-z]+:", target):
            continue
        page = (path.parent / target).resolve() if target else path
        assert page.is_file(), f"{name_of(path)} links to {target}, which is not there"
        assert ROOT in page.parents, f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(page), f"{name_of(path)}: no heading {anchor} in {target}"


def test_every_page_is_in_the_menu_once():
    menu = re.findall(r"^\s+- .*: (\S+\.md)$", text_of(ROOT / "mkdocs.yml"), re.M)
    pages = [str(page.relative_to(DOCS)) for page in PAGES] + [name_of(page) for page in RESULTS.glob("*.md")]
    assert sorted(menu) == sorted(pages)


def test_every_document_that_is_cited_exists():
    """Comments, docstrings and pages name documents that a reader of the repository can open."""
    written = {"summary.md"}  # by `spectralkv eval`
    kinds = ("*.py", "*.md", "*.c", "*.h", "*.mk", "*.yml", "*.toml", "Makefile")
    folders = ("shared", "spectral_kv_torch", "spectral_kv_mlx", "tests", "results", "docs", "profiles")
    files = [file for folder in folders for kind in kinds for file in (ROOT / folder).rglob(kind)]
    files += [file for kind in kinds for file in ROOT.glob(kind)]
    there = [name_of(file) for file in files if file.suffix == ".md"]
    missing = []
    for file in files:
        if file == Path(__file__):
            continue
        for cited in set(re.findall(r"(?<![\w*{}\]])[\w./-]*\w\.md\b", text_of(file))) - written:
            near = (file.parent / cited).is_file()
            if not near and not any(f"/{name}".endswith(f"/{cited}") for name in there):
                missing.append(f"{name_of(file)}: {cited}")
    assert not missing, missing


# --- generated pages, commands, words


def test_specification_of_a_profile_has_the_version_of_the_shipped_one():
    with safe_open(ROOT / "profiles" / "smollm2-135m-instruct.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["spectralkv"])
    page = text_of(DOCS / "reference" / "profile-file.md")
    assert f"| `version` | {header['version']} |" in page
    missing = [name for name in header if f"`{name}`" not in page]
    assert not missing


def test_page_of_the_command_line_is_made_from_the_parser():
    maker = tool("make_cli_page")
    assert text_of(maker.PAGE) == maker.page(), "python docs/make_cli_page.py writes it anew"


def test_every_option_is_on_the_page_of_the_command_line():
    page = text_of(DOCS / "reference" / "cli.md")
    parser = tool("make_cli_page").build_parser()
    commands = next(action for action in parser._actions if action.choices and hasattr(action, "_choices_actions"))
    for name, command in commands.choices.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for action in command._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"`{option}`" in section, f"{name} {option}"


def shell_commands() -> list:
    """(page, line) of every `spectralkv` that a reader is asked to type."""
    found = []
    for path in (ROOT / "README.md", *PAGES):
        lines = [line for info, block in FENCE.findall(text_of(path)) if info == "sh" for line in block.splitlines()]
        lines += re.findall(r"`(spectralkv [a-z][^`]* --[^`]*)`", FENCE.sub("", text_of(path)))
        found += [pytest.param(line, id=f"{name_of(path)}-{line}") for line in lines if line.startswith("spectralkv ")]
    return found


@pytest.mark.parametrize("line", shell_commands())
def test_commands_are_those_of_the_parser(line):
    arguments = shlex.split(line, comments=True)[1:]
    tool("make_cli_page").build_parser().parse_args(arguments)  # exits with 2 if it does not fit


def test_glossary_has_the_words_of_the_project():
    rows = re.findall(r"^\| ([a-z ]+) \|", text_of(DOCS / "concepts" / "glossary.md"), re.M)[1:]
    wanted = (
        "sealed, window, sinks, staged, layer group, basis set, component, coefficient, plan, profile, chunk, block, "
        "padding group, sequence, latent, working set, exact, passed through"
    )
    assert set(wanted.split(", ")) <= set(rows)
    assert rows == sorted(rows)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_pages_speak_to_readers(path):
    """No commit hashes: what a figure was made with stands in the JSON beside it."""
    text = text_of(path)
    hashes = re.findall(r"(?<![\w./-])(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,40}(?![\w-])", text)
    assert not hashes


# --- examples


def test_fences_say_what_they_hold():
    """A block is run, is a command that is checked, or is output: none escapes by its name."""
    for path in (ROOT / "README.md", *(set(PAGES) - NOTES)):
        for info, _ in FENCE.findall(text_of(path)):
            assert info in FENCES, f"{name_of(path)}: {info!r}"


def examples(path: Path) -> str:
    """All Python of a page, to be run from the first block to the last."""
    return "\n".join(block for info, block in FENCE.findall(text_of(path)) if info == "python")


WITH_EXAMPLES = [path for path in PAGES if examples(path) and path not in RUN_ELSEWHERE]


def test_example_of_mlx_is_that_of_readme():
    assert examples(OF_README) in text_of(ROOT / "README.md")


RUNNER = """
import contextlib, io, json, sys, traceback, warnings
warnings.filterwarnings("error", "`past_key_values`", FutureWarning)  # a name that transformers gives up
for name, code in json.load(sys.stdin):
    output, error = io.StringIO(), None
    with contextlib.redirect_stdout(output):
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([name, output.getvalue(), error]))
"""


@pytest.fixture(scope="module")
def outputs() -> dict[str, tuple]:
    """(what was printed, error) of every page: each starts with nothing, one process imports the libraries for all."""
    pytest.importorskip("torch")
    (ROOT / "build").mkdir(exist_ok=True)
    pages = json.dumps([(name_of(path), examples(path)) for path in WITH_EXAMPLES])
    result = subprocess.run([sys.executable, "-c", RUNNER], input=pages, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {name: (printed, error) for name, printed, error in map(json.loads, result.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name_of)
def test_examples_of_a_page_run(path, outputs):
    """As pasted, one block after the other, in the root of the repository."""
    printed, error = outputs[name_of(path)]
    assert error is None, error
    if path.stem == "compat":
        *_, compression, correlation, saved = printed.strip().splitlines()
        assert float(compression) > 2 and float(re.search(r"0\.\d+", correlation)[0]) > 0.98
        assert re.fullmatch(r"4\.\dx, 7\d MB saved per 100 MB", saved)
    elif "times smaller" in examples(path):
        assert re.search(r"[2-9]\.\d times smaller", printed), printed

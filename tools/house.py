"""Counts about the structure of the code, a row each: `python tools/house.py [FOLDER]` for another checkout.

Limits on sizes are signals, not gates; tests and import-linter hold what must hold.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("shared/spectral_kv_core", "spectral_kv_torch", "spectral_kv_mlx")
RUN = 6  # lines of a repetition
PROFILED = """
import sys, json
sys.path[:0] = {paths!r}
import spectral_kv_torch
from torch_models import ByteTokenizer, tiny_model, tokens
from spectral_kv_torch import SpectralProfiler, make_prompt_cache
model = tiny_model("llama")
text = [bytes(b - 3 for b in tokens(1024, seed=9 + i)[0].tolist()).decode("latin-1") for i in range(2)]
profile = SpectralProfiler(tokens=2048, document=1024, progress=False).profile_from_model(model, ByteTokenizer(), text)
seen = []
def note(frame, event, arg):
    name = frame.f_code.co_filename
    if event == "call" and "spectral_kv_" in name and "/tests/" not in name and (not seen or seen[-1] != name):
        seen.append(name)
sys.setprofile(note)
cache = make_prompt_cache(model, profile, 3.0)
sys.setprofile(None)
made = len(set(seen)), len(seen)
import torch
with torch.no_grad():
    model(tokens(400), past_key_values=cache, use_cache=True)
    seen.clear()
    sys.setprofile(note)
    model(tokens(16, seed=3), past_key_values=cache, use_cache=True)
    sys.setprofile(None)
print(json.dumps([*made, len(set(seen)), len(seen)]))
"""


def sources(root: Path) -> Iterator[tuple[Path, str]]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root), path.read_text(encoding="utf-8")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def matches(root: Path, pattern: str, outside: str = "$^") -> list[str]:
    """`file:line` of every line of code that has `pattern`, in files whose path `outside` does not match."""
    found = []
    for path, text in sources(root):
        if not re.search(outside, path.as_posix()):
            lines = enumerate(text.splitlines(), 1)
            found += [f"{path}:{n}" for n, line in lines if re.search(pattern, line.partition("  #")[0])]
    return found


def long_ones(root: Path) -> tuple[list, list, list]:
    """Functions over 60 lines, docstrings apart; of more than 8 parameters, kernels apart; modules over 400 lines."""
    lengths, parameters, modules = [], [], []
    for path, text in sources(root):
        if len(text.splitlines()) > 400:
            modules.append(f"{path} ({len(text.splitlines())})")
        for node in functions(ast.parse(text)):
            said = ast.get_docstring(node, clean=False) or ""
            size = node.end_lineno - node.lineno + 1 - (said.count("\n") + 1 if said else 0)
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            if size > 60:
                lengths.append(f"{path}:{node.name} ({size})")
            if count > 8 and "kernels/" not in path.as_posix():
                parameters.append(f"{path}:{node.name} ({count})")
    return lengths, parameters, modules


def reached_into(root: Path) -> list[str]:
    """`file:line` of what goes round a class; a frozen class may set its own fields while it is made."""
    making: set[str] = set()
    for path, text in sources(root):
        made = [node for node in functions(ast.parse(text)) if node.name == "__post_init__"]
        making.update(f"{path}:{n}" for node in made for n in range(node.lineno, node.end_lineno + 1))
    fields = [place for place in matches(root, r"object\.__setattr__") if place not in making]
    return matches(root, r"\.__dict__|_getframe") + fields


def mutable_globals(root: Path) -> list[str]:
    """Names of modules that are bound to an empty list, dictionary or set, or rebound with `global`."""
    found = []
    for path, text in sources(root):
        tree = ast.parse(text)
        for node in tree.body:
            value = getattr(node, "value", None)
            empty = isinstance(value, (ast.List, ast.Dict)) and not (
                getattr(value, "elts", None) or getattr(value, "keys", None)
            )
            empty |= isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("set", "dict", "list")
            if (
                isinstance(node, (ast.Assign, ast.AnnAssign))
                and empty
                and not (isinstance(value, ast.Call) and value.args)
            ):
                found.append(f"{path}:{node.lineno}")
        found += [f"{path}:{n.lineno}" for n in ast.walk(tree) if isinstance(n, ast.Global)]
    return found


def repeated(root: Path) -> int:
    """Runs of `RUN` and more equal lines that both backends have; imports, blanks, comments and lone brackets apart."""

    def lines(package: str) -> list[str]:
        kept: list[str] = []
        for path in sorted((root / package).rglob("*.py")):
            for line in path.read_text(encoding="utf-8").splitlines():
                line = line.strip()
                if line and not re.match(r"(import |from |#|\W+$)", line):
                    kept.append(line)
            kept.append(f"-- {path}")
        return kept

    first, second = (lines(package) for package in PACKAGES[1:])
    windows = {tuple(second[i : i + RUN]) for i in range(len(second))}
    runs, inside = 0, False
    for i in range(len(first) - RUN + 1):
        same = tuple(first[i : i + RUN]) in windows
        runs += same and not inside
        inside = same
    return runs


def readme(root: Path) -> str:
    text = (root / "README.md").read_text(encoding="utf-8")
    return f"{len(text.splitlines())} lines, {len(text.split())} words"


def journey(root: Path) -> str:
    """What `make_prompt_cache`, and a call that seals a block, go through, on a tiny model."""
    paths = [str(root / folder) for folder in ("shared", ".", "tests", "tests/backends")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROFILED.format(paths=paths)], capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def main(root: Path) -> None:
    own = r"hosts/backends\.py|/backends\.py"
    lengths, parameters, modules = long_ones(root)
    asked = matches(root, r"\bmethod\.codec\b|\]\.codec\b", r"/codecs/|methods\.py")
    hidden = matches(root, r"import_module\(f?[\"']\.|__import__\(|import_module\(f\"\{package", own)
    reached = reached_into(root) + mutable_globals(root)
    guessed = matches(root, r"(has|get)attr\((self\.)?(codec|plan|chunk)\b")
    window = {place.partition(":")[0] for place in matches(root, r"(?i)\bwindow\b.*\b64\b|\bsinks\b.*= 4\b")}
    rows = {
        "own packages imported by name outside hosts/backends.py": hidden,
        "method.codec asked outside codecs/ and planning/methods.py": asked,
        "__dict__, object.__setattr__, sys._getframe, mutable globals": reached,
        "hasattr or getattr on a codec, a plan, a chunk": guessed,
        "files that write the default window or sinks": sorted(window),
        "functions over 60 lines, docstrings apart": lengths,
        "functions of more than 8 parameters, kernels apart": parameters,
        "modules over 400 lines": modules,
    }
    for name, places in rows.items():
        print(f"{len(places):4}  {name}")
        for place in places:
            print(f"          {place}")
    print(f"{repeated(root):4}  runs of {RUN} equal lines in both backends")
    print(f"      README: {readme(root)}")
    print(f"      make_prompt_cache: files, stays; a call of 16 tokens: files, stays: {journey(root)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())

"""The command line: contracts of the JSON output, and one clear line for every wrong use."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.cache.prompt_cache_file import DEFAULT_FILE_METHOD, PromptFile
from spectral_kv_core.cli import main as cli
from spectral_kv_core.cli import methods, output, tables
from spectral_kv_core.errors import UsageError
from spectral_kv_core.files.container import METADATA_KEY
from spectral_kv_core.hosts import backends
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.profile.store import cached_profile_path

TEXT = "In the beginning there was a table, and on the table stood 23 cups; nobody knew whose they were. " * 30
GENERATE_KEYS = {
    "text", "prompt_tokens", "generated_tokens", "backend", "method", "bits_per_element", "cache_bytes", "table_bytes",
    "dense_bytes", "compression", "bytes_by_kind", "exact_tokens", "peak_bytes", "prefill_tokens_per_s", "decode_tokens_per_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module", autouse=True)
def own_cache_folder(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALKV_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="module")
def model(folder):
    return str(save_tiny_checkpoint(folder / "model"))


@pytest.fixture(scope="module")
def other_model(folder):
    return str(save_tiny_checkpoint(folder / "other", "qwen3"))


@pytest.fixture(scope="module")
def text_file(folder):
    (folder / "text.txt").write_text(TEXT)
    return str(folder / "text.txt")


@pytest.fixture(scope="module")
def profile(folder, model, text_file):
    path = str(folder / "profile.safetensors")
    arguments = ["--text", text_file, "--tokens", "1024", "--document", "512", "--quiet", "--backend", "torch"]
    assert cli.main(["profile", "--model", model, "--output", path, *arguments]) == 0
    return path


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def fails(capsys, code, message, *arguments):
    """The command ends with `code` and a line that holds `message`, without a traceback."""
    got, out, err = run(capsys, *arguments)
    lines = [line for line in err.strip().splitlines() if line.startswith("spectralkv")]
    assert got == code and message in lines[-1] and "Traceback" not in err and not out.strip(), (got, out, err)


def test_profile_reports_what_it_made(capsys, folder, model, text_file):
    arguments = ["--text", text_file, "--tokens", "300", "--document", "256", "--quiet", "--backend", "torch"]
    result = json_of(capsys, "profile", "--model", model, "--output", str(folder / "own.safetensors"), *arguments)
    assert result["tokens"] >= 256 and result["seconds"] > 0 and result["model"] == model
    assert result["bytes"] == (folder / "own.safetensors").stat().st_size
    assert Profile.load(result["profile"]).calibration["text"] == "own text"


def test_generate_reports_bytes_quality_and_speed(capsys, model, profile, text_file):
    result = json_of(
        capsys, "generate", "--model", model, "--backend", "torch", "--prompt-file", text_file, "--profile", profile,
        "--bits", "2", "--max-tokens", "20", "--ignore-eos", "--compare",
    )  # fmt: skip
    assert GENERATE_KEYS | {"dense", "kl", "top1"} <= set(result)
    assert set(result["dense"]) >= GENERATE_KEYS
    assert result["generated_tokens"] == 20 and result["prompt_tokens"] > len(TEXT)  # the chat template adds some
    assert result["method"] == "spectral" and result["backend"] == "torch"
    assert result["cache_bytes"] < result["dense"]["cache_bytes"] / 4  # the plain one is float32
    assert result["dense_bytes"] == result["dense"]["dense_bytes"] == result["dense"]["cache_bytes"] // 2
    assert result["compression"] == pytest.approx(result["dense_bytes"] / result["cache_bytes"])
    assert result["bits_per_element"] == pytest.approx(16 / result["compression"])
    assert result["kl"] > 0 and 0 <= result["top1"] <= 1 and result["scored_tokens"] == 20
    for found in (result, result["dense"]):
        assert sum(found["bytes_by_kind"].values()) == found["cache_bytes"]
    held = result["prompt_tokens"] + 19  # the last token is never read
    assert 68 <= result["exact_tokens"] < 68 + 16 < held and result["bytes_by_kind"]["codes"] > 0


def test_identity_has_no_divergence(capsys, model, folder, text_file):
    (folder / "score.txt").write_text(TEXT[:50])
    result = json_of(
        capsys, "generate", "--model", model, "--backend", "torch", "--prompt-file", text_file, "--raw",
        "--method", "identity", "--max-tokens", "0", "--score-file", str(folder / "score.txt"),
    )  # fmt: skip
    assert result["kl"] < 1e-6 and result["top1"] == 1.0 and result["compression"] == pytest.approx(0.5)
    assert result["prompt_tokens"] == len(TEXT) and result["scored_tokens"] == 50


def test_more_bits_less_divergence(capsys, model, profile, folder, text_file):
    (folder / "after.txt").write_text("Then 40 more cups came, and nobody counted them.")
    kl = [
        json_of(
            capsys, "generate", "--model", model, "--backend", "torch", "--prompt-file", text_file, "--profile", profile,
            "--raw", "--bits", bits, "--max-tokens", "0", "--score-file", str(folder / "after.txt"),
        )["kl"]
        for bits in ("1", "3", "8")
    ]  # fmt: skip
    assert kl[0] > kl[1] > kl[2] >= 0


def test_terminal_output_shows_both_caches(capsys, model, profile, text_file):
    code, out, _ = run(
        capsys, "generate", "--model", model, "--backend", "torch", "--prompt-file", text_file, "--profile", profile,
        "--max-tokens", "5", "--ignore-eos", "--compare",
    )  # fmt: skip
    assert code == 0
    for words in ("spectral cache", "plain cache", "cache bytes", "decode tokens/s", "top-1 agreement"):
        assert words in out


def test_inspect_and_methods(capsys, profile):
    plan = json_of(capsys, "inspect", profile, "--bits", "2")["plan"]
    assert plan["bits_per_element"] <= 2 and len(plan["key_bits"]) == 3
    assert "Plan: spectral at 2 bits" in run(capsys, "inspect", profile, "--bits", "2")[1]
    names = {row["name"] for row in json_of(capsys, "methods")["methods"]}
    assert {"spectral", "affine", "identity"} <= names
    text = run(capsys, "methods")[1]
    assert "spectral" in text and "turboquant *" in text and "Large errors where keys have" in text


QUESTION = "How many cups stood on the table?"


def cache_prompt(model, profile, output, *more):
    return [
        "cache-prompt", "--model", model, "--backend", "torch", "--prompt", TEXT, "--profile", profile, "--output",
        str(output), *more,
    ]  # fmt: skip


def go_on(model, profile, file, *more, prompt=QUESTION):
    return [
        "generate", "--model", model, "--backend", "torch", "--prompt-cache-file", str(file), "--prompt", prompt,
        "--profile", profile, "--max-tokens", "12", "--ignore-eos", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["chat", "raw"])
def test_a_stored_prompt_and_a_question_are_one_prompt(capsys, model, profile, tmp_path, raw):
    """With nothing compressed the text is that of the two in one piece, template and all."""
    stored = json_of(capsys, *cache_prompt(model, profile, tmp_path / "c", "--method", "identity", *raw))
    result = json_of(capsys, *go_on(model, profile, tmp_path / "c", "--compare"))
    whole = json_of(
        capsys, "generate", "--model", model, "--backend", "torch", "--prompt", TEXT + QUESTION, "--method", "identity",
        "--max-tokens", "12", "--ignore-eos", *raw,
    )  # fmt: skip
    assert result["text"] == whole["text"] and result["kl"] < 1e-6 and result["top1"] == 1.0
    assert result["prompt_tokens"] == whole["prompt_tokens"] == result["dense"]["prompt_tokens"]
    assert result["cached_tokens"] == stored["prompt_tokens"] == len(TEXT) + (0 if raw else len("[user] "))
    assert result["method"] == result["file_method"] == "identity" and result["cache_bytes"] == whole["cache_bytes"]


def test_cache_prompt_reports_bytes(capsys, model, profile, tmp_path):
    path = tmp_path / "new folder" / "cache.safetensors"
    result = json_of(capsys, *cache_prompt(model, profile, path))
    assert result["file_bytes"] == path.stat().st_size and result["output"] == str(path)
    assert result["method"] == DEFAULT_FILE_METHOD and result["backend"] == "torch" and result["seconds"] > 0
    assert result["cache_bytes"] == sum(result["bytes_by_kind"].values()) < result["file_bytes"]
    assert (
        result["dense_bytes"] == result["prompt_tokens"] * 3 * 2 * 2 * 16 * 2
    )  # layers, sides, heads, channels, bytes
    assert result["compression"] == pytest.approx(result["dense_bytes"] / result["cache_bytes"])
    assert result["bits_per_element"] == pytest.approx(16 / result["compression"]) and result["compression"] > 3
    inspected = json_of(capsys, "inspect", str(path))
    assert inspected == {key: value for key, value in result.items() if key not in ("backend", "output", "seconds")}
    assert "Prompt cache: 2,9" in run(capsys, "inspect", str(path))[1]
    code, out, _ = run(capsys, *cache_prompt(model, profile, path, "--bits", "0.5"))
    assert code == 0 and "times smaller than the plain cache" in out and f"Saved {path}" in out
    assert json_of(capsys, "inspect", str(path))["file_bytes"] < result["file_bytes"]


@pytest.mark.slow
def test_a_stored_prompt_serves_other_methods(capsys, model, profile, tmp_path):
    json_of(capsys, *cache_prompt(model, profile, tmp_path / "c", "--method", "spectral-dense", "--bits", "4"))
    results = [
        json_of(capsys, *go_on(model, profile, tmp_path / "c", "--compare", *more))
        for more in ([], ["--bits", "1"], ["--method", "spectral", "--bits", "2"], ["--method", "plain"])
    ]
    assert [r["method"] for r in results] == ["spectral-dense", "spectral-dense", "spectral", "plain"]
    assert {r["file_method"] for r in results} == {"spectral-dense"} and len({r["file_bytes"] for r in results}) == 1
    sizes = [r["cache_bytes"] for r in results]
    assert sizes[1] < sizes[2] < sizes[0] < sizes[3] and set(results[0]) >= GENERATE_KEYS
    assert 0 < results[0]["kl"] < results[1]["kl"] and results[3]["kl"] > 0  # plain, of what was stored at 4 bits
    code, out, _ = run(capsys, *go_on(model, profile, tmp_path / "c", "--compare"))
    assert code == 0 and "plain cache, which reads everything" in out


def test_wrong_use_of_stored_prompts(capsys, folder, model, profile, tmp_path, other_model, text_file):
    file = tmp_path / "c"
    json_of(capsys, *cache_prompt(model, profile, file))
    fails(capsys, 2, "found nothing", *go_on(model, profile, tmp_path / "missing"))
    fails(capsys, 2, "received a spectralkv-profile", *go_on(model, profile, profile))
    fails(capsys, 2, "received a spectralkv-cache", *go_on(model, str(file), file))
    fails(capsys, 2, "the model has head_dim", *go_on(other_model, profile, file))
    fails(capsys, 2, "no --window", *go_on(model, profile, file, "--window", "8"))
    fails(capsys, 2, "no --budget-bytes", *go_on(model, profile, file, "--budget-bytes", "9"))
    fails(capsys, 2, "no --wavelet", *go_on(model, profile, file, "--wavelet", "haar"))
    fails(capsys, 2, "no --raw", *go_on(model, profile, file, "--raw"))
    fails(capsys, 2, "method among", *go_on(model, profile, file, "--method", "spectrel"))
    fails(capsys, 2, "for files", *go_on(model, profile, file, "--method", "spectral-stored"))
    fails(capsys, 2, "received plain", *go_on(model, profile, file, "--method", "plain", "--bits", "2"))
    fails(capsys, 2, "between 0.25", *go_on(model, profile, file, "--bits", "20"))
    fails(capsys, 2, "empty", *go_on(model, profile, file, prompt=" "))
    fails(capsys, 2, "the model's context", *go_on(model, profile, file, prompt="x" * 2000))
    fails(capsys, 2, "received the folder", *cache_prompt("./nowhere", profile, tmp_path))
    fails(capsys, 2, "can be written", *cache_prompt("./nowhere", profile, Path(text_file) / "c"))
    fails(capsys, 2, "method among", *cache_prompt(model, profile, file, "--method", "plain"))
    fails(capsys, 2, "between 0.1", *cache_prompt(model, profile, file, "--bits", "20"))
    fails(capsys, 2, "window", *cache_prompt(model, profile, file, "--window", "-1"))
    fails(capsys, 2, "is for", *cache_prompt(other_model, profile, file))
    long = ["cache-prompt", "--model", model, "--backend", "torch", "--prompt", "x" * 5000, "--output", str(file)]
    fails(capsys, 2, "the model's context", *long)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    fails(capsys, 2, "truncated", *go_on("./nowhere", profile, file))
    fails(capsys, 2, "truncated", "inspect", str(file))


def test_profile_is_found_by_itself(capsys, model, profile):
    cached = cached_profile_path(Profile.load(profile).shape)
    Profile.load(profile).save(cached)
    arguments = ["--backend", "torch", "--prompt", TEXT, "--max-tokens", "2", "--bits", "3"]
    assert json_of(capsys, "generate", "--model", model, *arguments)["method"] == "spectral"


@pytest.mark.slow
def test_generate_drops_tokens(capsys, model, profile, text_file):
    arguments = ["generate", "--model", model, "--backend", "torch", "--profile", profile, "--prompt-file", text_file]
    arguments += ["--max-tokens", "8", "--ignore-eos", "--json"]
    whole = json_of(capsys, *arguments, "--method", "identity")
    tokens = whole["prompt_tokens"]
    budget = tokens // 2
    dropped = json_of(
        capsys, *arguments, "--method", "triattention", "--budget-tokens", str(budget), "--protect", "system", "80:90"
    )
    assert dropped["dense_bytes"] == whole["dense_bytes"] and dropped["generated_tokens"] == 8
    assert dropped["cache_bytes"] < 0.56 * whole["cache_bytes"]
    coded = json_of(capsys, *arguments, "--method", "knorm+spectral", "--bits", "2", "--budget-tokens", str(budget))
    tiered = json_of(capsys, *arguments, "--method", "knorm+spectral", "--tiers", "0.25:4,0.75:1")
    assert coded["cache_bytes"] < dropped["cache_bytes"] and tiered["cache_bytes"] < whole["cache_bytes"]
    wavy = [*arguments, "--method", "waveletkv", "--budget-tokens", str(budget), "--compare"]
    kl = {name: json_of(capsys, *wavy, "--wavelet", name)["kl"] for name in ("db2", "bior2.2")}
    assert json_of(capsys, *wavy)["kl"] == kl["db2"] != kl["bior2.2"]


def test_wrong_use(capsys, folder, model, profile, text_file, other_model):
    def generate(*more, prompt=("--prompt", "Hello there")):
        return ["generate", "--model", model, "--backend", "torch", "--max-tokens", "4", *prompt, *more]

    given = ("--profile", profile)
    fails(capsys, 2, "between 0.25 and 8", *generate(*given, "--bits", "12"))
    fails(capsys, 2, "between", *generate(*given, "--budget-bytes", "10", "--max-context", "1000"))
    fails(capsys, 2, "multiple of the group", *generate("--method", "affine", "--bits", "4.5"))
    fails(capsys, 2, "method among", *generate("--method", "spectrel"))
    fails(capsys, 2, "empty", *generate(*given, prompt=("--prompt", "  ")))
    fails(capsys, 2, "nothing at", *generate(*given, prompt=("--prompt-file", "missing.txt")))
    fails(capsys, 2, "the model's context", *generate(*given, prompt=("--prompt", "x" * 5000)))
    fails(capsys, 2, "found nothing at", *generate("--profile", "missing.safetensors"))
    fails(capsys, 2, "drops tokens", *generate(*given, "--budget-tokens", "100"))
    fails(capsys, 2, "either --budget-tokens", *generate(*given, "--method", "triattention"))
    dropping = (*given, "--method", "triattention", "--budget-tokens", "100")
    fails(capsys, 2, "A:B", *generate(*dropping, "--protect", "7"))
    fails(capsys, 2, "A < B", *generate(*dropping, "--protect", "7:7"))
    fails(capsys, 2, "no system prompt", *generate(*dropping, "--protect", "system", "--raw"))
    fails(capsys, 2, "triattention has none", *generate(*dropping, "--wavelet", "haar"))
    wavy = (*given, "--method", "waveletkv", "--budget-tokens", "100")
    fails(capsys, 2, "haar, db, sym, coif, bior, rbio, dmey", *generate(*wavy, "--wavelet", "db99"))
    fails(capsys, 2, "SCORER+METHOD", *generate(*given, "--method", "triattention+spectrel"))
    tiered = (*given, "--method", "triattention+spectral", "--tiers")
    fails(capsys, 2, "SHARE:BITS", *generate(*tiered, "0.25-4"))
    fails(capsys, 2, "add up to 1", *generate(*tiered, "0.25:4,0.5:1"))
    fails(capsys, 2, "window", *generate(*given, "--window", "-1"))
    fails(capsys, 2, "backend among", "generate", "--model", model, "--backend", "jax", "--prompt", "Hi")
    fails(capsys, 2, "nothing", "generate", "--model", "./no-such-model", "--backend", "torch", "--prompt", "Hi")
    fails(capsys, 2, "cannot load", "generate", "--model", "no/such-model", "--backend", "torch", "--prompt", "Hi")
    fails(capsys, 2, "is for", "generate", "--model", other_model, "--backend", "torch", "--prompt", "Hi", *given)
    fails(capsys, 2, "found nothing at", "inspect", "missing.safetensors")
    fails(capsys, 2, "exist", "profile", "--model", model, "--backend", "torch", "--text", "missing.txt")
    fails(capsys, 2, "folder", "profile", "--model", model, "--backend", "torch", "--output", str(folder))
    assert run(capsys, "generate", "--model", model)[0] == 2
    assert run(capsys, "generate", "--modle", model)[0] == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "required: COMMAND. Try: spectralkv --help"),
        ("generat", "invalid choice: 'generat'"),
        (
            "generate --model x",
            "one of the arguments --prompt --prompt-file is required. Try: spectralkv generate --help",
        ),
        (
            "generate --model x --prompt Hi --bits two",
            "--bits: invalid float value: 'two'. Try: spectralkv generate --help",
        ),
        ("generate --model x --prompt Hi --bit 2", "unrecognized arguments: --bit 2"),
        ("generate --mod x --prompt Hi", "required: --model"),
        ("inspect file --met spectral", "unrecognized arguments: --met spectral"),
        ("methods --jso", "unrecognized arguments: --jso"),
        ("fit --model x --memory 8GB --window \x1b[2J", r"invalid int value: '\x1b[2J'"),
    ],
)
def test_an_error_of_the_command_line_is_one_line(capsys, line, message):
    """Without the usage before it, and without names cut short, which a later option would give another meaning."""
    code, out, err = run(capsys, *line.split())
    assert code == 2 and not out and message in err, err
    assert err.startswith("spectralkv: ") and err.count("\n") == 1 and err.rstrip().endswith("--help")


WRONG_OPTIONS = [  # command and options, what the line says
    ("generate --bits 12", "bits between 0.25 and 8 for spectral, received 12"),
    ("generate --bits nan", "bits to be a number above 0, received nan"),
    ("generate --method kivi --bits 20", "bits between 3 and 9 for kivi with any model, received 20"),
    ("generate --method affine --bits 1", "bits of 2.5, 3.5, 4.5, 5.5, 6.5, 8.5 for affine, received 1"),
    ("generate --method identity --bits 3", "bits between 16 and 16 for identity"),
    ("generate --window -1", "window to be a number of tokens, 0 or more, received -1"),
    ("generate --sinks -1", "sinks to be a number of tokens, 0 or more, received -1"),
    ("generate --method spectrel", "method among"),
    ("generate --budget-bytes -5", "--budget-bytes to be a number above 0, received -5"),
    ("generate --budget-bytes 99 --max-context 0", "--max-context to be a number of tokens, 1 or more, received 0"),
    ("generate --method triattention", "either --budget-tokens or --budget-bytes"),
    ("generate --method triattention --budget-tokens 68", "--budget-tokens above 68"),
    (
        "generate --method triattention --budget-tokens 99 --evict-every 0",
        "--evict-every to be a number of tokens, 1 or more",
    ),
    ("generate --method triattention --budget-tokens 99 --wavelet haar", "triattention has none"),
    ("generate --method waveletkv --budget-tokens 99 --wavelet db99", "haar, db, sym"),
    ("generate --method triattention --budget-tokens 99 --raw --protect system", "no system prompt"),
    ("generate --method triattention+spectral --tiers 0.25:40,0.75:1", "bits between 0.25 and 8"),
    ("generate --method kivi --rounding-scores knorm", "rounds by scores"),
    ("generate --max-tokens -1", "--max-tokens of at least 1"),
    ("cache-prompt --output never --bits 20", "bits between 0.1 and 7 for spectral-stored, received 20"),
    ("cache-prompt --output never --window -1", "window to be a number of tokens"),
    ("cache-prompt --output never --sinks -1", "sinks to be a number of tokens"),
    ("cache-prompt --output never --method spectrel", "method among"),
    ("cache-prompt --output never --method knorm", "keeps every token"),
    ("profile --tokens 9", "--tokens of at least 64 tokens, received 9"),
    ("profile --document 9", "--document of at least 64 tokens, received 9"),
    ("profile --positions -1", "positions to be a number of tokens, 1 or more, received -1"),
    ("profile --target-energy 2", "--target-energy in (0, 1], received 2"),
    ("eval --output never --methods spectrel", "method among"),
    ("eval --output never --methods spectral --bits 12", "bits between 0.25 and 8 for spectral, received 12"),
    ("eval --output never --methods knorm+spectral --tiers 0.5:90,0.5:1", "bits between 0.25 and 8"),
    ("eval --output never --methods spectral --window -1", "--window of at least 0"),
    ("bench --methods spectrel", "method among"),
    ("bench --bits 12", "bits between 0.25 and 8 for spectral, received 12"),
    ("chat --bits 12", "bits between 0.25 and 8 for spectral, received 12"),
    ("chat --max-tokens 0", "--max-tokens of at least 1, received 0"),
    ("serve --bits 12", "bits between 0.25 and 8 for spectral, received 12"),
    ("serve --port -1", "--port of at least 0, received -1"),
    ("serve --max-tokens 0", "--max-tokens of at least 1, received 0"),
    ("serve --concurrency 0", "--concurrency of at least 1, received 0"),
    ("serve --memory-limit much", "an amount of memory such as 8GB"),
    ("serve --temperature -1", "--temperature of at least 0, received -1"),
    ("fit --memory 8GB --bits 12,3", "bits between 0.25 and 8 for spectral, received 12"),
    ("fit --memory 8GB --method identity --bits 3", "no --bits for identity"),
    ("fit --memory 8GB --method triattention", "keeps every token"),
    ("fit --memory 8GB --context 0", "--context of at least 1 token"),
    ("fit --memory 8GB --window -1", "window to be a number of tokens"),
    ("inspect missing --bits 12", "bits between 0.25 and 8"),
    ("inspect missing --method spectrel", "method among"),
    ("plot missing --bits 12", "bits between 0.25 and 8"),
    ("report missing --bits 12", "bits between 0.25 and 8"),
]
PROMPTED = {"generate": ("--prompt", "Hi"), "cache-prompt": ("--prompt", "Hi")}


@pytest.mark.parametrize("line, message", WRONG_OPTIONS, ids=[line for line, _ in WRONG_OPTIONS])
def test_wrong_options_are_refused_before_anything_loads(capsys, monkeypatch, line, message):
    """Neither a host nor a file is looked at: both would say something else."""

    def loads(*_):
        raise AssertionError("a host was loaded")

    monkeypatch.setattr(backends, "_import", loads)
    command, *options = line.split()
    model = () if command in ("inspect", "plot", "report") else ("--model", "nowhere")
    fails(capsys, 2, message, command, *model, *PROMPTED.get(command, ()), *options)


def test_files_of_another_kind_are_named(capsys, folder):
    (folder / "summary.json").write_text('{"rows": []}')
    fails(
        capsys,
        2,
        f"JSON text. Results are shown by: spectralkv report {folder}",
        "inspect",
        str(folder / "summary.json"),
    )
    fails(capsys, 2, "received the folder", "inspect", str(folder))
    generate = ("generate", "--model", "nowhere", "--prompt", "Hi")
    fails(
        capsys,
        2,
        f"profile file, received the folder {folder}. Name a file in it.",
        *generate,
        "--profile",
        str(folder),
    )
    fails(capsys, 2, "prompt cache file, received the folder", *generate, "--prompt-cache-file", str(folder))


def test_one_of_a_kind_is_no_plural():
    assert output.counted(1, "picture") == "1 picture" and output.counted(1000, "layer") == "1,000 layers"


def test_what_a_profile_or_a_stored_prompt_rules_out_is_refused_before_the_model_loads(
    capsys, monkeypatch, model, profile, tmp_path
):
    file = tmp_path / "c"
    json_of(capsys, *cache_prompt(model, profile, file))

    def loads(*_):
        raise AssertionError("a host was loaded")

    monkeypatch.setattr(backends, "_import", loads)
    common = ["--model", "nowhere", "--profile", profile]
    new = ["generate", *common, "--prompt", "Hi", "--method"]
    fails(capsys, 2, "think, received 8.01", *new, "think", "--bits", "8.01")
    fails(capsys, 2, "Calibrate again", *new, "spectral-dense-pairs")
    fails(capsys, 2, "Calibrate again", "cache-prompt", *common, "--prompt", "Hi", "--method", "kvtc", "--output", "x")
    fails(capsys, 2, "Calibrate again", "eval", *common, "--methods", "kvtc", "--output", "x")
    goes_on = ["generate", *common, "--prompt", "Hi", "--prompt-cache-file", str(file)]
    fails(capsys, 2, "bits between 0.25 and 8 for spectral, received 20", *goes_on, "--bits", "20")
    fails(capsys, 2, "received plain", *goes_on, "--method", "plain", "--bits", "2")


def test_damaged_profiles(capsys, folder, model, profile):
    whole = Path(profile).read_bytes()
    arrays = load_file(profile)
    metadata = {METADATA_KEY: json.dumps(json.loads(_header(profile)[METADATA_KEY]) | {"version": 99})}
    newer, altered, cut = (str(folder / f"{name}.safetensors") for name in ("newer", "altered", "cut"))
    save_file(arrays, newer, metadata)
    save_file({**arrays, "queries/mean": np.zeros_like(arrays["queries/mean"])}, altered, _header(profile))
    Path(cut).write_bytes(whole[: len(whole) // 2])
    for path, message in ((newer, "Upgrade"), (altered, "altered"), (cut, "truncated")):
        fails(
            capsys, 2, message, "generate", "--model", model, "--backend", "torch", "--prompt", "Hi", "--profile", path
        )
        fails(capsys, 2, message, "inspect", path)


def _header(path):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return file.metadata()


def test_broken_weights_do_not_pass_as_numbers(capsys, folder, model, profile, text_file):
    import shutil

    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    broken = folder / "broken"
    shutil.copytree(model, broken)
    weights = load_torch(broken / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_torch(weights, broken / "model.safetensors", {"format": "pt"})
    common = ["--model", str(broken), "--backend", "torch"]
    output = folder / "never.safetensors"
    code, _, err = run(
        capsys, "profile", *common, "--text", text_file, "--tokens", "256", "--document", "256", "--quiet",
        "--output", str(output),
    )  # fmt: skip
    assert code == 2 and "NaN" in err and not output.exists() and not list(folder.glob("never*"))
    fails(capsys, 2, "NaN", "generate", *common, "--prompt-file", text_file, "--profile", profile)


def test_missing_backend_names_the_extra(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    code, _, err = run(capsys, "generate", "--model", "x", "--backend", "torch", "--prompt", "Hi")
    assert code == 1 and 'pip install "spectralkv[torch]"' in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("Expected `bits` above 0."), 2),
        (FileNotFoundError("Expected a file."), 2),
        (ValueError("operands could not be broadcast together with shapes (3,) (4,)"), 1),
        (TypeError("unhashable type"), 1),
        (RuntimeError("out of memory"), 1),
        (KeyError(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_wrong_use_ends_with_2(capsys, monkeypatch, error, code):
    def failing(args):
        raise error

    monkeypatch.setattr(methods, "run", failing)
    fails(capsys, code, str(error) or "KeyError", "methods")
    with pytest.raises(type(error)):
        cli.main(["methods", "--debug"])


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["inspect", "missing.safetensors", "--debug"])


EVAL = ("--methods", "identity", "--output", "nowhere")


def test_errors_name_the_options_of_their_command(capsys):
    """The library's fields are in backticks; what a command has no option for stays so."""
    fails(capsys, 2, "Expected --prefix of at least 2", "eval", "--model", "x", *EVAL, "--prefix", "1")
    fails(capsys, 2, "Expected --turn-tokens of at least 1", "eval", "--model", "x", *EVAL, "--turn-tokens", "0")
    fails(capsys, 2, "Expected --context of at least", "bench", "--context", "1")
    fails(capsys, 2, "separated by commas for --bits, received 'two'", "eval", "--model", "x", *EVAL, "--bits", "two")
    fails(capsys, 2, "separated by commas for --bits, received '2,'", "eval", "--model", "x", *EVAL, "--bits", "2,")
    args = argparse.Namespace(prefix=1, turn_tokens=2)
    assert output.in_options("`prefixes`, `turn_tokens`, `budget_tokens`", args) == (
        "--prefix, --turn-tokens, `budget_tokens`"
    )
    bare = "turn_tokens, budget_tokens, turn_tokens=5, load_prompt_cache(turn_tokens), a/turn_tokens.json"
    assert output.in_options(bare, args).startswith("--turn-tokens, budget_tokens, turn_tokens=5, load_prompt_cache(")
    fails(
        capsys,
        2,
        "drops tokens for --budget-tokens, spectral",
        "generate",
        "--model",
        "demo",
        "--prompt",
        "x",
        "--budget-tokens",
        "9",
    )


HOSTILE = "evil\x1b[2J\u202e\nname [red]x[/red] [/bold] :smile: " + "y" * 100_000


def test_text_of_files_is_escaped_and_cut(capsys, folder, profile):
    path = str(folder / "hostile.safetensors")
    replace(Profile.load(profile), model=HOSTILE).save(path)
    code, out, err = run(capsys, "inspect", path)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "evil" in line]
    assert r"evil\x1b[2J\u202e name [red]x[/red] [/bold] :smile: y" in line and line.endswith("…")
    assert len(line) < 300 and "\x1b" not in out and json_of(capsys, "inspect", path)["model"] == HOSTILE
    metadata = {METADATA_KEY: json.dumps({"format": HOSTILE})}
    save_file({"x": np.zeros(1, np.float32)}, path, metadata)
    code, _, err = run(capsys, "inspect", path)
    assert code == 2 and "\x1b" not in err and len(err.splitlines()) == 1 and len(err) < 3000


@pytest.mark.parametrize("field", ["text", "method"])
def test_no_text_of_a_file_reaches_the_terminal_as_it_is(capsys, folder, profile, model, field):
    path = folder / "hostile.safetensors"
    if field == "text":
        made = Profile.load(profile)
        replace(made, calibration=made.calibration | {"text": HOSTILE}).save(path)
    else:
        json_of(capsys, *cache_prompt(model, profile, path, "--method", "identity"))
        stored = PromptFile.load(path)
        replace(stored, method=replace(stored.method, name=HOSTILE)).save(path)
    code, out, err = run(capsys, "inspect", str(path))
    assert code == 0 and "evil" in out, err
    assert all(c.isprintable() for line in out.splitlines() for c in line) and max(map(len, out.splitlines())) < 400


def test_a_stored_prompt_of_a_hostile_model_is_shown(capsys):
    summary = {"prompt_tokens": 3, "model": HOSTILE, "method": "spectral", "bits": 2.0, "sinks": 4, "window": 64}
    parts = {"codes": 1, "exact": 2, "passed": 3}
    tables.print_prompt_file(summary | {"bytes_by_kind": parts, "file_bytes": 10, "dense_bytes": 40})
    out = capsys.readouterr().out
    assert "[red]x[/red] [/bold]" in " ".join(out.split()) and "\x1b" not in out and len(out) < 1000


def test_an_answer_moves_no_cursor(capsys):
    class NewText:
        def token(self, token):
            return "a\x1b[2Jb\r\n\tc"

        def end(self):
            return "\x07"

    show = tables.Stream(NewText)
    show.token(0)
    show.end()
    assert capsys.readouterr().out == "a\\x1b[2Jb\\r\n\tc\\x07\n"


def test_a_terminal_of_ascii_gets_the_answer(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(methods, "run", lambda args: print("23 Tassen für 5 €") or {})
    assert cli.main(["methods"]) == 0
    assert stream.buffer.getvalue() == b"23 Tassen f?r 5 ?\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(
    "script",
    [
        '"$@" >/dev/full',
        '"$@" --json >/dev/full',
        '( sleep 0.2; exec "$@" ) | true',
        '( sleep 0.2; exec "$@" --json ) | true',
        '"$@" --json >&-',  # whoever closes it without --json wants no text
    ],
)
@pytest.mark.parametrize("answer", ["short", "long"])
def test_an_answer_that_nobody_takes_is_one_line(answer, script):
    """A short one fails when it is written out, which the interpreter tries again when it ends; a long one at once."""
    code = "import sys; from spectral_kv_core.cli import main, methods; "
    code += "methods.run = lambda args: print(23) or {}; " * (answer == "short") + "sys.exit(main.main())"
    command = ["bash", "-c", f"set -o pipefail; {script}", "bash", sys.executable, "-c", code, "methods"]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, capture_output=True, text=True, env=buffered)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and not ended.stdout
    assert line.startswith(("spectralkv: Expected standard output", "spectralkv: [Errno 28] No space left")), line


def test_control_c_ends_quietly(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(methods, "run", interrupted)
        assert run(capsys, "methods", "--debug") == (130, "", "")
    monkeypatch.setattr(cli, "command_modules", interrupted)  # which imports everything
    assert run(capsys, "methods") == (130, "", "")


def test_nothing_that_takes_long_is_imported_before_main_waits_for_control_c():
    code = "import sys, spectral_kv_core.cli.main; sys.exit(bool({'numpy', 'rich', 'tqdm', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_is_installed():
    out = subprocess.run([sys.executable, "-m", "spectral_kv_core.cli", "--version"], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("spectralkv ")

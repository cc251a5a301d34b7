"""`spectralkv mlx`: mlx-lm's own commands with compressed caches, and one line for what does not go together."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import threading
import time
import urllib.request

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
pytest.importorskip("torch")

import mlx_lm.chat
import mlx_lm.server
from hosts import only
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.cli import main as cli
from spectral_kv_mlx import commands, load_model, load_prompt_cache
from spectral_kv_mlx.cache import SpectralKVCache

pytestmark = only("mlx", "mlx-lm alone has these commands")
PROMPT = "In the beginning stood 23 cups on the table; nobody knew whose they were. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALKV_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def model(folder):
    """A tiny checkpoint whose profile is found by itself."""
    path = str(save_tiny_checkpoint(folder / "model"))
    (folder / "text.txt").write_text(PROMPT * 20)
    arguments = ["--text", str(folder / "text.txt"), "--tokens", "1024", "--document", "512", "--quiet"]
    assert cli.main(["profile", "--model", path, "--backend", "mlx", *arguments]) == 0
    assert list((folder / "cache" / "profiles").iterdir())
    return path


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    try:
        code = cli.main(["mlx", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def line_of(capsys, *arguments) -> str:
    """The line of wrong use."""
    code, out, err = run(capsys, *arguments)
    (line,) = err.splitlines()
    assert code == 2 and not out and line.startswith("spectralkv: "), (code, out, err)
    return line


def test_generate_has_its_own_options_and_ours(capsys, model):
    given = ["--model", model, "--prompt", PROMPT, "--max-tokens", "6", "--temp", "0", "--verbose", "False"]
    sizes = []
    for bits in ("2", "6"):
        code, out, err = run(capsys, "generate", *given, "--bits", bits, "--window", "16")
        assert code == 0 and out.strip() and "==========" not in out, err
        sizes.append(int(err.split(" bytes")[0].split()[-1].replace(",", "")))
    assert sizes[0] < sizes[1], "the codes are those of --bits"


def test_generate_gives_what_mlx_lm_gives(capsys, model):
    """For a model that is loaded with the RoPE base of its config, where mlx-lm 0.32.2 does not look."""
    given = ["--model", model, "--prompt", PROMPT, "--max-tokens", "8", "--verbose", "False", "--ignore-chat-template"]
    _, out, _ = run(capsys, "generate", *given, "--method", "identity")
    loaded, tokenizer = load_model(model)
    assert out == mlx_lm.generate(loaded, tokenizer, PROMPT, max_tokens=8) + "\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_shows_both(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: spectralkv mlx {name} ")
    for option in ("--model", "--trust-remote-code", "--bits", "--budget-tokens", "--profile"):
        assert option in out, option


def test_nothing_stays_replaced(capsys, model):
    modules = [sys.modules[f"mlx_lm.{name}"] for name in ("generate", "chat", "server", "cache_prompt")]
    before = [dict(vars(module)) for module in modules]
    run(capsys, "generate", "--model", model, "--prompt", "Hi", "--max-tokens", "1")
    for name in commands.COMMANDS:
        run(capsys, name, "--help")
    assert all(vars(module) == names for module, names in zip(modules, before))
    assert all(module.argparse is argparse for module in modules)


def test_a_stored_prompt_is_ours_and_goes_on(capsys, model, folder):
    file = str(folder / "prompt.safetensors")
    made = ["cache_prompt", "--model", model, "--prompt", PROMPT, "--prompt-cache-file", file, "--bits", "4"]
    assert run(capsys, *made)[0] == 0
    stored = PromptFile.load(file)
    assert stored.method.name == "spectral" and stored.bits == 4 and stored.metadata == {"raw": False}
    assert stored.seen == len(PROMPT) + len("[user] ") == len(stored.tokens)
    cache, _ = load_prompt_cache(file, load_model(model)[0])
    assert all(isinstance(layer, SpectralKVCache) for layer in cache)
    on = ["generate", "--prompt-cache-file", file, "--prompt", "Whose?", "--max-tokens", "6", "--verbose", "False"]
    code, out, err = run(capsys, *on, "--model", model)
    assert code == 0 and out.strip() and "the cache holds" in err
    assert cli.main(["generate", "--backend", "mlx", *on[1:-2], "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].strip() == out.strip(), "as spectralkv generate goes on"
    assert "as it was stored" in line_of(capsys, *on, "--model", model, "--bits", "2")
    assert "with the chat template" in line_of(capsys, *on, "--model", model, "--ignore-chat-template")


def test_a_file_of_mlx_lm_is_answered_in_one_line(capsys, model, folder, monkeypatch):
    file = str(folder / "theirs.safetensors")
    given = ["--model", model, "--prompt", "Hi", "--prompt-cache-file", file]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.cache_prompt", *given])
    importlib.import_module("mlx_lm.cache_prompt").main()
    capsys.readouterr()
    assert "spectralkv mlx cache_prompt" in line_of(capsys, "generate", *given)


WRONG = [  # options of mlx-lm and ours, what the line says
    ("generate --kv-bits 4", "no --kv-bits, which changes no cache of spectralkv. Give --bits instead"),
    (
        "generate --max-kv-size 64",
        "no --max-kv-size, which changes no cache of spectralkv. Give --budget-tokens instead",
    ),
    ("chat --max-kv-size 64", "Give --budget-tokens"),
    ("cache_prompt --prompt x --prompt-cache-file f --kv-bits 4", "Give --bits"),
    ("cache_prompt --prompt x --prompt-cache-file f --max-kv-size 4", "Give --budget-tokens"),
    ("cache_prompt --prompt x --prompt-cache-file /", "received the folder"),
    (
        "cache_prompt --prompt x --prompt-cache-file f --method knorm --budget-tokens 99",
        "keeps every token for a file, received knorm",
    ),
    ("server --kv-bits 4", "Give --bits"),
    ("server --port 99999", "--port between 0 and 65535, received 99999"),
    ("generate --prompt \udcff", "text in UTF-8, received '\\udcff'"),
    ("generate --bits 20", "bits between 0.25 and 8 for spectral, received 20"),
    ("generate --method knorm", "either --budget-tokens or --budget-bytes"),
    ("generate --method knorm --budget-tokens 99 --draft-model x", "no --draft-model with knorm"),
    ("generate --prompt-cache-file missing", "found nothing at missing"),
    ("generate --no-such-option", "unrecognized arguments: --no-such-option"),
    ("generate --model /nowhere", "cannot load '/nowhere'"),
    ("generte", "a command among generate, chat, server, cache_prompt, received 'generte'"),
    ("", "received none"),
    ("--json generate", "no --json with mlx"),
]


@pytest.mark.parametrize("line, message", WRONG)
def test_what_does_not_go_together_is_one_line(capsys, line, message):
    """Before a model is loaded."""
    given = line.split()
    assert message in line_of(capsys, *given)


def test_wrong_bits_of_a_server_end_it(capsys, model):
    """Its thread makes the caches; the process ends with the line."""
    line = run(capsys, "server", "--model", model, "--port", "0", "--budget-bytes", "10", "--max-context", "1000")
    assert line[0] == 2 and "--budget-bytes between" in line[2].splitlines()[-1]


def test_chat_resets_to_a_compressed_cache(capsys, model, monkeypatch):
    made = []
    build = commands.build_cache
    monkeypatch.setattr(commands, "build_cache", lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nr\nagain\nq\n"))
    code, _, err = run(capsys, "chat", "--model", model, "--max-tokens", "4", "--bits", "2")
    assert code == 0 and "the cache holds" in err
    assert [cache[0].offset for cache in made] == [
        0,
        len("[user] hello\n[assistant]") + 4,
        len("[user] again\n[assistant]") + 4,
    ]


def test_the_log_of_the_server_tells_tokens_and_bytes(capsys, model, monkeypatch):
    """mlx-lm's own server, over a socket; a second request goes on from what the first stored."""
    servers = []
    serve = mlx_lm.server.ThreadingHTTPServer.serve_forever

    def serve_and_tell(self):
        servers.append(self)
        serve(self, 0.05)

    monkeypatch.setattr(mlx_lm.server.ThreadingHTTPServer, "serve_forever", serve_and_tell)

    def ask(prompt: str) -> dict:
        address = f"http://127.0.0.1:{servers[0].server_address[1]}/v1/completions"
        body = json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def client():
        while not servers:
            time.sleep(0.01)
        try:
            answers.append(ask(PROMPT))
            answers.append(ask(PROMPT + "Whose?"))
        finally:
            servers[0].shutdown()

    answers: list = []
    thread = threading.Thread(target=client)
    thread.start()
    code, _, err = run(capsys, "server", "--model", model, "--port", "0", "--bits", "2", "--temp", "0")
    thread.join()
    assert code == 0 and [answer["usage"]["completion_tokens"] for answer in answers] == [4, 4], err
    told = [line for line in err.splitlines() if "reused" in line]
    tokens = len(PROMPT) + 4
    assert f"{tokens} tokens, {len(PROMPT)} of them of the prompt, 0 reused: " in told[0]
    reused = answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused == len(PROMPT) and f" {reused} reused: " in told[1] and "times smaller than" in told[1]

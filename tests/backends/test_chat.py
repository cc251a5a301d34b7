"""`spectralkv chat` on both backends: one cache across turns, commands, limits, Ctrl-C."""

from __future__ import annotations

import io
import json
import re
import signal
import sys

import pytest
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.cli import main as cli
from spectral_kv_core.hosts.backends import load_backend
from spectral_kv_core.hosts.chat_template import encode_messages

TEXT = "In the beginning stood 23 cups on the table; nobody knew whose they were. " * 20
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}] "
    "{{ 'said' if m['role'] == 'assistant' and not loop.last else m['content'] }}\n{% endfor %}[assistant]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model(folder):
    """A tiny checkpoint."""
    pytest.importorskip("torch")
    return str(save_tiny_checkpoint(folder / "model"))


@pytest.fixture
def backend(host, folder, model):
    """Name and module `generation` of the backend; the folder has a profile of the model."""
    name = host.__name__.removesuffix("_host")
    if not (folder / "profile").exists():
        (folder / "text.txt").write_text(TEXT)
        given = ["--text", str(folder / "text.txt"), "--tokens", "1024", "--document", "512", "--quiet"]
        assert (
            cli.main(["profile", "--model", model, "--backend", name, "--output", str(folder / "profile"), *given]) == 0
        )
    return load_backend(name)


@pytest.fixture
def talk(capsys, monkeypatch, backend, model, folder):
    """Says lines to the model; gives exit code, standard output and standard error."""

    def talk(lines: list[str], *arguments: str, of: str = model):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ["--max-tokens", "6", "--profile", str(folder / "profile"), *arguments]
        code = cli.main(["chat", "--model", of, "--backend", backend[0], *given])
        return code, *capsys.readouterr()

    return talk


def json_of(result: tuple) -> dict:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def greedy(backend, path: str, messages: list[dict], count: int = 6) -> str:
    """The answer to `messages` from the host's plain cache."""
    model, tokenizer = backend.load_model(path)
    prompt = encode_messages(tokenizer, messages)
    out = backend.generate(model, tokenizer, prompt, backend.plain_cache(model), count, False, lambda token: None)
    ends = backend.end_tokens(model, tokenizer)
    return tokenizer.decode([token for token in out.tokens if token not in ends], skip_special_tokens=True)


def counted(monkeypatch, backend) -> list[int]:
    """How many tokens each call of a model brings from now on."""
    calls: list[int] = []
    for name in ("read", "feed"):
        call = getattr(backend, name)

        def noting(model, tokens, cache, *rest, call=call):
            calls.append(len(tokens))
            return call(model, tokens, cache, *rest)

        monkeypatch.setattr(backend, name, noting)
    return calls


def test_answers_are_those_of_the_whole_conversation(talk, backend, model, monkeypatch):
    """With `identity`; and of every turn only what is new is read."""
    calls = counted(monkeypatch, backend[1])
    result = json_of(talk(["Whose cups?", "How many?"], "--method", "identity", "--system", "Be brief.", "--json"))
    messages = result["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert result["backend"] == backend[0] and result["cache_bytes"] == 2 * result["dense_bytes"]
    assert sum(calls) <= result["tokens"] + 8, "the first turn is not read again"
    for turn in (2, 4):
        assert messages[turn]["content"] == greedy(backend[1], model, messages[:turn])


def test_a_template_that_rewrites_what_was_said_is_followed(talk, backend, folder, model, monkeypatch):
    """The cache is cropped to what still holds."""
    path = folder / "rewriting"
    if not path.exists():
        save_tiny_checkpoint(path)
        (path / "chat_template.jinja").write_text(REWRITING)
    calls = counted(monkeypatch, backend[1])
    lines = ["Whose cups?" * 6, "How many?", "Why?"]
    result = json_of(talk(lines, "--method", "identity", "--json", of=str(path)))
    tokenizer = backend[1].load_model(str(path))[1]
    whole = len(encode_messages(tokenizer, result["messages"][:5]))
    assert whole <= result["tokens"] < whole + 6 and sum(calls) < 1.7 * result["tokens"]
    for turn in (3, 5):
        assert result["messages"][turn]["content"] == greedy(backend[1], str(path), result["messages"][:turn])


def test_bytes_are_told_after_every_answer(talk):
    code, out, _ = talk(["Whose cups? " * 20, "/bytes", "/reset", "Whose?", "/quit", "no more"], "--bits", "2")
    told = re.findall(r"\[(\d+) tokens: ([\d,]+) bytes.* times\s+smaller\s+than\s+([\d,]+)", out)
    first, again, after = [tuple(int(number.replace(",", "")) for number in line) for line in told]
    assert code == 0 and first == again and after[0] < first[0] and after[1] < first[1]
    assert first[2] == first[0] * 3 * 2 * 2 * 16 * 2, "tokens, layers, sides, heads, channels, bytes"


def test_a_saved_conversation_goes_on(talk, backend, folder):
    file = str(folder / f"{backend[0]}.safetensors")
    lines = ["Whose cups?", f"/save {file}", "How many?"]
    whole = json_of(talk(lines, "--method", "identity", "--json"))
    saved = PromptFile.load(file)
    assert saved.metadata["messages"] == whole["messages"][:2]
    on = json_of(talk(["How many?"], "--prompt-cache-file", file, "--json"))
    assert on["messages"] == whole["messages"] and on["tokens"] == whole["tokens"]
    out = talk(["/save", "/save /", "/nonsense"])[1]
    assert "/save PATH" in out and "received the folder" in out and "/nonsense is no command" in out


def test_a_stored_prompt_is_how_the_first_message_begins(talk, backend, model, folder, capsys):
    file = str(folder / f"{backend[0]}-prompt.safetensors")
    made = ["cache-prompt", "--model", model, "--backend", backend[0], "--prompt", TEXT[:150], "--output", file]
    assert cli.main([*made, "--method", "identity"]) == 0
    result = json_of(talk(["Whose?"], "--prompt-cache-file", file, "--json"))
    assert result["messages"][0] == {"role": "user", "content": TEXT[:150] + "Whose?"}
    assert result["messages"][1]["content"] == greedy(backend[1], model, result["messages"][:1])


def test_the_memory_limit_holds(talk, backend, monkeypatch):
    """After no call does the cache hold more; the chat goes on after a reset."""
    sizes = []
    for name in ("read", "feed"):
        call = getattr(backend[1], name)

        def noting(model, tokens, cache, *rest, call=call):
            out = call(model, tokens, cache, *rest)
            sizes.append(int(backend[1].cache_nbytes(cache)))
            return out

        monkeypatch.setattr(backend[1], name, noting)
    lines = ["Whose cups? " * 12, "How many?", TEXT, "/reset", "Why?"]
    code, out, _ = talk(lines, "--bits", "2", "--memory-limit", "80kB", "--max-tokens", "40")
    assert code == 0 and 70_000 < max(sizes) <= 80_000
    assert out.count("--memory-limit is reached") >= 1 and out.rstrip().splitlines()[-1].startswith("[")
    assert sizes[-1] < 80_000


def test_control_c_ends_the_answer_and_not_the_chat(talk, backend, monkeypatch):
    feed, calls = backend[1].feed, []

    def pressing(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return feed(*args)

    monkeypatch.setattr(backend[1], "feed", pressing)
    read = counted(monkeypatch, backend[1])
    result = json_of(talk(["Whose cups?", "How many?"], "--json", "--max-tokens", "20", "--method", "identity"))
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"] * 2
    assert sum(read) <= result["tokens"] + 4, "the cache is whole: nothing is read again"
    assert len(calls) == 3 + 20 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_control_c_in_the_middle_of_a_call_leaves_a_chat_that_goes_on(talk, backend, model, monkeypatch):
    """The broken cache is not used again."""
    feed, calls = backend[1].feed, []

    def pressing(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return feed(*args)

    monkeypatch.setattr(backend[1], "feed", pressing)
    result = json_of(talk(["Whose cups?", "How many?"], "--json", "--method", "identity"))
    monkeypatch.undo()
    assert result["messages"][3]["content"] == greedy(backend[1], model, result["messages"][:3])


def test_without_a_template_the_text_goes_on(talk, backend, model):
    result = json_of(talk(["One two", " three"], "--raw", "--method", "identity", "--json"))
    loaded, tokenizer = backend[1].load_model(model)
    said = [m["content"] for m in result["messages"]]
    first = tokenizer.encode("One two")
    out = backend[1].generate(loaded, tokenizer, first, backend[1].plain_cache(loaded), 6, False, lambda token: None)
    assert said[1] == tokenizer.decode(out.tokens, skip_special_tokens=True) and len(said) == 4


WRONG = [  # options, what the line says
    ("--max-tokens 0", "--max-tokens of at least 1, received 0"),
    ("--memory-limit much", "an amount of memory"),
    ("--bits 20", "bits between 0.25 and 8"),
    ("--raw --system x", "a chat template for --system"),
    ("--prompt-cache-file missing", "found nothing at missing"),
    ("--temperature -1", "--temperature of at least 0, received -1"),
    ("--top-p 0", "--top-p above 0 and at most 1, received 0"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_use_is_one_line(talk, options, message):
    code, out, err = talk(["Hi"], *options.split())
    assert code == 2 and not out and message in err and len(err.splitlines()) == 1


def test_bytes_that_are_no_text_do_not_end_the_chat(talk, monkeypatch):
    code, out, err = talk(["Hi \udcff", "Hello"], "--method", "identity")
    assert code == 0 and out.count(" tokens: ") == 1
    assert "Expected text in UTF-8, received '\\udcff' at character 4." in out + err
    stdin = io.TextIOWrapper(io.BytesIO(b"Hi \xff\nHello\n"), "utf-8")
    monkeypatch.setattr(io, "StringIO", lambda text: stdin)
    code, out, err = talk([], "--method", "identity")
    assert code == 0 and out.count(" tokens: ") == 1 and "Expected text in UTF-8" in out + err

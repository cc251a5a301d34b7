"""`spectralkv serve` on both backends: OpenAI's own client over real sockets."""

from __future__ import annotations

import http.client
import importlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

openai = pytest.importorskip("openai")
from tiny_checkpoint import save_tiny_checkpoint  # noqa: E402

from spectral_kv_core.cache.request import CacheRequest  # noqa: E402
from spectral_kv_core.cli import main as cli  # noqa: E402
from spectral_kv_core.errors import UsageError  # noqa: E402
from spectral_kv_core.hosts.backends import load_backend  # noqa: E402
from spectral_kv_core.hosts.chat_template import encode_messages  # noqa: E402
from spectral_kv_core.profile.profile import Profile  # noqa: E402
from spectral_kv_core.serving import local, worker  # noqa: E402
from spectral_kv_core.serving.settings import Settings  # noqa: E402

TEXT = "In the beginning stood 23 cups on the table; nobody knew whose they were. " * 20
PROMPTS = [TEXT[7 * n : 120 + 11 * n] for n in range(8)]
TOKEN = 3 * 2 * 2 * 16  # elements: layers, sides, heads, channels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def path(folder):
    pytest.importorskip("torch")
    return str(save_tiny_checkpoint(folder / "model"))


@pytest.fixture
def name(host):
    return host.__name__.removesuffix("_host")


@pytest.fixture
def profile(name, folder, path):
    file = folder / "profile"
    if not file.exists():
        (folder / "text.txt").write_text(TEXT)
        given = ["--text", str(folder / "text.txt"), "--tokens", "1024", "--document", "512", "--quiet"]
        assert cli.main(["profile", "--model", path, "--backend", name, "--output", str(file), *given]) == 0
    return Profile.load(file)


@pytest.fixture
def lines(caplog):
    """What the log says of answers."""
    caplog.set_level(logging.INFO, logger="spectralkv")

    def lines(count: int = 0) -> list[str]:
        stop = time.monotonic() + 10
        while time.monotonic() < stop:
            found = [record.getMessage() for record in caplog.records if " reused" in record.getMessage()]
            if len(found) >= count:
                break
            time.sleep(0.02)
        return found

    return lines


@pytest.fixture
def serving(name, path, profile):
    """Serves the tiny model in a thread; gives a client of OpenAI's, and where it is served."""

    @contextmanager
    def serving(bits: float | None = 2.0, method: str = "spectral", **options):
        request = CacheRequest(method=method, bits=bits, window=16, sinks=4)
        settings = Settings(
            path,
            ("tiny", path),
            lambda tokenizer: request,
            profile,
            dtype="float32",
            port=0,
            **{"most_tokens": 8} | options,
        )
        _, module = load_backend(name, "server")
        started, servers, failures = threading.Event(), [], []

        def ready(server):
            servers.append(server)
            started.set()

        def run():
            try:
                module.serve(settings, ready)
            except Exception as error:
                failures.append(error)
                started.set()

        thread = threading.Thread(target=run)
        thread.start()
        assert started.wait(60) and not failures, failures
        client = openai.OpenAI(base_url=servers[0].url, api_key="none", max_retries=0, timeout=60)
        try:
            yield SimpleNamespace(client=client, address=servers[0].server_address[:2], url=servers[0].url)
        finally:
            client.close()
            servers[0].shutdown()
            thread.join(60)
        assert not thread.is_alive() and not failures

    return serving


@pytest.fixture
def greedy(name, path):
    """The text that follows a prompt by the host's plain cache."""
    _, backend = load_backend(name)
    model, tokenizer = backend.load_model(path, "float32")

    def greedy(prompt, count: int = 8) -> str:
        tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else encode_messages(tokenizer, prompt)
        cache = backend.plain_cache(model)
        out = backend.generate(model, tokenizer, list(tokens), cache, count, False, lambda token: None)
        ends = backend.end_tokens(model, tokenizer)
        return tokenizer.decode([token for token in out.tokens if token not in ends], skip_special_tokens=True)

    return greedy


def shown(text: str) -> str:
    """`text` without special tokens, which mlx-lm's server shows."""
    return re.sub(r"<(pad|bos|eos)>", "", text)


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat(client, messages: list[dict], **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_answers_are_those_of_the_host(serving, greedy):
    """With `identity`: a chat and a completion, whole and streamed."""
    with serving(None, "identity") as at:
        assert [model.id for model in at.client.models.list()] == ["tiny"]
        assert at.client.models.retrieve("tiny").owned_by == "spectralkv"
        whole = chat(at.client, said("Whose cups?"))
        pieces = list(chat(at.client, said("Whose cups?"), stream=True, stream_options={"include_usage": True}))
        text = at.client.completions.create(model="tiny", prompt=PROMPTS[0])
        streamed = list(at.client.completions.create(model="tiny", prompt=PROMPTS[0], stream=True, max_tokens=5))
    expected = greedy(said("Whose cups?"))
    assert shown(whole.choices[0].message.content) == expected and whole.choices[0].message.role == "assistant"
    choices = [piece.choices[0] for piece in pieces if piece.choices]
    assert shown("".join(choice.delta.content or "" for choice in choices)) == expected and len(choices) > 4
    assert choices[-1].finish_reason == whole.choices[0].finish_reason and pieces[-1].usage.completion_tokens <= 8
    assert shown(text.choices[0].text) == greedy(PROMPTS[0]) and text.usage.prompt_tokens == len(PROMPTS[0])
    assert shown("".join(piece.choices[0].text for piece in streamed)) == greedy(PROMPTS[0], 5)


def test_a_second_turn_goes_on_from_the_cache(serving, lines):
    """Of the first turn nothing is read again, and the log tells tokens and bytes of the conversation."""
    messages = said(PROMPTS[7])
    with serving() as at:
        first = chat(at.client, messages)
        messages += [{"role": "assistant", "content": first.choices[0].message.content}, *said("How many?")]
        second = chat(at.client, messages)
        told = lines(2)
    read = first.usage.prompt_tokens
    assert not first.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= read - 1
    for line, usage in zip(told, (first.usage, second.usage)):
        reused = usage.prompt_tokens_details.cached_tokens
        assert re.search(rf"\b{usage.prompt_tokens} (tokens|of them of the prompt),", line), line
        assert re.search(rf"\b{reused} (of them )?reused\b", line), line
        stored, exact, dense = re.search(
            r"([\d,]+) bytes, ([\d,]+) of them exact, [\d.]+ times smaller than ([\d,]+)", line
        ).groups()
        tokens = usage.total_tokens
        assert (tokens - 2) * TOKEN * 2 <= int(dense.replace(",", "")) <= tokens * TOKEN * 2
        assert 0 < int(exact.replace(",", "")) < int(stored.replace(",", "")) < 4 * tokens * TOKEN


def test_eight_at_a_time(serving, lines, greedy):
    """Each gets the tokens that it gets alone; the log has the bytes of each."""
    with serving(None, "identity", concurrency=8) as at, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: chat(at.client, said(text)), PROMPTS))
        told = lines(8)
    texts = [shown(answer.choices[0].message.content) for answer in answers]
    expected = [greedy(said(text)) for text in PROMPTS]
    assert sum(a == b for a, b in zip(texts, expected)) >= 7, "rows of a batch may tie"
    assert len(told) == 8 and all("bytes" in line for line in told)


def slowed(name: str, monkeypatch) -> None:
    """Let every step of an answer take a while."""
    _, backend = load_backend(name)
    owner = importlib.import_module("mlx_lm.generate").GenerationBatch if name == "mlx" else backend
    step = "_step" if name == "mlx" else "feed"
    call = getattr(owner, step)

    def slow(*args, **options):
        time.sleep(0.03)
        return call(*args, **options)

    monkeypatch.setattr(owner, step, slow)


def test_a_request_that_is_given_up_makes_room(serving, lines, greedy, name, monkeypatch):
    """The one after it is answered at once, where one at a time is: neither a stream nor a whole answer goes on for nobody."""
    slowed(name, monkeypatch)
    with serving(None, "identity", concurrency=1, most_tokens=800) as at:
        stream = chat(at.client, said("Whose cups?"), stream=True)
        for number, _ in enumerate(stream):
            if number == 3:
                break
        stream.close()
        begun = time.monotonic()
        answer = chat(at.client, said("How many?"), max_tokens=4)
        assert time.monotonic() - begun < 10
        connection = http.client.HTTPConnection(*at.address)
        body = json.dumps({"messages": said("Who?"), "max_tokens": 900}).encode()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        time.sleep(0.2)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        begun = time.monotonic()
        again = chat(at.client, said("How many?"), max_tokens=4)
        assert time.monotonic() - begun < 10
    assert {shown(x.choices[0].message.content) for x in (answer, again)} == {greedy(said("How many?"), 4)}


WRONG = [  # what of a request is wrong, status, what the error says
    ({"messages": []}, 400, "messages"),
    ({"messages": "Hi"}, 400, "messages"),
    ({"messages": [{"content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
    ({"max_tokens": 0}, 400, "1 or more"),
    ({"max_tokens": "many"}, 400, "whole number"),
    ({"temperature": -1}, 400, "0"),
    ({"top_p": 2}, 400, "1"),
    ({"stop": [3]}, 400, "stop at"),
    ({"stream": "yes"}, 400, "true or false"),
    ({"model": "another"}, 404, "the model 'tiny'"),
    ({"model": 7}, 404, "the model 'tiny'"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "context"),
    ({"draft_model": "/somewhere"}, 400, "no such field"),
    ({"adapters": "/somewhere"}, 400, "no such field"),
]


def test_wrong_requests_get_an_error_of_openai(serving, name):
    with serving() as at:
        for more, status, message in WRONG:
            given = {"model": "tiny", "messages": said("Hi"), "max_tokens": 2} | more
            with pytest.raises(openai.APIStatusError) as error:
                at.client.post("/chat/completions", body=given, cast_to=object)
            body = error.value.response.json()
            assert error.value.status_code == status and message in body["error"]["message"], (more, body)
            assert set(body) == {"error"} and "Traceback" not in body["error"]["message"]
        with pytest.raises(openai.NotFoundError):
            at.client.models.retrieve("another")
        with pytest.raises(openai.BadRequestError, match="one prompt"):
            at.client.completions.create(model="tiny", prompt="")
        assert chat(at.client, said("Hi")).usage.completion_tokens >= 1, "the server goes on"


RAW = [  # what is sent after POST, status
    (b"/v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n\r\n", 411),
    (b"/v1/chat/completions HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", 415),
    (b"/v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n", 413),
    (b"/v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n", 400),
    (b"/v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]", 400),
    (b"/v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n\xff\xfe{", 400),
    (b"/v1/nothing HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", 404),
]


@pytest.mark.parametrize("place, given", [("messages", said("\ud800")), ("prompt", "\ud800")])
def test_half_a_character_is_named(serving, name, place, given):
    """JSON can say half of a pair that stands for one character."""
    body = json.dumps({"model": "tiny", place: given})
    with serving() as at:
        connection = http.client.HTTPConnection(*at.address)
        path = "/v1/completions" if place == "prompt" else "/v1/chat/completions"
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())["error"]["message"]
    assert answer.status == 400 and told == "Expected text in UTF-8, received '\\ud800' at character 1.", told


def test_what_is_no_request_gets_an_error_too(serving):
    """Bodies are bounded, and none is read that is announced too long."""
    deep = b"[" * 100_000
    head = b"/v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with serving() as at:
        for sent, status in [*RAW, (head % len(deep) + deep, 400)]:
            with socket.create_connection(at.address, timeout=20) as connection:
                connection.sendall(b"POST " + sent)
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                body = answer.read()
            assert answer.status == status, (sent[:80], answer.status, body)
            assert json.loads(body)["error"]["message"] and b"Traceback" not in body
            assert answer.getheader("Access-Control-Allow-Origin") is None
        for sent in (b"GARBAGE\r\n\r\n", b"GET /" + b"x" * 70_000, b"BREW /v1/models HTTP/1.1\r\n\r\n"):
            with socket.create_connection(at.address, timeout=20) as connection:
                connection.sendall(sent + b"\r\n\r\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert json.loads(answer[answer.index(b"{") :])["error"]["message"] and b"Traceback" not in answer
        for host, status in (("localhost:80", 200), ("example.com", 403)):
            connection = http.client.HTTPConnection(*at.address)
            connection.request("GET", "/health", headers={"Host": host})
            answer = connection.getresponse()
            assert answer.status == status and (json.loads(answer.read()) == {"status": "ok"}) == (status == 200)


def test_stop_texts_and_seeds(serving, greedy, name):
    with serving(None, "identity") as at:
        whole = greedy(said("Whose cups?"))
        stop = whole[3:5]
        found = chat(at.client, said("Whose cups?"), stop=stop)
        assert (
            found.choices[0].message.content == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
        )
        seeds = [{"temperature": 1.5, "seed": seed} for seed in (1, 1, 2)]
        if name == "mlx":
            with pytest.raises(openai.BadRequestError, match="no seed"):
                chat(at.client, said("Whose cups?"), **seeds[0])
            return
        drawn = [chat(at.client, said("Whose cups?"), **seed).choices[0].message.content for seed in seeds]
        assert drawn[0] == drawn[1] != drawn[2]


def test_the_memory_limit_holds(serving, lines, name, monkeypatch):
    """Stored caches go before it is passed, and what alone is above it gets an error."""
    limit, most = 45_000, []
    watch(name, monkeypatch, most)
    with serving(memory_limit=limit, most_tokens=6) as at:
        for text in PROMPTS:
            assert chat(at.client, said(text)).usage.completion_tokens >= 1
        with pytest.raises(openai.APIStatusError) as error:
            chat(at.client, said(TEXT[:950]))
        assert (
            error.value.status_code in (400, 503) and "memory limit" in error.value.response.json()["error"]["message"]
        )
        long = chat(at.client, said(PROMPTS[0]), max_tokens=400)
        assert long.choices[0].finish_reason == "length" and long.usage.completion_tokens < 400
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: attempt(at.client, text), PROMPTS[:4]))
        assert any(answers) and chat(at.client, said("Hi")).usage.completion_tokens >= 1
    assert 0.5 * limit < max(most) <= limit, max(most)


def attempt(client, text: str) -> bool:
    try:
        return bool(chat(client, said(text)).choices)
    except openai.APIStatusError as error:
        assert error.status_code == 503
        return False


def watch(name: str, monkeypatch, most: list[int]) -> None:
    """Note the bytes of all caches of the server after every step."""
    if name == "mlx":
        from spectral_kv_mlx import server

        class Bounded(server.BoundedBatches):
            def next(self):
                found = super().next()
                most.append(self.stored.nbytes + self.prompt_cache_nbytes)
                return found

        monkeypatch.setattr(server, "BoundedBatches", Bounded)
        return

    class Watched(worker.Worker):
        def _step(self, job):
            moved = super()._step(job)
            held = [*self.caches.stored, *self.caches.active]
            most.append(sum(int(self.speaker.backend.cache_nbytes(one.cache)) for one in held))
            return moved

    monkeypatch.setattr(local, "Worker", Watched)


def test_a_server_ends_with_what_it_cannot_do(name, path, profile, serving):
    """Wrong bits, and an address that is taken: one line, and no thread that stays."""
    before = set(threading.enumerate())  # pools of other tests keep their threads
    _, module = load_backend(name, "server")

    def settings(**options) -> Settings:
        request = CacheRequest(**options.pop("request", {}))
        return Settings(path, ("tiny",), lambda tokenizer: request, profile, dtype="float32", **options)

    with pytest.raises(UsageError, match="`port` of at most 65535, received 99999"):
        settings(port=99999)
    with pytest.raises(UsageError, match="budget_bytes between"):
        module.serve(settings(port=0, request={"budget_bytes": 10, "max_context": 1000}), pytest.fail)
    with serving() as at, pytest.raises(UsageError, match="an address that is free"):
        module.serve(settings(port=at.address[1]), pytest.fail)
    assert not [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]


@pytest.mark.slow
def test_the_command_serves_until_control_c(name, path, folder, profile):
    command = [sys.executable, "-m", "spectral_kv_core.cli", "serve", "--model", path, "--backend", name, "--port", "0"]
    command += ["--profile", str(folder / "profile"), "--bits", "2", "--memory-limit", "1MiB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "Serving" in line)
        client = openai.OpenAI(base_url=re.search(r"http://\S+/v1", line)[0], api_key="none", max_retries=0, timeout=60)
        assert client.models.list().data[0].id == "model"
        assert client.completions.create(model="model", prompt="Hi", max_tokens=3).usage.completion_tokens == 3
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert not out and "Traceback" not in err and "0 reused" in err.replace("of them ", "")

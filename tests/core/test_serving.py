"""What servers and chats are made of, without a model: requests, texts that stop, tokens that are drawn, stored caches."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from email.message import Message
from types import SimpleNamespace

import numpy as np
import pytest

from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.errors import UsageError
from spectral_kv_core.serving.conversation import Conversation, Event, Speaker, common_prefix
from spectral_kv_core.serving.prompt_caches import PromptCaches
from spectral_kv_core.serving.requests import MOST_BODY, RequestError, completion_of, read_body
from spectral_kv_core.serving.sampling import Sampler
from spectral_kv_core.serving.settings import Settings
from spectral_kv_core.serving.stop_texts import StoppingText

HI = [{"role": "user", "content": "Hi"}]


@dataclass
class ToyCache:
    """Tokens, each of which takes ten bytes."""

    tokens: list[int] = field(default_factory=list)


class ToyBackend:
    """A model that says one more than the last token. crops: whether caches can forget."""

    PREFILL_CHUNK = 4

    def __init__(self, crops: bool = True):
        self.crops, self.calls, self.most = crops, [], 0

    def token_nbytes(self, model) -> int:
        return 10

    def cache_nbytes(self, cache) -> CacheSize:
        return CacheSize({"codes": 10 * len(cache.tokens)}, 0.0, 0, 0)

    def read(self, model, tokens, cache) -> None:
        self.calls.append(len(tokens))
        cache.tokens += tokens

    def feed(self, model, tokens, cache) -> np.ndarray:
        self.read(model, tokens, cache)
        return np.eye(1, 100, (tokens[-1] + 1) % 100)

    def can_crop(self, cache) -> bool:
        return self.crops

    def crop(self, cache, tokens) -> bool:
        del cache.tokens[len(cache.tokens) - tokens :]
        return self.crops


def speaker_of(backend: ToyBackend) -> Speaker:
    return Speaker(backend, None, None, ToyCache)


def answer(caches: PromptCaches, prompt: list[int], count: int) -> list:
    """Tokens of an answer, until there is no room."""
    held, found = caches.begin(prompt), []
    for event in held.answer(prompt, Sampler(), caches.room):
        if isinstance(event, int) and not found:
            caches.keep(held)
        if event is Event.FULL:
            found.append(event)
            break
        found += [event] * (event is not Event.READ)
        assert sum(10 * len(x.cache.tokens) for x in (*caches.stored, *caches.active)) <= caches.limit
        if len(found) == count:
            break
    caches.end(held)
    return found


def test_common_prefix():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, second = (rng.integers(0, 2, rng.integers(0, 9)).tolist() for _ in range(2))
        expected = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        assert common_prefix(first, second) == expected


def test_a_prompt_is_read_in_pieces_and_the_last_token_is_fed():
    backend = ToyBackend()
    caches = PromptCaches(speaker_of(backend))
    assert answer(caches, [*range(10, 20)], 3) == [20, 21, 22]
    assert backend.calls == [4, 4, 1, 1, 1, 1]
    (held,) = caches.stored
    assert held.tokens == held.cache.tokens == [*range(10, 22)], "the last token is not in the cache yet"


def test_a_second_turn_reads_what_is_new():
    backend = ToyBackend()
    caches = PromptCaches(speaker_of(backend))
    answer(caches, [1, 2, 3, 4, 5, 6], 2)
    backend.calls.clear()
    assert answer(caches, [1, 2, 3, 4, 5, 6, 7, 50], 1) == [51]
    assert sum(backend.calls) == 1 and [held.tokens for held in caches.stored] == [[1, 2, 3, 4, 5, 6, 7, 50]]


def test_two_go_on_from_one_cache():
    """Which stays as it is while there is room."""
    backend = ToyBackend()
    caches = PromptCaches(speaker_of(backend))
    answer(caches, [1, 2, 3, 4, 5, 6], 1)
    before = list(caches.stored[0].cache.tokens)
    held = [caches.begin([*before, token]) for token in (60, 70)]
    assert [one.tokens for one in held] == [before, before] and len({id(one.cache) for one in held}) == 2
    assert caches.stored[0].cache.tokens == before
    for one in held:
        caches.end(one)


def test_a_cache_that_cannot_forget_is_kept_as_it_was_after_the_prompt():
    """So that a turn whose answer was rewritten goes on from there; another prompt begins anew."""
    backend = ToyBackend(crops=False)
    caches = PromptCaches(speaker_of(backend))
    answer(caches, [1, 2, 3, 4, 5, 6], 3)
    assert [held.cache.tokens for held in caches.stored] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8]]
    backend.calls.clear()
    assert answer(caches, [1, 2, 3, 4, 5, 6, 7, 50, 51], 1) == [52] and sum(backend.calls) == 3
    assert answer(caches, [1, 2, 3, 9, 9, 30], 1) == [31]
    assert caches.stored[-1].cache.tokens == [1, 2, 3, 9, 9, 30]
    full = PromptCaches(speaker_of(backend), limit=90)
    assert answer(full, [1, 2, 3, 4, 5, 6], 2) == [7, 8] and len(full.stored) == 1


def test_a_call_that_ends_halfway_breaks_the_cache():
    backend = ToyBackend()
    held = Conversation(speaker_of(backend), ToyCache())
    read = backend.read

    def fails(model, tokens, cache):
        read(model, tokens, cache)
        raise KeyboardInterrupt

    backend.read = fails
    with pytest.raises(KeyboardInterrupt):
        list(held.answer([1, 2, 3], Sampler(), lambda held, tokens: tokens))
    backend.read = read
    assert held.broken and next(held.answer([1, 2, 3], Sampler(), lambda held, tokens: tokens)) is Event.READ
    assert held.cache.tokens == [1, 2]


def test_stored_caches_go_before_the_limit_is_passed():
    """The oldest first; what does not fit alone ends."""
    backend = ToyBackend()
    caches = PromptCaches(speaker_of(backend), limit=200)
    for start in (10, 30, 50):
        answer(caches, [*range(start, start + 7)], 2)
    assert [held.tokens[0] for held in caches.stored] == [30, 50]
    assert answer(caches, [*range(60, 75)], 9) == [75, 76, 77, 78, 79, 80, Event.FULL]
    assert caches.most_nbytes <= 200
    assert answer(caches, [*range(1, 40)], 1) == [Event.FULL]
    assert answer(caches, [5], 2) == [6, 7]


def test_no_more_caches_are_kept_than_asked_for():
    caches = PromptCaches(speaker_of(ToyBackend()), most=2)
    for start in (10, 30, 50):
        answer(caches, [*range(start, start + 7)], 2)
    assert [held.tokens[0] for held in caches.stored] == [30, 50]
    nothing = PromptCaches(speaker_of(ToyBackend()), most=0)
    answer(nothing, [1, 2, 3], 2)
    assert not nothing.stored and not nothing.active


# --- sampling


def test_what_is_drawn_follows_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert Sampler()(logits) == 0
    draw = Sampler(1.0, seed=0)
    shares = np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    draw = Sampler(1.0, 0.7, seed=0)
    shares = np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)
    draw = Sampler(0.5, seed=0)
    weights = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    shares = np.bincount([draw(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.03)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}])
def test_samplers_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampler(**options)


# --- texts that stop


class Letters:
    """A text stream of letters, of which the last waits until the end."""

    def token(self, token: int) -> str:
        return chr(token)

    def end(self) -> str:
        return "!"


@pytest.mark.parametrize(
    "text, stops, shown, stopped",
    [
        ("abcdef", (), "abcdef!", False),
        ("abcdef", ("cd",), "ab", True),
        ("abcdef", ("xy", "de", "bc"), "a", True),
        ("abcab", ("abd",), "abcab!", False),
        ("aaab", ("aab",), "a", True),
        ("abc", ("c!",), "ab", True),
    ],
)
def test_text_ends_before_a_stop(text, stops, shown, stopped):
    """Whatever was shown stays shown: the beginning of a stop waits."""
    found = StoppingText(Letters(), stops)
    pieces = []
    for letter in text:
        pieces.append(found.token(ord(letter)))
        if found.stopped:
            break
    pieces.append(found.end())
    assert "".join(pieces) == shown and found.stopped == stopped


# --- requests


def completion(kind: str = "chat", **fields):
    given = ({"messages": HI} if kind == "chat" else {"prompt": "Hi"}) | fields
    return completion_of(given, kind, 7, 0.5, 0.9)


def test_what_a_request_says_and_leaves_out():
    assert (completion().most, completion().temperature, completion().top_p) == (7, 0.5, 0.9)
    told = completion(max_tokens=3, temperature=0, stop="x", stream=True, stream_options={"include_usage": True}, n=1)
    assert (told.most, told.temperature, told.stops, told.stream, told.tells_usage) == (3, 0, ("x",), True, True)
    assert completion(max_completion_tokens=2, max_tokens=3).most == 2 and completion(stop=None, user="me").stops == ()
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert completion(messages=parts).messages == [{"role": "user", "content": "ab"}]
    assert completion("text", prompt=["Hi"]).prompt == "Hi" and completion("text", prompt=[[3, 4]]).prompt == [3, 4]


@pytest.mark.parametrize(
    "kind, fields, param",
    [
        ("chat", {"n": 2}, "n"),
        ("chat", {"tools": [{}]}, "tools"),
        ("chat", {"logprobs": True}, "logprobs"),
        ("chat", {"max_tokens": True}, "max_tokens"),
        ("chat", {"max_tokens": 1.5}, "max_tokens"),
        ("chat", {"temperature": float("inf")}, "temperature"),
        ("chat", {"seed": 2**70}, "seed"),
        ("chat", {"stop": [""]}, "stop"),
        ("chat", {"stop": ["x"] * 17}, "stop"),
        ("chat", {"stream": 1}, "stream"),
        ("chat", {"stream_options": 3}, "stream_options"),
        ("chat", {"prompt": "Hi"}, "prompt"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ("text", {"prompt": None}, "prompt"),
        ("text", {"prompt": ["a", "b"]}, "prompt"),
        ("text", {"prompt": [True]}, "prompt"),
        ("text", {"echo": True}, "echo"),
    ],
)
def test_requests_that_are_refused(kind, fields, param):
    with pytest.raises(RequestError) as error:
        completion(kind, **fields)
    assert error.value.status == 400 and error.value.body()["error"]["param"] == param
    assert error.value.body()["error"]["type"] == "invalid_request_error"


def test_a_body_is_not_read_beyond_its_bound():
    headers = Message()
    headers["Content-Type"] = "application/json"
    headers["Content-Length"] = str(MOST_BODY + 1)
    unread = SimpleNamespace(read=lambda size: pytest.fail("read"))
    with pytest.raises(RequestError) as error:
        read_body(headers, unread)
    assert error.value.status == 413
    headers.replace_header("Content-Length", "13")
    assert read_body(headers, io.BytesIO(b'{"a": [1, 2]}xyz'))[1] == {"a": [1, 2]}


@pytest.mark.parametrize("options", [{"port": -1}, {"most_tokens": 0}, {"concurrency": 0}, {"stored": -1}])
def test_settings_that_no_server_has(options):
    with pytest.raises(UsageError, match="of at least"):
        Settings("model", ("model",), lambda tokenizer: None, **options)

"""Requests of OpenAI's API: what is read of them, and what is said of those that cannot be answered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..hosts.chat_template import checked_text

MOST_BODY = 16 * 2**20  # bytes of a request
MOST_STOPS = 16
KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "text"}  # by path
UNUSED = {  # change no answer here
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity",
}  # fmt: skip
NEUTRAL: dict[str, tuple] = {  # what would change an answer, and the values that ask for nothing
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "echo": (None, False),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
}


class RequestError(Exception):
    """Why a request is not answered, as OpenAI's API says it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        """status: of HTTP. param: the field that is wrong."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        """The JSON object that a client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def no_room(limit: int, alone: bool) -> RequestError:
    """Why a prompt is not read: there is no room within `limit` bytes, for it `alone` or beside others."""
    if alone:
        told = f"Expected a conversation within the memory limit of {limit:,} bytes, its prompt needs more."
        return RequestError(400, told, code="memory_limit")
    told = "The memory limit leaves no room for one more conversation now. Ask again later."
    return RequestError(503, told, code="memory_limit")


@dataclass(frozen=True)
class Completion:
    """What is asked for. messages: of a chat, else None; prompt: text, or token ids; most: tokens of the answer at most."""

    messages: list[dict] | None
    prompt: str | list[int] | None
    most: int
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    tells_usage: bool


def read_body(headers, stream: Any) -> tuple[bytes, dict]:
    """The body of a request and the JSON object in it; raises RequestError for anything else.

    A page of another origin may send text unasked, but not JSON.
    """
    if headers.get_content_type() != "application/json":
        raise RequestError(415, "Expected the content type application/json.")
    told = headers.get("Content-Length")
    if told is None:
        raise RequestError(411, "Expected a Content-Length.")
    if not (told.isascii() and told.isdigit()):
        raise RequestError(400, "Expected a Content-Length in bytes.")
    if len(told) > 12 or int(told) > MOST_BODY:
        raise RequestError(413, f"Expected a body of at most {MOST_BODY:,} bytes.")
    data = stream.read(int(told))
    try:
        body = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise RequestError(400, "Expected a body of JSON.") from None
    if not isinstance(body, dict):
        raise RequestError(400, "Expected a JSON object.")
    return data, body


def check_model(body: dict, names: Sequence[str]) -> None:
    """Raise RequestError for another model than the one that is served, which has several `names`."""
    asked = body.get("model")
    if asked is not None and asked not in names:
        shown = asked[:200] if isinstance(asked, str) else type(asked).__name__
        raise RequestError(404, f"Expected the model {names[0]!r}, received {shown!r}.", "model", "model_not_found")


def check_messages(messages: Any) -> list[dict]:
    """Messages with a role and a text, in which several parts are joined; raises RequestError for others."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "Expected a list of messages, one or more.", "messages")
    found = []
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(400, "Expected a message to be an object with a role.", param)
        content = message.get("content")
        if isinstance(content, list):
            texts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]
        if not isinstance(content, str):
            raise RequestError(400, "Expected a message to have text as its content, and nothing else.", param)
        found.append({"role": message["role"], "content": _text(content, param)})
    return found


def completion_of(body: dict, kind: str, most: int, temperature: float, top_p: float) -> Completion:
    """What `body` asks for; `most`, `temperature` and `top_p` where it does not say. Raises RequestError for what is wrong."""
    _check_fields(body, kind)
    names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(x, str) and x for x in stops):
        raise RequestError(400, f"Expected a text to stop at, or a list of at most {MOST_STOPS}.", "stop")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise RequestError(400, "Expected an object.", "stream_options")
    return Completion(
        messages=check_messages(body.get("messages")) if kind == "chat" else None,
        prompt=None if kind == "chat" else _prompt(body.get("prompt")),
        most=_number(body, names[0], int, lambda x: x >= 1, "a whole number of 1 or more", most) if names else most,
        temperature=_number(
            body, "temperature", float, lambda x: 0 <= x <= 100, "a number between 0 and 100", temperature
        ),
        top_p=_number(body, "top_p", float, lambda x: 0 < x <= 1, "a number above 0, at most 1", top_p),
        seed=_number(body, "seed", int, lambda x: abs(x) < 2**63, "a whole number", None),
        stops=tuple(stops),
        stream=_flag(body, "stream"),
        tells_usage=_flag(options or {}, "include_usage"),
    )


def _check_fields(body: dict, kind: str) -> None:
    known = {
        "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options",
        "messages" if kind == "chat" else "prompt",
    }  # fmt: skip
    for name, value in body.items():
        if name in known or name in UNUSED or (name in NEUTRAL and any(value == x for x in NEUTRAL[name])):
            continue
        raise RequestError(400, "Expected no such field, or no such value: this server does not have it.", name[:200])


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    numbers = isinstance(prompt, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in prompt)
    if not prompt or not (isinstance(prompt, str) or numbers):
        raise RequestError(400, "Expected one prompt: a text, or a list of token ids.", "prompt")
    return _text(prompt, "prompt") if isinstance(prompt, str) else prompt


def _text(text: str, param: str) -> str:
    try:
        return checked_text(text)
    except UsageError as error:
        raise RequestError(400, str(error), param) from None


def _number(body: dict, name: str, kind: type, allowed: Callable, what: str, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    right = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not right or not allowed(value):
        raise RequestError(400, f"Expected {what}.", name)
    return value


def _flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        raise RequestError(400, "Expected true or false.", name)
    return bool(value)

"""A server of OpenAI's API on Python's own `http.server`: models, chats and completions, whole or as a stream of events."""

from __future__ import annotations

import json
import logging
import select
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from ..errors import UsageError
from ..hosts.chat_template import encode_messages, has_template
from .requests import KINDS, Completion, RequestError, check_model, completion_of, read_body
from .settings import Settings
from .worker import End, Job, Worker

log = logging.getLogger("spectralkv")
READ_SECONDS = 60  # for a client to send its request
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ELSEWHERE = RequestError(403, "Expected a request to 127.0.0.1 or localhost by that name.")
LOOK = 0.2  # seconds between two looks at whether the client is still there


class Server(ThreadingHTTPServer):
    """A server whose clients see no traceback, and whose log has a line for what goes wrong with them."""

    daemon_threads = True
    request_queue_size = 64
    failure: Callable[[], Exception | None] = staticmethod(lambda: None)  # what has ended the thread that answers

    def service_actions(self) -> None:
        """End with the thread that answers."""
        if (error := self.failure()) is not None:
            raise error

    def handle_error(self, request, client_address) -> None:
        """Log a line; a client that has gone is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            log.error("A request failed: %s: %s", type(error).__name__, str(error)[:500])

    @property
    def url(self) -> str:
        """Where clients find the API."""
        host, port = self.server_address[:2]
        name = str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"


def listen(server_class: type[Server], settings: Settings, handler) -> Any:
    """A server of `server_class` that listens; raises UsageError where that is not possible."""
    host, port = settings.host, settings.port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = type(server_class.__name__, (server_class,), {"address_family": family})
        return bound(address[:2], handler)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"Expected an address that is free for --host and --port, {host} {port} is none: {error}."
        ) from None


class JsonHandler(BaseHTTPRequestHandler):
    """What any server of the API does with a request: GET here, errors as JSON. `names` are those of the model."""

    timeout = READ_SECONDS
    server_version, sys_version = "spectralkv", ""

    def __init__(self, names: Sequence[str], *args):
        self.names, self.created = list(names), int(time.time())
        super().__init__(*args)

    def log_message(self, format: str, *args) -> None:
        """The worker's line says more."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `http.server` itself refuses, as JSON too."""
        self.close_connection = True
        self.refuse(RequestError(code, message or "This request cannot be read."))

    def do_GET(self) -> None:
        """The model that is served, and whether all is well."""
        path = unquote(self.path.split("?")[0].rstrip("/"))
        name = path.removeprefix("/v1/models/")
        if not self.is_from_here():
            self.refuse(ELSEWHERE)
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [self.model()]})
        elif name in self.names and name != path:
            self.send_json(200, self.model())
        elif path == "/health":
            self.send_json(200, {"status": "ok"})
        else:
            self.refuse(RequestError(404, "Expected /v1/models, /v1/chat/completions or /v1/completions."))

    def model(self) -> dict:
        return {"id": self.names[0], "object": "model", "created": self.created, "owned_by": "spectralkv"}

    def is_from_here(self) -> bool:
        """Whether the request names the address that is bound, where that is this machine alone.

        A page elsewhere may give its own name the address of this machine, and would then count as of the same origin.
        """
        bound = str(cast(tuple, self.server.server_address)[0])
        if bound not in LOOPBACK:
            return True
        named = urlsplit(f"//{self.headers.get('Host', bound)}").hostname
        return named in LOOPBACK

    def kind(self) -> str:
        """What the path asks for; raises RequestError for no such path, and for a request from elsewhere."""
        if not self.is_from_here():
            raise ELSEWHERE
        kind = KINDS.get(self.path.split("?")[0])
        if kind is None:
            raise RequestError(404, "Expected /v1/models, /v1/chat/completions or /v1/completions.")
        return kind

    def refuse(self, error: RequestError) -> None:
        """Answer with an error."""
        with suppress(OSError):
            self.send_json(error.status, error.body())

    def send_json(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable, *_ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


class Handler(JsonHandler):
    """One request to `worker`."""

    def __init__(self, settings: Settings, worker: Worker, encoding: threading.Lock, *args):
        """encoding: held by whoever uses the tokenizer, which is not made for threads."""
        self.settings, self.worker, self.encoding = settings, worker, encoding
        super().__init__(settings.names, *args)

    def do_POST(self) -> None:
        """A completion."""
        try:
            kind = self.kind()
            _, body = read_body(self.headers, self.rfile)
            check_model(body, self.names)
            settings = self.settings
            asked = completion_of(body, kind, settings.most_tokens, settings.temperature, settings.top_p)
            job = self.submit(asked)
        except RequestError as error:
            self.refuse(error)
            return
        except OSError:  # the client has gone, or is too slow
            self.close_connection = True
            return
        except Exception as error:
            log.error("A request failed: %s: %s", type(error).__name__, str(error)[:500])
            self.refuse(RequestError(500, "The request failed. The log of the server says why."))
            return
        try:
            (self.stream if asked.stream else self.whole)(job, Shape(kind, self.names[0]))
        finally:
            job.cancelled.set()

    def submit(self, asked: Completion) -> Job:
        """Hand a request to the worker; raises RequestError for a prompt that is not possible."""
        prompt = self.encode(asked)
        backend, model = self.worker.speaker.backend, self.worker.speaker.model
        limit = backend.context_limit(model)
        if limit and len(prompt) >= limit:
            raise RequestError(
                400,
                f"Expected fewer than {limit:,} tokens, the model's context, received {len(prompt):,}.",
                "messages" if asked.messages is not None else "prompt",
                "context_length_exceeded",
            )
        host, port = self.client_address[:2]
        job = Job(asked, prompt, f"{host}:{port} {self.path.split('?')[0]}")
        self.worker.waiting.put(job)
        return job

    def encode(self, asked: Completion) -> list[int]:
        """The prompt as tokens; raises RequestError where the template or the vocabulary does not take it."""
        tokenizer = self.worker.speaker.tokenizer
        with self.encoding:
            if asked.messages is not None:
                if not has_template(tokenizer):
                    raise RequestError(400, "Expected a prompt: this model has no chat template.", "messages")
                try:
                    return encode_messages(tokenizer, asked.messages)
                except Exception as error:  # whatever the template's code raises
                    told = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                    raise RequestError(400, f"The chat template refuses these messages: {told}", "messages") from None
            if isinstance(asked.prompt, str):
                tokens = list(tokenizer.encode(asked.prompt))
            else:
                tokens = list(asked.prompt or [])
            if not tokens or not all(0 <= token < self.settings.vocabulary for token in tokens):
                raise RequestError(400, "Expected tokens of the vocabulary, one or more.", "prompt")
            return tokens

    def events(self, job: Job) -> Iterator[str | End]:
        """What the worker says, until the end; ends early where the client has gone. Raises RequestError."""
        while True:
            event = None
            with suppress(Empty):
                event = job.events.get(timeout=LOOK)
            if self.is_gone() or not (event or self.worker.is_alive()):
                return
            if event is None:
                continue
            if isinstance(event, RequestError):
                raise event
            yield event
            if isinstance(event, End):
                return

    def whole(self, job: Job, shape: Shape) -> None:
        """Answer at once."""
        texts: list[str] = []
        try:
            for event in self.events(job):
                if isinstance(event, End):
                    self.send_json(200, shape.whole("".join(texts), event.reason) | {"usage": job.usage()})
                else:
                    texts.append(event)
        except RequestError as error:
            self.refuse(error)

    def stream(self, job: Job, shape: Shape) -> None:
        """Answer by server-sent events; what fails before the first is an error as ever, later an event."""
        begun = False
        try:
            for event in self.events(job):
                if not begun:
                    self.begin_stream()
                    self.send_event(shape.first())
                    begun = True
                if isinstance(event, End):
                    self.send_event(shape.piece("", event.reason))
                    if job.asked.tells_usage:
                        self.send_event(shape.piece(None) | {"usage": job.usage()})
                    self.wfile.write(b"data: [DONE]\n\n")
                elif event:
                    self.send_event(shape.piece(event))
        except RequestError as error:
            self.send_event(error.body()) if begun else self.refuse(error)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()

    def send_event(self, body: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")


class Shape:
    """The objects of an answer: of a chat or of a completion of text."""

    def __init__(self, kind: str, model: str):
        self.chat = kind == "chat"
        self.base = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str) -> dict:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._object([said | {"index": 0, "logprobs": None, "finish_reason": reason}])

    def first(self) -> dict:
        """What a stream begins with."""
        return self.piece("", role={"role": "assistant"})

    def piece(self, text: str | None, reason: str | None = None, role: dict | None = None) -> dict:
        """More text; None is no choice at all."""
        if text is None:
            return self._object([], stream=True)
        said = {"delta": (role or {}) | ({"content": text} if text or role else {})} if self.chat else {"text": text}
        return self._object([said | {"index": 0, "logprobs": None, "finish_reason": reason}], stream=True)

    def _object(self, choices: list[dict], stream: bool = False) -> dict:
        kind = f"chat.completion{'.chunk' if stream else ''}" if self.chat else "text_completion"
        return self.base | {"object": kind, "choices": choices}

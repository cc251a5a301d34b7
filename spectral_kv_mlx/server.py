"""mlx-lm's own server with compressed caches: what is replaced in it.

`serve` runs it for one model, with continuous batches, behind the checks that the other backend's server has too.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import mlx_lm.server
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import _download, load_config

from spectral_kv_core.errors import UsageError
from spectral_kv_core.serving.http_server import JsonHandler, Server, listen
from spectral_kv_core.serving.requests import RequestError, check_model, completion_of, read_body
from spectral_kv_core.serving.settings import Settings

from .bounded import BoundedBatches, StoredPrompts
from .generation import build_cache, context_limit, load_model

log = logging.getLogger("spectralkv")
ENDING = 0.5  # seconds that a thread may take to end
LOADING = 0.02  # seconds between two looks at whether the model is there
FIELDS = {  # what mlx-lm's server reads beside the fields that every server of ours does
    "tools", "tool_choice", "top_k", "min_p", "repetition_penalty", "repetition_context_size", "presence_penalty",
    "presence_context_size", "frequency_penalty", "frequency_context_size", "xtc_probability", "xtc_threshold", "logit_bias",
    "logprobs", "top_logprobs", "chat_template_kwargs",
}  # fmt: skip


@contextmanager
def replaced(places: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Put values in `places`, by owner and name, for a while."""
    with ExitStack() as stack:
        for (owner, name), value in places.items():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


class Responses(mlx_lm.server.ResponseGenerator):
    """mlx-lm's, which keeps what ended its thread, and refuses prompts that are longer than the model's context."""

    failure: Exception | None = None
    queue: Queue | None = None  # of the request that was read last

    def stop_and_join(self) -> None:
        """As mlx-lm has it, and until the operating system's thread is gone.

        Python's part of a thread ends first. MLX then frees what belongs to it, and aborts a process that ends meanwhile.
        """
        super().stop_and_join()
        task = Path(f"/proc/self/task/{self._generation_thread.native_id}")
        last = time.monotonic() + ENDING
        while time.monotonic() < last and (task.exists() or not task.parent.exists()):
            time.sleep(LOADING)

    def _run_generate(self) -> None:
        try:
            self._generate()
        except Exception as error:
            self.failure, self._generation_failed = error, True

    def _next_request(self, timeout: float | None = None) -> tuple | None:
        found = super()._next_request(timeout)
        if found is not None:
            found[1].queue = found[0]
        return found

    def _tokenize(self, tokenizer, request, args) -> tuple:
        self.queue = request.queue
        found = super()._tokenize(tokenizer, request, args)
        limit = context_limit(self.model_provider.model)
        if limit and len(found[0]) >= limit:
            raise RequestError(
                400,
                f"Expected fewer than {limit:,} tokens, the model's context, received {len(found[0]):,}.",
                code="context_length_exceeded",
            )
        return found


def places(module: ModuleType) -> dict[tuple[Any, str], Any]:
    """Every name of mlx-lm's module `server` that is replaced for its own command, and by what."""
    run_http = module._run_http_server

    def run_until_failure(host: str, port: int, responses: Responses) -> None:
        class Failing(ThreadingHTTPServer):
            def service_actions(self) -> None:
                if responses.failure is not None:
                    raise responses.failure

        try:
            run_http(host, port, responses, server_class=Failing)
        finally:
            responses.stop_and_join()

    return {
        (logging.getLogger(), "handlers"): [],  # else mlx-lm's own log goes nowhere
        (module, "LRUPromptCache"): StoredPrompts,
        (module, "ResponseGenerator"): Responses,
        (module, "_run_http_server"): run_until_failure,
    }


class Handler(JsonHandler, mlx_lm.server.APIHandler):
    """mlx-lm's, behind our checks, and with errors as OpenAI's API has them."""

    streams = False

    def __init__(self, names: Sequence[str], responses: Responses, *args):
        super().__init__(names, responses, *args)

    def do_POST(self) -> None:
        """A completion by mlx-lm's server."""
        try:
            body = self.checked(self.kind())
            data = json.dumps(body).encode()
            self.rfile = BytesIO(data)
            self.headers.replace_header("Content-Length", str(len(data)))
            self.path = self.path.split("?")[0]
            self.response_generator = WhileThere(self.response_generator, self.is_gone)
            mlx_lm.server.APIHandler.do_POST(self)
        except RequestError as error:
            self.give_up(error)
        except OSError:  # the client has gone
            self.close_connection = True
        except Exception as error:
            log.error("A request failed: %s: %s", type(error).__name__, str(error)[:500])
            self.give_up(RequestError(500, "The answer failed. The log of the server says why."))

    def checked(self, kind: str) -> dict:
        """The body of the request; raises RequestError for what is not served."""
        _, body = read_body(self.headers, self.rfile)
        check_model(body, self.names)
        given = self.response_generator.cli_args
        ours = {name: value for name, value in body.items() if name not in FIELDS}
        asked = completion_of(ours, kind, given.max_tokens, given.temp, given.top_p)
        if kind == "text" and not isinstance(asked.prompt, str):
            raise RequestError(400, "Expected one prompt: a text.", "prompt")
        if asked.seed is not None and asked.temperature:
            raise RequestError(400, "Expected no seed: answers are drawn in batches here.", "seed")
        return {name: value for name, value in body.items() if value is not None and name != "seed"} | {
            "model": self.names[0]
        }

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """As mlx-lm has it; of an error our own headers and body are sent."""
        if status_code < 400:
            super()._set_completion_headers(status_code)
            return
        error = sys.exc_info()[1]
        if isinstance(error, RequestError):
            raise error
        if isinstance(error, (ValueError, AssertionError)):
            raise RequestError(400, str(error).splitlines()[0][:500] if str(error) else "Expected another request.")
        raise error if error is not None else RequestError(status_code, "This request cannot be answered.")

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self.streams = True
        super()._set_stream_headers(status_code)

    def give_up(self, error: RequestError) -> None:
        """Answer with an error, as an event where events have been sent."""
        if not self.streams:
            self._headers_buffer = []
            self.refuse(error)
            return
        try:
            self.wfile.write(f"data: {json.dumps(error.body())}\n\n".encode())
        except OSError:
            self.close_connection = True


class WhileThere:
    """A `Responses` for one client: its answer ends where the client has gone."""

    def __init__(self, responses: Responses, is_gone: Callable[[], bool]):
        self._responses, self._is_gone = responses, is_gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._responses, name)

    def generate(self, *args, **options):
        """As mlx-lm has it."""
        context, answers = self._responses.generate(*args, **options)
        return context, self._watched(answers)

    def _watched(self, answers: Iterator) -> Iterator:
        for answer in answers:
            if self._is_gone():
                raise ConnectionAbortedError
            yield answer


def serve(settings: Settings, ready: Callable[[Any], None]) -> None:
    """Serve the model of `settings` by mlx-lm's server until Ctrl-C; `ready` is given the HTTP server once it listens.

    Raises UsageError for caches that the model cannot have, and for an address that is taken.
    """
    module = mlx_lm.server
    given = {
        "--model": settings.model,
        "--host": settings.host,
        "--port": settings.port,
        "--allowed-origins": "",
        "--temp": settings.temperature,
        "--top-p": settings.top_p,
        "--max-tokens": settings.most_tokens,
        "--decode-concurrency": settings.concurrency,
        "--prompt-concurrency": settings.concurrency,
        "--prompt-cache-size": settings.stored,
        "--log-level": "WARNING",
    }
    arguments = [f"{option}={value}" for option, value in given.items()]
    run = partial(_run, settings, ready)
    with replaced(
        {(sys, "argv"): ["mlx_lm.server", *arguments], (module, "run"): run, (module, "load"): _loaded(settings)}
    ):
        module.main()


def _loaded(settings: Settings) -> Callable[..., tuple]:
    """What loads the model in place of mlx-lm: as this backend does, and so that it makes our caches."""

    def load(name: str, **options) -> tuple:
        model, tokenizer = load_model(settings.model, settings.dtype)
        request = settings.request_for(tokenizer)

        def make_cache() -> list:
            return build_cache(model, settings.profile, request, tokenizer)

        if settings.memory_limit is not None and not all(hasattr(layer, "merge") for layer in make_cache()):
            raise UsageError(
                "Expected layers that mlx-lm batches for --memory-limit, this model has others. Leave the limit out."
            )
        model.make_cache = make_cache
        return model, tokenizer, load_config(_download(settings.model))

    return load


def _run(settings: Settings, ready: Callable[[Any], None], host: str, port: int, provider) -> None:
    """What mlx-lm's `run` does, with our stored prompts, batches and handler."""
    provider._model_map |= dict.fromkeys(settings.names, settings.model)
    limit = settings.memory_limit
    stored = StoredPrompts(settings.stored, limit=limit)
    known: list[Responses] = []
    batches = BatchGenerator
    if limit is not None:
        batches = partial(BoundedBatches, stored=stored, responses=lambda: known[0])
    with replaced({(mlx_lm.server, "BatchGenerator"): batches}):
        responses = Responses(provider, stored)
        known.append(responses)
        try:
            while provider.model is None and responses.failure is None:
                time.sleep(LOADING)
            if responses.failure is not None:
                raise responses.failure
            server = listen(Server, settings, partial(Handler, settings.names, responses))
            server.failure = lambda: responses.failure
            with server:
                ready(server)
                server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            responses.stop_and_join()

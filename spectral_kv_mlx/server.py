"""mlx-lm's own server with compressed caches: what is replaced in it, and what its log says of every conversation.

`serve` runs it for one model, with continuous batches, behind the checks that the other backend's server has too.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm.server
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.utils import _download, load_config

from spectral_kv_core.errors import UsageError
from spectral_kv_core.serving.http_server import JsonHandler, Server, listen
from spectral_kv_core.serving.requests import RequestError, check_model, completion_of, no_room, read_body
from spectral_kv_core.serving.settings import Settings

from .generation import build_cache, cache_nbytes, context_limit, load_model, token_nbytes

log = logging.getLogger("spectralkv")
REMEMBERED = 256  # prompts whose answer may still come
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


class StoredPrompts(LRUPromptCache):
    """mlx-lm's stored prompts; the log says of every answer how many tokens were reused, and what the cache holds."""

    def __init__(self, *args, limit: int | None = None, **options):
        """limit: bytes of these and of what is `active`, a batch that goes on."""
        super().__init__(*args, **options)
        self.limit, self.active = limit, None
        self.waiting: deque[tuple[list[int], int]] = deque(maxlen=REMEMBERED)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list | None, list[int]]:
        """As mlx-lm has it."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        self.waiting.append((list(tokens), len(tokens) - len(rest)))
        return cache, rest

    def insert_cache(self, model: Any, tokens: Sequence[int], prompt_cache: list, *, cache_type: str = "assistant"):
        """As mlx-lm has it."""
        self.tell(list(tokens), prompt_cache)
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        self.make_room(0)

    def make_room(self, nbytes: int) -> None:
        """Drop what was used longest ago until so many bytes are free within the limit, or nothing is left."""
        if self.limit is not None:
            active = 0 if self.active is None else self.active.prompt_cache_nbytes
            self.trim_to(n_bytes=self.limit - active - nbytes)

    def tell(self, tokens: list[int], cache: list) -> None:
        """Log a line about the answer that ends in `tokens`, if it is one."""
        found = next((known for known in self.waiting if tokens[: len(known[0])] == known[0]), None)
        if found is None:  # what a prompt begins with
            return
        self.waiting.remove(found)
        prompt, reused = found
        log.info(
            "%d tokens, %d of them of the prompt, %d reused: %s",
            len(tokens),
            len(prompt),
            reused,
            cache_nbytes(cache).described(),
        )


class BoundedBatches(BatchGenerator):
    """mlx-lm's batches within a limit of bytes.

    Before a step there is room for what it may add at most: stored prompts go for it, pieces of prompts get shorter, and
    prompts wait. Where an answer has no room it ends, as by its length. Where a prompt has none, and nobody is left who
    could make some, it is refused.
    """

    def __init__(self, model, *, stored: StoredPrompts, responses: Callable[[], Responses], **options):
        super().__init__(model, **options)
        self.stored, self.responses, self.limit = stored, responses, stored.limit
        self.token_nbytes, self.step = token_nbytes(model), self.prefill_step_size
        self.queues: dict[int, Queue] = {}
        self.refused: set[int] = set()
        stored.active = self

    def insert_segments(self, *args, **options) -> list[int]:
        """As mlx-lm has it; whoever waits for the answer is known from now on."""
        uids = super().insert_segments(*args, **options)
        self.queues |= dict.fromkeys(uids, self.responses().queue)
        return uids

    def remove(self, uids, **options):
        """As mlx-lm has it."""
        for uid in uids:
            self.queues.pop(uid, None)
            self.refused.discard(uid)
        return super().remove(uids, **options)

    def next(self) -> tuple[list, list]:
        """As mlx-lm has it."""
        reading = self._reading()
        free = self._free(sum(wanted for _, wanted in reading))
        if reading and free < len(reading):
            if not len(self._generation_batch):
                return self._refuse(reading[-1][0]), []
            with mx.stream(self._stream):
                answers = self._generation_batch.next()
            return [], self._end_some(answers)
        if reading:
            self.prefill_step_size = min(self.step, free // len(reading))
        prompts, answers = super().next()
        return prompts, self._end_some(answers)

    def _reading(self) -> list[tuple[int, int]]:
        """Sequences that the next step reads a piece of, the youngest last, and how many tokens that may be."""
        begun = [
            (uid, min(len(segments[0]), self.step))
            for uid, (segments, *_) in zip(self._prompt_batch.uids, self._currently_processing)
            if len(segments) > 1 or len(segments[0]) > 1
        ]
        places = min(
            self.prefill_batch_size - len(self._prompt_batch), self.completion_batch_size - len(self._generation_batch)
        )
        waiting = list(self._unprocessed_sequences)[: max(places, 0)]
        return begun + [(sequence[0], min(len(sequence[1][0]), self.step)) for sequence in waiting]

    def _free(self, wanted: int) -> int:
        """Tokens that there is room for, beside those of answers; stored prompts go for `wanted` ones."""
        answering = 2 * (len(self._generation_batch) + len(self._prompt_batch)) * self.token_nbytes
        self.stored.make_room(answering + wanted * self.token_nbytes)
        free = self.limit - self.stored.nbytes - self.prompt_cache_nbytes - answering
        return max(free, 0) // self.token_nbytes

    def _refuse(self, uid: int) -> list:
        """Tell whoever waits for `uid` that there is no room. The sequence leaves when they have gone."""
        if uid not in self.refused:
            self.refused.add(uid)
            alone = len(self._prompt_batch) + len(self._unprocessed_sequences) == 1
            self.queues[uid].put(no_room(self.limit, alone))
        time.sleep(LOADING)
        return [PromptProcessingBatch.Response(uid, (0, 1), False, False)]

    def _end_some(self, answers: list) -> list:
        """`answers`, of which the youngest end now where the next step has no room for them."""
        for answer in reversed(answers):
            self._free(0)
            needed = 2 * len(self._generation_batch) * self.token_nbytes
            if self.prompt_cache_nbytes + needed <= self.limit:
                break
            if answer.finish_reason is None:
                with mx.stream(self._stream):
                    cache, tokens = self.extract_cache([answer.uid])[answer.uid]
                    self.remove([answer.uid])
                answer.finish_reason, answer.prompt_cache, answer.all_tokens = "length", cache, tokens
        for answer in answers:
            if answer.finish_reason is not None:
                self.queues.pop(answer.uid, None)
        return answers


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

"""mlx-lm's own server with compressed caches: what is replaced in it, and what its log says of every conversation."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from types import ModuleType
from typing import Any

from mlx_lm.models.cache import LRUPromptCache

from .generation import cache_nbytes

log = logging.getLogger("spectralkv")
REMEMBERED = 256  # prompts whose answer may still come


def places(module: ModuleType) -> dict[tuple[Any, str], Any]:
    """Every name of mlx-lm's module `server` that is replaced, and by what."""
    run_http = module._run_http_server

    class Responses(module.ResponseGenerator):
        """mlx-lm's, which keeps what ended its thread."""

        failure: Exception | None = None

        def _run_generate(self) -> None:
            try:
                self._generate()
            except Exception as error:
                self.failure, self._generation_failed = error, True

    def run_until_failure(host: str, port: int, responses: Responses) -> None:
        class Server(ThreadingHTTPServer):
            def service_actions(self) -> None:
                if responses.failure is not None:
                    raise responses.failure

        try:
            run_http(host, port, responses, server_class=Server)
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

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
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

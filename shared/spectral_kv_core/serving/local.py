"""A server over a backend's own steps, for a host that has none that takes our caches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from .conversation import Speaker
from .http_server import Handler, Server, listen
from .prompt_caches import PromptCaches
from .settings import Settings
from .worker import Worker


def serve(backend: ModuleType, settings: Settings, ready: Callable[[Any], None]) -> None:
    """Serve the model of `settings` until Ctrl-C; `ready` is given the server once it listens.

    Raises UsageError for caches that the model cannot have, and for an address that is taken.
    """
    model, tokenizer = backend.load_model(settings.model, settings.dtype)
    request = settings.request_for(tokenizer)

    def new_cache():
        return backend.build_cache(model, settings.profile, request, tokenizer)

    new_cache()  # what it needs is made now, and wrong bits are told
    speaker = Speaker(backend, model, tokenizer, new_cache)
    worker = Worker(PromptCaches(speaker, settings.memory_limit, settings.stored), settings.concurrency)
    settings = replace(settings, vocabulary=min(settings.vocabulary, len(tokenizer)))
    server = listen(Server, settings, partial(Handler, settings, worker, threading.Lock()))
    server.failure = lambda: worker.failure
    worker.start()
    try:
        ready(server)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        worker.stop()

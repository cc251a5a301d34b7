"""A server of OpenAI's API with compressed caches, over the steps of this backend.

`transformers serve` (5.24) takes no cache: it calls `model.generate` with inputs, a streamer and a configuration, and nothing
that makes a cache for a request or keeps one for the next. With its continuous batching it has a paged cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectral_kv_core.serving import local
from spectral_kv_core.serving.settings import Settings

from . import generation


def serve(settings: Settings, ready: Callable[[Any], None]) -> None:
    """`spectral_kv_core.serving.local.serve`: until Ctrl-C."""
    local.serve(generation, settings, ready)

"""The inference engine on transformers."""

from __future__ import annotations

from spectral_kv_core.compat.engine import Engine

from . import generation


class InferenceEngine(Engine):
    __doc__ = Engine.__doc__

    host = generation

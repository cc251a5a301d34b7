"""What a family of mlx-lm gets of a compressed cache, measured on its tiny model: a row of docs/reference/models.md."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx_families
import numpy as np
from family_row import CLOSE, HEAD, PIECES, SAME, Row, divergence, words_of

from spectral_kv_core.codecs.exact import ExactPlan
from spectral_kv_core.errors import UsageError
from spectral_kv_mlx import make_prompt_cache, restore
from spectral_kv_mlx.cache import SpectralKVCache
from spectral_kv_mlx.generation import plain_cache
from spectral_kv_mlx.survey import model_shape, survey

__all__ = ["CLOSE", "HEAD", "SAME", "Row", "row", "table"]


def table() -> list[str]:
    """The lines of the page's table."""
    return [*HEAD, *(str(row(name)) for name in mlx_families.FAMILIES)]


def row(name: str) -> Row:
    """The row of the family `name`: a plain cache, `identity`, and one that seals every token without a loss."""
    model = mlx_families.tiny(name)
    expected = logits(model, plain_cache(model))
    words = [name, *words_of(survey(model))]
    try:
        identity = make_prompt_cache(model, method="identity")
    except UsageError as error:
        assert "received only: " in str(error) or "a model with attention" in str(error), error
        return Row(*words)
    try:
        got = [logits(model, each) for each in (identity, sealed_cache(model), plain_cache(model))]
        coded = logits(model, make_prompt_cache(model, 8, method="turboquant", window=0, sinks=0))
    finally:
        restore(model)
    return Row(*words, max(float(np.abs(x - expected).max()) for x in got), divergence(expected, coded))


def sealed_cache(model) -> list:
    """A cache that seals every token at once, without a loss."""
    shape, cache = model_shape(model)[0], plain_cache(model)
    for number, entry in enumerate(shape.layers):
        cache[entry] = SpectralKVCache(ExactPlan.of(shape), number, 0, 0)
    return cache


def logits(model, cache: list) -> np.ndarray:
    """Logits [T, V] of a text in `PIECES`."""
    ids = np.random.default_rng(7).integers(3, mlx_families.VOCABULARY, sum(PIECES))
    edges = np.cumsum((0, *PIECES))
    parts = [model(mx.array(ids[None, a:b]), cache=cache)[0] for a, b in pairwise(edges)]
    return np.array(mx.concatenate(parts).astype(mx.float32), np.float64)

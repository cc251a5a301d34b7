"""What a family of mlx-lm gets of a compressed cache, measured on its tiny model: a row of docs/reference/models.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import mlx_families
import numpy as np

from spectral_kv_core.codecs.exact import ExactPlan
from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED
from spectral_kv_mlx import make_prompt_cache, restore
from spectral_kv_mlx.cache import SpectralKVCache
from spectral_kv_mlx.generation import plain_cache
from spectral_kv_mlx.survey import model_shape, survey

PIECES = (60, 40, 1, 1, 1, 1)  # tokens of every call
SAME = 1e-4  # most that a logit may differ from the host's own
CLOSE = 0.01  # most KL of turboquant at 8 bits, all tokens coded; experts of random weights change with little
HEAD = (
    "| family | as codes | decoded | passed through | largest difference | KL at 8 bits |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """A family: its layers by way, with reasons, the largest difference of a logit, and the KL; None where refused."""

    family: str
    codes: str
    decoded: str
    passed: str
    difference: float | None = None
    kl: float | None = None

    @property
    def words(self) -> list[str]:
        """The columns that are the same on every machine."""
        return [self.family, self.codes, self.decoded, self.passed]

    def __str__(self) -> str:
        numbers = ["" if x is None else f"{x:.0e}" for x in (self.difference, self.kl)]
        return "| " + " | ".join([*self.words, *numbers]) + " |"


def table() -> list[str]:
    """The lines of the page's table."""
    return [*HEAD, *(str(row(name)) for name in mlx_families.FAMILIES)]


def row(name: str) -> Row:
    """The row of the family `name`: a plain cache, `identity`, and one that seals every token without a loss."""
    model = mlx_families.tiny(name)
    expected = logits(model, plain_cache(model))
    words = [name, *_words(survey(model))]
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


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean KL of the distributions that logits [T, V] stand for."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _words(layers) -> list[str]:
    """How many layers are attended as codes, and how many in another way, with the reason."""
    counts = Counter((layer.way, layer.reason) for layer in layers)
    of_way = {
        way: [(reason, n) for (one, reason), n in counts.items() if one == way] for way in (CODES, DECODED, PASSED)
    }
    words = ["; ".join(f"{n} with {reason}" for reason, n in of_way[way]) for way in (DECODED, PASSED)]
    return [str(sum(n for _, n in of_way[CODES]) or ""), *words]

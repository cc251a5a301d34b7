"""What a family of mlx-lm gets of a compressed cache, measured on its tiny model: a row of docs/reference/models.md."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import mlx.core as mx
import mlx_families
import numpy as np

from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED
from spectral_kv_mlx import make_prompt_cache, restore
from spectral_kv_mlx.generation import plain_cache
from spectral_kv_mlx.survey import survey

PIECES = (70, 30, 1, 1, 1)  # tokens of every call
METHODS = (("affine", 8.5), ("turboquant", 8.25))  # without a profile, the first that a model's sizes allow


@dataclass
class Row:
    """One family: layers by way, and what compressed caches change.

    codes: layers that are attended to as codes. decoded, passed: by reason, layers that are decoded for the model's own
    attention, and layers that keep the host's cache. difference: largest of the logits' differences with `identity`. kl:
    mean KL divergence of what `method` gives at 8 bits. refused: why no cache was made.
    """

    family: str
    codes: list[int] = field(default_factory=list)
    decoded: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    passed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    difference: float | None = None
    kl: float | None = None
    method: str = ""
    refused: str = ""


def row(name: str) -> Row:
    """The row of the family `name`."""
    model, found = mlx_families.make(name), Row(name)
    for i, layer in enumerate(survey(model)):
        if layer.way == CODES:
            found.codes.append(i)
        else:
            {DECODED: found.decoded, PASSED: found.passed}[layer.way][layer.reason].append(i)
    expected = logits(model, plain_cache(model))
    try:
        found.difference = float(np.abs(logits(model, make_prompt_cache(model, method="identity")) - expected).max())
    except UsageError as error:
        found.refused = str(error)
        return found
    for method, bits in METHODS:
        try:
            cache = make_prompt_cache(model, bits=bits, method=method, window=16, sinks=4)
        except UsageError:
            continue
        found.kl, found.method = divergence(expected, logits(model, cache)), f"{method} at {bits:g} bits"
        break
    restore(model)
    return found


def logits(model, cache) -> np.ndarray:
    """Logits [T, vocabulary] of the tokens of `PIECES`."""
    ids = np.random.default_rng(7).integers(3, 256, sum(PIECES))
    edges = np.cumsum((0, *PIECES))
    parts = [model(mx.array(ids[None, a:b]), cache=cache)[0] for a, b in zip(edges, edges[1:])]
    return np.array(mx.concatenate(parts).astype(mx.float32), np.float64)


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean KL divergence of logits [T, vocabulary], in nats."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())

"""The basis that all layers and heads of a model share, one for keys before RoPE and one for values (for kvtc)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..arrays import ops
from ..arrays.rope import unrotate
from ..profile.basis_set import BasisSet
from ..profile.model_shape import ModelShape
from ..quantization.quantizer import BIT_WIDTHS, gaussian_tables
from .basis_fit import SKIP
from .spool import Spool

RANK = 2048  # components at most
SAMPLE = 2**26  # numbers of keys, or of values, that are in memory at a time
HELD_OUT = 4  # every fourth document, or the last fourth of the tokens where there are fewer, measures the spectrum
OVERSAMPLED, ITERATIONS = 64, 1


def fit_joint_set(
    spool: Spool, shape: ModelShape, seed: int = 0, progress: Callable[[Iterable], Iterable] = iter
) -> BasisSet:
    """Means and leading principal axes over all layers, and the variance along them on tokens held out.

    Nothing but a sample of tokens is looked at, as many as `SAMPLE` numbers hold, spread over all documents: with p
    channels, at most SAMPLE / p of them. Components are ordered by the variance held out, since that of the fitted tokens
    flatters the last ones. One layer group, two groups of heads, one band; nothing is known of sensitivity.
    """
    channels = len(shape.layers) * shape.kv_heads * shape.head_dim
    places = _places(spool, max(SAMPLE // channels, 64))
    held = np.concatenate([np.full(len(p), d % HELD_OUT == HELD_OUT - 1) for d, p in enumerate(places)])
    if not held.any():
        held[-max(len(held) // HELD_OUT, 1) :] = True
    rng = np.random.default_rng(seed)
    fitted = []
    for side in progress(range(2)):
        x = _sample(spool, shape, places, side)
        fitted.append(_fit(x[~held], x[held], rng))
    mean, basis, variance = (np.stack(arrays)[None] for arrays in zip(*fitted))
    variance = variance[..., None].astype(np.float32)
    return BasisSet(
        "model",
        "pre",
        "none",
        1,
        mean=mean,
        weight=np.ones((1, 2, channels // shape.head_dim), np.float32),
        basis=basis,
        variance=variance,
        sensitivity=np.ones_like(variance),
        cost=variance[..., None] * np.float32(4.0) ** -np.array(BIT_WIDTHS, np.float32),
        levels=gaussian_tables(),
    )


def randomized_axes(x: np.ndarray, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Leading right singular vectors [p, rank] of `x` [n, p] (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1)."""
    columns = min(rank + OVERSAMPLED, *x.shape)
    basis = np.linalg.qr(x @ rng.standard_normal((x.shape[1], columns), np.float32))[0]
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(x.T @ basis)[0]
        basis = np.linalg.qr(x @ basis)[0]
    return np.linalg.svd(basis.T @ x, full_matrices=False)[2][:rank].T


def _sample(spool: Spool, shape: ModelShape, places: list[np.ndarray], side: int) -> np.ndarray:
    """Keys before RoPE (side 0) or values (1) of all layers at `places` of every document, [n, p] float32."""
    width = shape.kv_heads * shape.head_dim
    sample = np.zeros((sum(map(len, places)), len(shape.layers) * width), np.float32)
    for layer in range(len(shape.layers)):
        done = 0
        for (x, _), chosen in zip(spool.read(layer), places):
            part = np.split(x, 2)[side]
            if side == 0 and (rope := shape.rope_of(shape.layers[layer])) is not None:
                part = unrotate(ops, part, rope, 0)
            flat = np.moveaxis(part[:, chosen], 0, 1).reshape(len(chosen), width)
            sample[done : done + len(chosen), layer * width : (layer + 1) * width] = flat
            done += len(chosen)
    return sample


def _fit(x: np.ndarray, held: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = x.mean(0)
    x -= mean  # a copy of the caller's
    basis = randomized_axes(x, min(RANK, *x.shape), rng)
    variance = np.square((held - mean) @ basis).mean(0, dtype=np.float64)
    order = np.argsort(-variance, kind="stable")
    return mean, basis[:, order], variance[order]


def _places(spool: Spool, count: int) -> list[np.ndarray]:
    """Tokens of every document, evenly spread, about `count` in all; the first ones, which a cache keeps, left out."""
    lengths = [x.shape[1] - SKIP for x, _ in spool.read(0)]
    share = min(1.0, count / sum(lengths))
    return [SKIP + (np.arange(max(int(n * share), 1)) * n // max(int(n * share), 1)) for n in lengths]

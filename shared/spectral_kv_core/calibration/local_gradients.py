"""Score gradients without a backward pass, for models whose gradients do not fit."""

from __future__ import annotations

import numpy as np


def local_gradients(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of one layer's attention output, probed in random directions, by the keys and values it reads.

    `queries` [Hq, S, D] times the attention scale, of the last S of the T tokens of `keys`, `values` [H, T, D]. The
    probe is sum_i u_i . o_i with u normal and of the size of 1 / RMS(o), so that every layer's relative error counts
    alike: what a layer's error does further up is not seen, which is what the true gradient is for. The formulas are
    those of the backward pass of attention (Dao et al. 2022, FlashAttention, appendix B.2).
    Without queries, which are then all zero, every token's relative error counts alike.
    Returns key and value gradients [samples, H, T - S, D] of the tokens before the queries.
    """
    heads, tokens, dim = keys.shape
    length = queries.shape[1]
    if not queries.any():
        return _alike(keys[:, :-length], samples, rng), _alike(values[:, :-length], samples, rng)
    query_rows = queries.reshape(heads, -1, dim).astype(np.float32)  # query heads of a KV head, one after the other
    scores = query_rows @ np.swapaxes(keys, -1, -2)
    last = np.tile(np.arange(tokens - length, tokens), query_rows.shape[1] // length)
    scores = np.where(np.arange(tokens) <= last[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    output = p @ values
    size = np.sqrt(np.square(output, dtype=np.float64).mean()) + 1e-30  # a layer of zeros has no gradient either
    old = tokens - length
    by_key, by_value = [], []
    for _ in range(samples):
        probe = rng.standard_normal(output.shape, np.float32) / np.float32(size)
        by_score = p * (probe @ np.swapaxes(values, -1, -2) - (probe * output).sum(-1, keepdims=True))
        by_key.append((np.swapaxes(by_score, -1, -2) @ query_rows)[:, :old])
        by_value.append((np.swapaxes(p, -1, -2) @ probe)[:, :old])
    return np.stack(by_key), np.stack(by_value)


def _alike(x: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Gradients [samples, H, T, D] of random directions, in units of the spread of each head of `x` [H, T, D]."""
    spread = np.sqrt(np.square(x - x.mean(1, keepdims=True), dtype=np.float64).mean((1, 2), keepdims=True)) + 1e-30
    return rng.standard_normal((samples, *x.shape), np.float32) / spread.astype(np.float32)

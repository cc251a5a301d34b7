"""Partial attention of many tokens by stock operations, a block of scores at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .rows import on_gpu

SCORES = 2**26  # bytes of scores that are there at a time


def partial_attention(queries, keys, values, scale: float, causal: bool = False):
    """Partial (`spectral_kv_core.attention`) of `queries` [B, Hq, L, D] over `keys`, `values` [B, H, T, D] of their dtype.

    causal: the keys are those of the same L tokens. Returns (o, m, l) for grouped query rows, computed already.
    """
    (batch, q_heads, length, dim), (_, heads, tokens, _) = queries.shape, keys.shape
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    queries = (queries * scale).reshape(batch, heads, q_heads // heads, length, dim)
    values = mx.concatenate([values, mx.ones((*values.shape[:3], 1))], axis=3)  # the last channel sums the weights
    step = max(SCORES // (4 * batch * q_heads * tokens), 1)
    blocks, tops = [], []
    for start in range(0, length, step):
        stop = min(start + step, length)
        seen = stop if causal else tokens
        rows = queries[:, :, :, start:stop]
        scores = rows.reshape(batch, heads, -1, dim) @ keys[:, :, :seen].swapaxes(2, 3)
        if causal:
            future = np.where(np.arange(start, stop)[:, None] < np.arange(seen), np.float32(-np.inf), np.float32(0))
            scores = (scores.reshape(*rows.shape[:4], seen) + mx.array(future)).reshape(scores.shape)
        top = scores.max(-1, keepdims=True)
        sums = mx.exp(scores - top) @ values[:, :, :seen]
        blocks.append(sums.reshape(*rows.shape[:4], -1))
        tops.append(top.reshape(*rows.shape[:4], 1))
        mx.eval(blocks[-1], tops[-1])  # else the scores of all blocks are there at once
    sums, top = (mx.concatenate(x, axis=3).reshape(batch, heads, -1, x[0].shape[-1]) for x in (blocks, tops))
    return sums[..., :-1], top, sums[..., -1:]


def supports_partial_attention(queries) -> bool:
    """Whether `partial_attention` is how this device goes on with a prompt.

    On Metal the fused kernel keeps no scores, and does not give the sum of the weights, without which partials cannot be
    merged.
    """
    return not on_gpu()

"""Expected attention: what queries drawn from calibration would give every token over the next positions."""

from __future__ import annotations

import numpy as np

from ..arrays.rope import Rope, mean_rotation


def scores(xp, post_rope, values, query_mean, query_root, rope: Rope | None, now: int, future=512):
    """Expected share of attention times the norm of the value, of `post_rope`, `values` [B, H, T, D] -> [B, H, T] float32.

    Devoto et al. 2025 (arXiv 2510.00636): queries are Gaussian before RoPE, which is replaced by its mean over the next
    `future` positions; the weight exp(q'k + k'Ck / 2) is normalized over the tokens for every query head, then averaged
    over the heads of a KV head. `query_mean` [Hq, D], `query_root` [H, D, D] of `QueryStatistics`; `now`: position of the
    last token seen. Departures: statistics come from calibration instead of the prompt, and query heads of a KV head
    share a covariance. When a token is appended, every score may change: `now` moves.
    """
    keys = xp.astype(post_rope, xp.float32)
    heads, dim = keys.shape[1], keys.shape[3]
    places = now + 1 + np.arange(future)
    scaling = rope.scaling if rope else 1.0  # keys after RoPE carry it once, `QueryStatistics` the other and this one
    linear = np.swapaxes(mean_rotation(query_mean, rope, places).reshape(heads, -1, dim), 1, 2) / scaling
    factor = np.swapaxes(mean_rotation(query_root, rope, places), 1, 2) / (scaling * 2**0.5)
    linear, factor = (xp.asarray(x.astype(np.float32), like=keys) for x in (linear, factor))
    logits = xp.matmul(keys, linear) + xp.sum(xp.square(xp.matmul(keys, factor)), axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.max(logits, axis=2, keepdims=True))
    share = xp.mean(weights / xp.sum(weights, axis=2, keepdims=True), axis=-1)
    return share * xp.sqrt(xp.sum(xp.square(xp.astype(values, xp.float32)), axis=-1))

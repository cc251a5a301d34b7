"""What scorers share: normalization over the tokens that compete, and the terms for recency and key norm."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError

FLAT = 1e-6  # a spread below this share of the scores' size is rounding: such scores are all alike


def zscore(xp, scores, axis: int = -1):
    """`scores` minus their mean, over their standard deviation along `axis`."""
    centered = scores - xp.mean(scores, axis=axis, keepdims=True)
    spread = xp.sqrt(xp.mean(xp.square(centered), axis=axis, keepdims=True))
    size = xp.sqrt(xp.mean(xp.square(scores), axis=axis, keepdims=True))
    return centered / xp.maximum(spread, FLAT * size + 1e-18)  # 1e-18: so small that squares underflow


def ranks(xp, scores):
    """`scores` [..., T] by their order, 0 for the lowest and 1 for the highest; of equal ones the later is higher."""
    order = xp.argsort(xp.argsort(scores, axis=-1), axis=-1)
    return xp.astype(order, xp.float32) / max(scores.shape[-1] - 1, 1)


def with_terms(xp, scores, keys, recency: float = 0.0, norm: float = 0.0):
    """`scores` [B, H, T] mixed with how recent a token is and how long its key [B, H, T, D]; float32.

    recency, norm: weights in [-1, 1], together at most 1; a negative one keeps the old, or the short keys. Each term,
    the scores too, counts by its rank: one outlier does not flatten the rest. 0 and 0: `scores` as they are.
    """
    share = 1 - abs(recency) - abs(norm)
    if share < 0:
        raise UsageError(f"Expected |recency| + |norm| <= 1, received recency={recency}, norm={norm}.")
    if share == 1:
        return scores
    age = np.linspace(0, 1, scores.shape[-1], dtype=np.float32)
    length = xp.sum(xp.square(keys), axis=-1)
    return share * ranks(xp, scores) + recency * xp.asarray(age, like=scores) + norm * ranks(xp, length)

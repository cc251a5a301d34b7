"""KeyDiff: keys unlike the others stay."""

from __future__ import annotations


def scores(xp, post_rope):
    """Minus the cosine between every key of `post_rope` [B, H, T, D] and the mean direction -> [B, H, T] float32.

    Park et al. 2025 (arXiv 2504.15364), with the mean of the normalized keys as anchor. When a token is appended,
    every score may change.
    """
    directions = _normalize(xp, xp.astype(post_rope, xp.float32))
    anchor = _normalize(xp, xp.mean(directions, axis=2, keepdims=True))
    return -xp.sum(directions * anchor, axis=-1)


def _normalize(xp, x):
    return x / (xp.sqrt(xp.sum(xp.square(x), axis=-1, keepdims=True)) + 1e-30)  # 1e-30: a key of zeros

"""Knorm: keys of low norm get the attention, so these stay."""

from __future__ import annotations


def scores(xp, post_rope):
    """Minus the norm of every key of `post_rope` [B, H, T, D] -> [B, H, T] float32. Devoto et al. 2024, arXiv 2406.11430."""
    return -xp.sqrt(xp.sum(xp.square(xp.astype(post_rope, xp.float32)), axis=-1))

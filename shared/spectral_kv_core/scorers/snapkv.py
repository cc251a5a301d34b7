"""SnapKV: what the last queries of the prompt looked at stays."""

from __future__ import annotations

from ..arrays.attention import causal_mask, group_queries, partial_from_scores
from ..errors import UsageError


def scores(xp, post_rope, recent, kernel=5):
    """Mean attention of the last queries, pooled over neighbors, to `post_rope` [B, H, T, D] -> [B, H, T] float32.

    Li et al. 2024 (arXiv 2404.14469), listing 1, and its code: average pooling with `kernel` (odd) tokens. `recent`
    [B, Hq, L, D]: queries of the last L stored tokens after RoPE, times the attention scale. The L tokens of this
    observation window get the highest score. Departure: the mean over the query heads of a KV head, since these share
    what is kept (as kvpress does).
    """
    if kernel % 2 == 0:
        raise UsageError(f"Expected an odd kernel, received {kernel}.")
    keys, recent = xp.astype(post_rope, xp.float32), xp.astype(recent, xp.float32)
    batch, heads, tokens, _ = keys.shape
    length = recent.shape[2]
    logits = xp.matmul(group_queries(recent, heads), xp.permute_dims(keys, (0, 1, 3, 2)))
    mask = causal_mask(xp, recent.shape[1] // heads, length, tokens, like=keys)
    weights, _, total = partial_from_scores(xp, logits if mask is None else xp.where(mask, logits, float("-inf")))
    before = tokens - length
    if before <= 0:
        return xp.zeros((batch, heads, tokens), like=keys)
    share = xp.mean(weights / total, axis=2)[:, :, :before]
    edge = xp.zeros((batch, heads, kernel // 2), like=keys)
    share = xp.concat([edge, share, edge], axis=-1)
    pooled = sum(share[:, :, i : i + before] for i in range(kernel)) / kernel
    window = xp.zeros((batch, heads, length), like=keys) + xp.max(pooled, axis=-1, keepdims=True)
    return xp.concat([pooled, window], axis=-1)

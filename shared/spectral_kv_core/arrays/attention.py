"""Attention as partial softmaxes that are merged: the exact part, and every sealed chunk.

A partial is (o, m, l): o [B, H, M, D] = sum of exp(s - m) v, m [B, H, M, 1] = max score, l [B, H, M, 1] = sum of
exp(s - m). M counts the query rows of one KV head: query heads of its group times query tokens (Dao et al. 2022,
FlashAttention, algorithm 1; the merge is exact).
"""

from __future__ import annotations

from functools import partial, reduce

import numpy as np


def group_queries(queries, kv_heads: int):
    """[B, Hq, L, D] -> [B, Hkv, Hq / Hkv * L, D]: the query heads of a KV head become rows, nothing is repeated."""
    batch, q_heads, length, dim = queries.shape
    return queries.reshape(batch, kv_heads, q_heads // kv_heads * length, dim)


def partial_from_scores(xp, scores):
    """Scores [B, H, M, T] (-inf where masked) -> exp(s - m), m, l; a row without any key gets weight 0."""
    m = xp.maximum(xp.max(scores, axis=-1, keepdims=True), -1e30)
    p = xp.exp(scores - m)
    return p, m, xp.sum(p, axis=-1, keepdims=True)


def dense_partial(xp, queries, keys, values, scale: float, mask=None):
    """Partial over dense `keys`, `values` [B, H, T, D] for grouped `queries` [B, H, M, D], all float32.

    `mask` [M, T] bool, True where a row may look.
    """
    scores = xp.matmul(queries, xp.permute_dims(keys, (0, 1, 3, 2))) * scale
    if mask is not None:
        scores = xp.where(mask, scores, float("-inf"))
    p, m, l = partial_from_scores(xp, scores)
    return xp.matmul(p, values), m, l


def add_partials(xp, first, second):
    """The partial over the keys of both."""
    (o, m, l), (next_o, next_m, next_l) = first, second
    top = xp.maximum(m, next_m)
    old, new = xp.exp(m - top), xp.exp(next_m - top)
    return o * old + next_o * new, top, l * old + next_l * new


def merge_partials(xp, partials):
    """Softmax-weighted mean over all of an iterable of partials -> [B, H, M, D]."""
    o, _, l = reduce(partial(add_partials, xp), partials)
    return o / l


def sink_partial(xp, sinks, query_rows, length: int):
    """Partial over one key that every row sees with the score `sinks` [Hq] of its query head, and whose value is 0.

    `query_rows` [B, H, M, D] grouped, of `length` tokens. So a logit that nothing belongs to takes its share of a softmax.
    """
    batch, heads, rows, _ = query_rows.shape
    m = xp.astype(sinks, xp.float32).reshape(1, heads, rows // length, 1, 1)
    m = (m + xp.zeros((batch, 1, 1, length, 1), like=query_rows)).reshape(batch, heads, rows, 1)
    return xp.zeros(query_rows.shape, like=query_rows), m, xp.exp(m - m)


def decode_step(xp, codec, chunks, queries, keys, values, scale: float, sinks=None):
    """Attention [B, Hq, L, D] of L tokens over sealed `chunks` of `codec` and exact tokens, themselves last of these.

    `queries` [B, Hq, L, D], `keys`, `values` [B, H, E, D] exact, all in the host's dtype; `sinks` as in `sink_partial`.
    """
    heads, length = keys.shape[1], queries.shape[2]
    query_rows = xp.astype(group_queries(queries, heads), xp.float32)
    keys, values = xp.astype(keys, xp.float32), xp.astype(values, xp.float32)
    mask = causal_mask(xp, queries.shape[1] // heads, length, keys.shape[2], like=queries)
    partials = [codec.attend(chunk, query_rows, scale) for chunk in chunks]
    partials.append(dense_partial(xp, query_rows, keys, values, scale, mask))
    if sinks is not None:
        partials.append(sink_partial(xp, sinks, query_rows, length))
    return xp.astype(merge_partials(xp, partials).reshape(*queries.shape[:3], values.shape[3]), queries.dtype)


def causal_mask(xp, group: int, length: int, exact: int, like):
    """Mask [group * length, exact] for `length` new tokens at the end of `exact` keys; None for a single token."""
    if length == 1:
        return None
    places = np.tile(np.arange(exact - length, exact), group)[:, None]
    return xp.asarray(places >= np.arange(exact)[None, :], like=like)

"""Decoded chunks that stay, for methods that would decode their whole history again in every step.

A chunk that was decoded first stays first: once the limit is reached nothing is replaced, because a step goes through all
chunks and would find none of those that it is going to need.
"""

from __future__ import annotations

from math import prod
from numbers import Integral

from ..arrays import attention
from ..errors import UsageError
from ..planning.methods import Method
from ..planning.plan import Plan


def check_working_set(method: Method, limit: int) -> None:
    """Raise UsageError unless caches of `method` have a use for `limit` bytes of decoded chunks."""
    whole = isinstance(limit, Integral) and not isinstance(limit, bool)
    if not whole or limit < 0 or (limit and not method.decodes_history):
        raise UsageError(
            f"Expected working_set of 0 bytes or more, 0 for a method that never decodes its history, received {limit!r} for "
            f"{method.name}. Choose another method, such as spectral-dense."
        )


def bytes_per_layer(plan: Plan, limit: int) -> int:
    """What every layer group may keep of `limit` bytes; raises UsageError for a method that decodes nothing."""
    check_working_set(plan.method, limit)
    return limit // len(plan.layer_groups)


def decode_step(group, chunks, layer: int, limit: int, queries, keys, values, scale: float):
    """`attention.decode_step` over plain `chunks` of a `PaddingGroup`, of which as many as fit in `limit` bytes stay decoded.

    Chunks stay in 16 bits: in the dtype of `queries` where that has as many, else in float16.
    """
    xp, codec = group.storage.xp, group.storage.codec.reader(layer)
    kind = queries.dtype if queries.nbytes == 2 * prod(queries.shape) else xp.float16
    there = set(chunks)
    group.decoded = {key: pair for key, pair in group.decoded.items() if key[0] in there}
    decoded, left = dict(group.decoded), limit - sum(x.nbytes for x in group.decoded_arrays(layer))
    heads, (batch, q_heads, length, dim) = keys.shape[1], queries.shape
    size = 2 * 2 * batch * heads * dim  # bytes of a token
    query_rows = xp.astype(attention.group_queries(queries, heads), xp.float32)

    def partials():
        nonlocal left
        for chunk in chunks:
            key = chunk, layer
            if key not in decoded and chunk.tokens * size > left:
                yield codec.attend(chunk, query_rows, scale)
                continue
            if key not in decoded:
                decoded[key] = tuple(xp.astype(x, kind) for x in codec.decode(chunk))
                left -= chunk.tokens * size
            k, v = decoded[key]
            yield attend_decoded(xp, queries, query_rows, k, v, scale)
        mask = attention.causal_mask(xp, q_heads // heads, length, keys.shape[2], like=queries)
        k, v = (xp.astype(x, xp.float32) for x in (keys, values))
        yield attention.dense_partial(xp, query_rows, k, v, scale, mask)

    out = attention.merge_partials(xp, partials())
    group.decoded = decoded
    return xp.astype(out.reshape(*queries.shape[:3], values.shape[3]), queries.dtype)


def attend_decoded(xp, queries, query_rows, keys, values, scale: float):
    """Partial softmax over a decoded chunk: by the host's fused kernel where dtypes agree and it gives partials.

    `queries` [B, Hq, L, D] as they came, `query_rows` the same, grouped, in float32.
    """
    fused = xp.kernels if queries.dtype == keys.dtype else None
    if fused and fused.supports_partial_attention(queries):
        return fused.partial_attention(queries, keys, values, scale)
    keys, values = (xp.astype(x, xp.float32) for x in (keys, values))
    return attention.dense_partial(xp, query_rows, keys, values, scale)

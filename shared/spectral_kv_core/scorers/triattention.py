"""TriAttention: how much queries like those of calibration will look at a key from many distances ahead."""

from __future__ import annotations

import numpy as np

from ..arrays import ops
from ..arrays.rope import Rope, mean_rotation, pair_lengths
from ..errors import UsageError
from .terms import zscore

OFFSETS = tuple(2**i for i in range(17))  # tokens from now to the queries asked about: 1, 2, 4, ..., 65536
POOLS = ("mean", "max")


def scores(xp, post_rope, query_mean, query_amplitude, rope: Rope | None, now: int, offsets=OFFSETS, pool="mean"):
    """Trigonometric and norm score of every key of `post_rope` [B, H, T, D], z-normalized -> [B, H, T] float32.

    TriAttention (arXiv 2604.04921). With c_f the mean and m_f the mean length of pair f of a query head before RoPE
    (and after q_norm), a key k at position p scores, D = now - p + offset,
        mean over offsets of sum_f |c_f| |k_f| cos(w_f D + arg c_f - arg k_f)  +  sum_f (m_f - |c_f|) |k_f|,
    z-normalized over the tokens for every query head; a KV head takes the largest of its query heads.

    The cosine is the real part of c_f e^{iw_f(now + offset)} times the conjugate of k_f e^{iw_f p}, the key *after* RoPE:
    the first sum is one product with the center turned to the mean of the future positions, and true positions of kept
    tokens are in the keys already. `query_mean` [Hq, D], `query_amplitude` [Hq, rotary_dim / 2] of `QueryStatistics`;
    `now`: position of the last token seen. pool: `mean` over the offsets, or the `max`. Channels without RoPE count as
    pairs of frequency 0 in the first sum; the paper has none. When a token is appended, every score may change.
    """
    if pool not in POOLS:
        raise UsageError(f"Expected a pool in {POOLS}, received {pool!r}.")
    keys = xp.astype(post_rope, xp.float32)
    batch, heads, tokens, dim = keys.shape
    future = now + np.array(offsets)
    ahead = [mean_rotation(query_mean, rope, places) for places in ([future] if pool == "mean" else future[:, None])]
    scaling = rope.scaling if rope else 1.0  # keys after RoPE carry it once, `QueryStatistics` the other and this one
    centers = np.stack(ahead).reshape(len(ahead), heads, -1, dim).transpose(1, 3, 0, 2) / scaling  # [H, D, P, g]
    total = xp.matmul(keys, xp.asarray(centers.reshape(heads, dim, -1), like=keys))
    total = xp.max(total.reshape(batch, heads, tokens, len(ahead), -1), axis=3)
    if rope is not None:
        excess = (query_amplitude - pair_lengths(ops, query_mean, rope)) / scaling
        excess = np.swapaxes(excess.reshape(heads, -1, excess.shape[-1]), 1, 2).astype(np.float32)
        total = total + xp.matmul(pair_lengths(xp, keys, rope), xp.asarray(excess, like=keys))
    return xp.max(zscore(xp, total, axis=2), axis=-1)

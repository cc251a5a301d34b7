"""WaveletTriAttention: what stands out in the text, and what queries look for, in one score."""

from __future__ import annotations

from ..errors import UsageError
from . import triattention, waveletkv
from .terms import with_terms, zscore
from .waveletkv import WAVELET


def scores(
    xp, pre_rope, post_rope, query_mean, query_amplitude, rope, now, weight=0.5, wavelet=WAVELET, recency=0.0, norm=0.2
):
    """weight * z(WaveletKV) + (1 - weight) * z(TriAttention) -> [B, H, T] float32; arguments as in these two.

    recency, norm: see `with_terms`. No paper: the definition follows the name; defaults by results/experiments.md. When
    a token is appended, every score may change.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"Expected a weight in [0, 1], received {weight}.")
    text = waveletkv.scores(xp, pre_rope, wavelet)
    queries = triattention.scores(xp, post_rope, query_mean, query_amplitude, rope, now)
    blend = weight * zscore(xp, text) + (1 - weight) * zscore(xp, queries)
    return with_terms(xp, blend, pre_rope, recency, norm)

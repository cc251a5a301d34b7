"""WaveletTriAttention: what stands out in the text, and what queries look for, in one score."""

from __future__ import annotations

from ..errors import UsageError
from . import triattention, waveletkv
from .terms import with_terms, zscore
from .tokens import Tokens
from .waveletkv import WAVELET


def scores(xp, tokens: Tokens, weight=0.5, wavelet=WAVELET, recency=0.0, norm=0.2):
    """weight * z(WaveletKV) + (1 - weight) * z(TriAttention) of `tokens` -> [B, H, T] float32; options as in these two.

    recency, norm: see `with_terms`. No paper: the definition follows the name; defaults by results/experiments.md. When
    a token is appended, every score may change.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"Expected a weight in [0, 1], received {weight}.")
    text = waveletkv.scores(xp, tokens.pre_rope, wavelet)
    assert tokens.now is not None, "it is among what the scorer needs"
    queries = triattention.scores(
        xp, tokens.post_rope, tokens.query_mean, tokens.query_amplitude, tokens.rope, tokens.now
    )
    blend = weight * zscore(xp, text) + (1 - weight) * zscore(xp, queries)
    return with_terms(xp, blend, tokens.pre_rope, recency, norm)

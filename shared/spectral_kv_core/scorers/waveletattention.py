"""WaveletAttention: what stands out in the text, what its last queries looked at, and what later ones will look at."""

from __future__ import annotations

from . import expected_attention, snapkv, waveletkv
from .terms import zscore
from .tokens import Tokens
from .waveletkv import WAVELET

FLOOR = 0.1  # shares of attention below a tenth of the mean differ by less and less


def scores(xp, tokens: Tokens, wavelet=WAVELET, kernel=5, future=512):
    """z(WaveletKV) + z(log SnapKV) + z(log expected attention) of `tokens` -> [B, H, T] float32; options as in these three.

    Shares of attention x count as log(1 + x / (`FLOOR` mean)). Equal parts by results/experiments.md; no paper. When a token
    is appended, every score may change.
    """
    text = waveletkv.scores(xp, tokens.pre_rope, wavelet)
    seen = snapkv.scores(xp, tokens.post_rope, tokens.recent, kernel)
    assert tokens.now is not None, "it is among what the scorer needs"
    expected = expected_attention.scores(
        xp, tokens.post_rope, tokens.values, tokens.query_mean, tokens.query_root, tokens.rope, tokens.now, future
    )
    return zscore(xp, text) + _share(xp, seen) + _share(xp, expected)


def _share(xp, x):
    """z of the logarithm of shares of attention [B, H, T]."""
    return zscore(xp, xp.log(1 + x / (FLOOR * xp.mean(x, axis=-1, keepdims=True) + 1e-30)))

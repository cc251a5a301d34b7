"""FourierKV: keys seen as signals over time; a token scores by its part of the low or of the high band."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from .terms import with_terms

BANDS = ("low", "high")


def scores(xp, pre_rope, band="low", cutoff=0.5, roll=0.5, recency=0.0, norm=-0.2):
    """Norm of every token's part in a band of `pre_rope` [B, H, T, D] minus its mean over time -> [B, H, T] float32.

    band: `low` keeps what the smooth course of the text explains, `high` what departs from it. cutoff: top of the low
    band as a share of the Nyquist frequency; at 1 all is low. roll: the mask falls to 0 at cutoff * (1 + roll).
    recency, norm: see `with_terms`. No paper: the definition follows the name; defaults by results/experiments.md. A
    transform over all tokens: when one is appended, every score may change.
    """
    if band not in BANDS:
        raise UsageError(f"Expected a band in {BANDS}, received {band!r}.")
    keys = xp.astype(pre_rope, xp.float32)
    centered = keys - xp.mean(keys, axis=2, keepdims=True)
    low = low_pass(xp, centered, cutoff, roll)
    part = low if band == "low" else centered - low
    return with_terms(xp, xp.sqrt(xp.sum(xp.square(part), axis=-1)), keys, recency, norm)


def low_pass(xp, x, cutoff: float, roll: float):
    """`x` [..., T, D] float32, mean 0, with a Tukey mask on its spectrum over time; first and last token are neighbors."""
    tokens = x.shape[-2]
    mask = tukey(np.fft.rfftfreq(tokens), 0.0, cutoff / 2, roll)[:, None]
    mask[0] = 0  # what is left of the mean is rounding, and all there is in a short text
    return xp.irfft(xp.rfft(x, axis=-2) * xp.asarray(mask, like=x), n=tokens, axis=-2)


def tukey(frequency: np.ndarray, low: float, high: float, roll: float) -> np.ndarray:
    """Mask, float32: 1 in [low, high], on a cosine down to 0 at low / (1 + roll) and high * (1 + roll).

    `frequency` in cycles per token. A sharp edge would ring over many tokens (Harris 1978, Proc. IEEE 66, the tapered
    cosine window).
    """
    below, above = np.maximum(low - frequency, 0), np.maximum(frequency - high, 0)
    roll = max(roll, 1e-9)  # 0: a sharp edge
    outside = above / (high * roll) + (below / (low - low / (1 + roll)) if low else 0)
    return (0.5 + 0.5 * np.cos(np.pi * np.minimum(outside, 1))).astype(np.float32)

"""WaveletKV: a token scores by how much its key departs from those around it, at every scale of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pywt

from ..errors import UsageError
from .terms import with_terms

WAVELET = "db2"  # by results/experiments.md
MAX_LEVELS = 5


def scores(xp, pre_rope, wavelet=WAVELET, gains=None, recency=0.0, norm=0.0):
    """Sum over bands of gain * energy of `pre_rope` [B, H, T, D] -> [B, H, T] float32.

    wavelet: see `filter_bank`. gains: array [H, J + 1], details from fine to coarse and then the approximation; None: those
    of `band_gains`. recency, norm: see `with_terms`. No paper: the definition follows the name; defaults by
    results/experiments.md.

    When a token is appended, band energies change for the last `reach` tokens only. From 128 tokens on these are 15 with
    Haar and 46 with db2; longer filters reach further. A window at least as long leaves the energies of all tokens that
    compete as they are. Measured gains move with the median of all tokens, in common for all of them, and a level is added
    at 8, 16, 32, 64 and 128 tokens.
    """
    keys = xp.astype(pre_rope, xp.float32)
    energy = band_energies(xp, bands(xp, keys, wavelet))
    gain = band_gains(xp, energy) if gains is None else xp.asarray(np.asarray(gains, np.float32)[..., None], like=keys)
    return with_terms(xp, xp.sum(energy * gain, axis=2), keys, recency, norm)


@cache
def filter_bank(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass and high-pass analysis taps of a discrete wavelet, in order of time; the low-pass ones sum to 1.

    wavelet: a name of PyWavelets, such as haar, db2, sym4, coif1 or bior2.2. PyWavelets fills the filters of biorthogonal
    wavelets with zeros to one even length. These zeros are cut off, so that every filter has its own length and center.
    Long filters of the families db and coif are lopsided: the middle of their taps is not where their energy is, and with
    db20 a token stands out 14 places early. The other families keep it in place. Raises UsageError for any other name.
    """
    discrete = pywt.wavelist(kind="discrete")
    if wavelet not in discrete:
        families = (family for family in pywt.families() if pywt.wavelist(family)[0] in discrete)
        raise UsageError(
            f"Expected a discrete wavelet of the families {', '.join(families)}, such as db2 or bior2.2, received "
            f"{wavelet!r}."
        )
    bank = pywt.Wavelet(wavelet)
    # PyWavelets convolves, so its first tap meets the latest token, and it keeps energies: its low-pass taps sum to sqrt(2)
    low, high = (np.trim_zeros(np.array(taps[::-1]) / 2**0.5) for taps in (bank.dec_lo, bank.dec_hi))
    return tuple(low.tolist()), tuple(high.tolist())


def num_levels(tokens: int) -> int:
    """J = floor(log2 tokens) - 2, in [0, 5]: the coarsest Haar filter covers a quarter to an eighth of the text."""
    return min(MAX_LEVELS, max(tokens.bit_length() - 3, 0))


def reach(wavelet: str, level: int) -> int:
    """How many later tokens a coefficient of `level` looks at; it looks at as many earlier ones, or one more.

    Of the detail and the approximation, the one that looks further.
    """
    return (max(_supports(wavelet, level)) - 1) // 2


def bands(xp, x, wavelet: str) -> Iterator:
    """Undecimated transform of `x` [B, H, T, D] over time: details of level 1 to J, then the approximation, each [B, H, T, D].

    A trous (Shensa 1992, IEEE Trans. Signal Processing 40): filters of level j are spread by 2^(j - 1), nothing is left
    out, so a token keeps its coefficients when the text is longer by one. Filters are centered on the token; first and
    last token are repeated outwards. Scaled so that the approximation is a weighted mean.
    """
    (low, high), tokens = filter_bank(wavelet), x.shape[2]
    levels = num_levels(tokens)
    before, after = max(_supports(wavelet, levels)) // 2, reach(wavelet, levels)
    place = np.clip(np.arange(-before, tokens + after), 0, tokens - 1).astype(np.int32)
    smooth = xp.take(x, xp.asarray(place, like=x), axis=2)
    for level in range(1, levels + 1):
        step, first = 2 ** (level - 1), before - _supports(wavelet, level)[1] // 2
        taps = (smooth[:, :, first + k * step :][:, :, :tokens] for k in range(len(high)))
        yield sum(c * tap for c, tap in zip(high, taps))
        length = smooth.shape[2] - (len(low) - 1) * step
        taps = (smooth[:, :, k * step : k * step + length] for k in range(len(low)))
        smooth = sum(c * tap for c, tap in zip(low, taps))
    first = before - _supports(wavelet, levels)[0] // 2
    yield smooth[:, :, first : first + tokens]


def band_energies(xp, parts):
    """Squared norm of every token in every band: `parts`, each [B, H, T, D], -> [B, H, bands, T]."""
    return xp.stack([xp.sum(xp.square(part), axis=-1) for part in parts], axis=2)


def band_gains(xp, energy):
    """1 / median energy of every band: `energy` [B, H, bands, T] -> [B, H, bands, 1].

    A median below 1e-9 of the largest band's is a band without content (constant keys): it must not count for rounding.
    """
    ordered, tokens = xp.sort(energy, axis=-1), energy.shape[-1]
    median = (ordered[..., (tokens - 1) // 2 :][..., :1] + ordered[..., tokens // 2 :][..., :1]) / 2
    return 1 / xp.maximum(median, 1e-9 * xp.max(median, axis=2, keepdims=True) + 1e-30)


def _supports(wavelet: str, level: int) -> tuple[int, int]:
    """Tokens that an approximation and a detail of `level` are made of; level 0 is the token itself."""
    low, high = (len(taps) - 1 for taps in filter_bank(wavelet))
    step = 2**level // 2
    return low * (2**level - 1) + 1, low * max(step - 1, 0) + high * step + 1

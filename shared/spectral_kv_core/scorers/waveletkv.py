"""WaveletKV: a token scores by how much its key departs from those around it, at every scale of time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .terms import with_terms

# low-pass taps in order of time, with sum 1 (Daubechies 1992, Ten Lectures on Wavelets, table 6.1)
FILTERS = {
    "haar": (0.5, 0.5),
    "db2": tuple(float(c) / 8 for c in (1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5)),
}
MAX_LEVELS = 5


def scores(xp, pre_rope, wavelet="db2", gains=None, recency=0.0, norm=0.0):
    """Sum over bands of gain * energy of `pre_rope` [B, H, T, D] -> [B, H, T] float32.

    gains: array [H, J + 1], details from fine to coarse and then the approximation; None: those of `band_gains`.
    recency, norm: see `with_terms`. No paper: the definition follows the name; defaults by results/experiments.md.

    When a token is appended, band energies change for the last `reach` tokens only (15 with Haar, 46 with db2, from
    128 tokens on): a window at least as long leaves those of all tokens that compete as they are. Measured gains move with
    the median of all tokens, in common for all of them, and a level is added at 8, 16, 32, 64 and 128 tokens.
    """
    keys = xp.astype(pre_rope, xp.float32)
    energy = band_energies(xp, bands(xp, keys, wavelet))
    gain = band_gains(xp, energy) if gains is None else xp.asarray(np.asarray(gains, np.float32)[..., None], like=keys)
    return with_terms(xp, xp.sum(energy * gain, axis=2), keys, recency, norm)


def num_levels(tokens: int) -> int:
    """J = floor(log2 tokens) - 2, in [0, 5]: the coarsest filter covers a quarter to an eighth of the text."""
    return min(MAX_LEVELS, max(tokens.bit_length() - 3, 0))


def reach(wavelet: str, level: int) -> int:
    """How many later tokens a coefficient of `level` looks at; it looks at as many earlier ones, or one more."""
    return (_support(wavelet, level) - 1) // 2


def bands(xp, x, wavelet: str) -> Iterator:
    """Undecimated transform of `x` [B, H, T, D] over time: details of level 1 to J, then the approximation, each [B, H, T, D].

    A trous (Shensa 1992, IEEE Trans. Signal Processing 40): filters of level j are spread by 2^(j - 1), nothing is left
    out, so a token keeps its coefficients when the text is longer by one. Filters are centred on the token; first and
    last token are repeated outwards. Scaled so that the approximation is a weighted mean.
    """
    if wavelet not in FILTERS:
        raise ValueError(f"Expected a wavelet among {', '.join(FILTERS)}, received {wavelet!r}.")
    low, tokens = FILTERS[wavelet], x.shape[2]
    high = [(-1) ** k * c for k, c in enumerate(reversed(low))]
    levels = num_levels(tokens)
    before, after = _support(wavelet, levels) // 2, reach(wavelet, levels)
    place = np.clip(np.arange(-before, tokens + after), 0, tokens - 1).astype(np.int32)
    smooth = xp.take(x, xp.asarray(place, like=x), axis=2)
    for level in range(1, levels + 1):
        step = 2 ** (level - 1)
        length = smooth.shape[2] - (len(low) - 1) * step
        taps = [smooth[:, :, k * step : k * step + length] for k in range(len(low))]
        first = before - _support(wavelet, level) // 2
        yield sum(c * tap for c, tap in zip(high, taps))[:, :, first : first + tokens]
        smooth = sum(c * tap for c, tap in zip(low, taps))
    yield smooth


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


def _support(wavelet: str, level: int) -> int:
    """Tokens that a coefficient of `level` is made of."""
    return (len(FILTERS[wavelet]) - 1) * (2**level - 1) + 1

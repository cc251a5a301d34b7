"""WaveletFourierKV: WaveletKV with every band cleaned in the frequency domain, as far as the text is stationary."""

from __future__ import annotations

import numpy as np

from .fourierkv import tukey
from .terms import with_terms
from .waveletkv import WAVELET, band_energies, band_gains, bands, num_levels

FRAME = 64  # tokens of a windowed transform: the coarsest octave, 1/64 to 1/32 cycles per token, has two bins
BLOCKS = 8  # equal pieces of the text whose energies are compared


def scores(xp, pre_rope, wavelet=WAVELET, roll=0.5, recency=0.0, norm=0.0):
    """Wavelet and Fourier energies of `pre_rope` [B, H, T, D], blended by non-stationarity -> [B, H, T] float32.

    Every wavelet band goes through a windowed FFT and a Tukey mask on its own octave (`roll` as in FourierKV), which
    takes out what short filters let through from other octaves. Where the energy is uneven over time, wavelets count
    more; else the cleaned bands do. recency, norm: see `with_terms`. No paper: the definition follows the name;
    defaults by results/experiments.md.

    When a token is appended, band energies change for the last `reach` + 63 tokens only; gains and blend move in common.
    """
    keys = xp.astype(pre_rope, xp.float32)
    plain, cleaned = [], []
    for part, (low, high) in zip(bands(xp, keys, wavelet), octaves(num_levels(keys.shape[2]))):
        plain.append(part)
        cleaned.append(windowed_filter(xp, part, tukey(np.fft.rfftfreq(FRAME), low, high, roll)))
    plain, cleaned = (band_energies(xp, parts) for parts in (plain, cleaned))
    plain, cleaned = (xp.sum(energy * band_gains(xp, energy), axis=2) for energy in (plain, cleaned))
    alpha = nonstationarity(xp, plain)
    return with_terms(xp, alpha * plain + (1 - alpha) * cleaned, keys, recency, norm)


def octaves(levels: int) -> list[tuple[float, float]]:
    """Frequencies, in cycles per token, that details of level 1 to `levels` and then the approximation stand for."""
    return [(2.0 ** -(j + 1), 2.0**-j) for j in range(1, levels + 1)] + [(0.0, 2.0 ** -(levels + 1))]


def windowed_filter(xp, x, mask: np.ndarray):
    """`x` [B, H, T, D] with `mask` [FRAME / 2 + 1] on the spectrum of every half-overlapping Hann frame.

    Frames start at multiples of FRAME / 2 from the first token on, so a longer text leaves them where they are. Periodic
    Hann windows add up to 1: a mask of ones gives back `x`.
    """
    batch, heads, tokens, dim = x.shape
    half = FRAME // 2
    pieces = -(-tokens // half)
    edge = xp.zeros((batch, heads, half, dim), like=x)
    fill = xp.zeros((batch, heads, pieces * half - tokens, dim), like=x)
    cut = xp.concat([edge, x, fill, edge], axis=2).reshape(batch, heads, pieces + 2, half, dim)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)).astype(np.float32)[:, None]
    frames = xp.concat([cut[:, :, :-1], cut[:, :, 1:]], axis=3) * xp.asarray(window, like=x)
    frames = xp.irfft(xp.rfft(frames, axis=3) * xp.asarray(mask[:, None], like=x), n=FRAME, axis=3)
    joined = frames[:, :, :-1, half:] + frames[:, :, 1:, :half]
    return joined.reshape(batch, heads, pieces * half, dim)[:, :, :tokens]


def nonstationarity(xp, energy):
    """Standard deviation over mean of the energy in `BLOCKS` equal pieces of time, at most 1: [B, H, T] -> [B, H, 1]."""
    batch, heads, tokens = energy.shape
    blocks = min(BLOCKS, tokens)
    length = tokens // blocks
    pieces = xp.mean(energy[:, :, : blocks * length].reshape(batch, heads, blocks, length), axis=-1)
    mean = xp.mean(pieces, axis=-1, keepdims=True)
    spread = xp.sqrt(xp.mean(xp.square(pieces - mean), axis=-1, keepdims=True))
    return xp.clip(spread / (mean + 1e-30), 0.0, 1.0)  # 1e-30: no energy at all

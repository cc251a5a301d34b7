"""Time transforms against numpy.fft, and the bands of their coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
from tolerances import assert_close

from spectral_kv_core.arrays.transform import band_sizes, octave_bands, time_matrix, to_frequency, to_time

BLOCKS = [1, 2, 8, 16, 32]


def dct_by_fft(x: np.ndarray) -> np.ndarray:
    """Orthonormal DCT-II of the last axis: the FFT of the even extension (Makhoul 1980)."""
    n = x.shape[-1]
    spectrum = np.fft.fft(np.concatenate([x, x[..., ::-1]], axis=-1))[..., :n]
    y = (spectrum * np.exp(-1j * np.pi * np.arange(n) / (2 * n))).real / 2
    return y * np.where(np.arange(n) == 0, np.sqrt(1 / n), np.sqrt(2 / n))


@pytest.mark.parametrize("block", BLOCKS)
def test_dct_is_orthonormal_and_golden(block):
    matrix = time_matrix("dct", block)
    assert matrix.dtype == np.float32 and matrix.flags.c_contiguous
    assert_close("gram", matrix.astype(np.float64) @ matrix.T, np.eye(block), limit=1e-6)
    x = np.random.default_rng(block).standard_normal((5, block))
    assert_close("dct", x @ matrix.T, dct_by_fft(x), limit=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_round_trip_and_layout(xp, block, lead):
    matrix = time_matrix("dct", block)
    z = np.random.default_rng(0).standard_normal((*lead, 3 * block, 5)).astype(np.float32)
    y = to_frequency(xp, xp.asarray(z), xp.asarray(matrix))
    assert tuple(y.shape) == (*lead, 3, block, 5)
    second = dct_by_fft(np.moveaxis(z[..., block : 2 * block, :], -2, -1))  # [..., R, block] of the second block
    assert_close("second block", xp.to_numpy(y)[..., 1, :, :], np.moveaxis(second, -1, -2))
    major = np.ascontiguousarray(np.moveaxis(xp.to_numpy(y), -3, -1))  # frequency-major, as chunks keep them
    assert_close("round trip", xp.to_numpy(to_time(xp, xp.asarray(major), xp.asarray(matrix))), z)


@pytest.mark.parametrize("block", BLOCKS)
def test_haar_is_orthonormal_and_agrees_with_pywavelets(block):
    matrix = time_matrix("haar", block)
    assert_close("gram", matrix.astype(np.float64) @ matrix.T, np.eye(block), limit=1e-6)
    x = np.random.default_rng(block).standard_normal(block)
    levels = pywt.wavedec(x, "haar", mode="periodization", level=int(np.log2(block)))
    assert_close("wavelets", matrix @ x, np.concatenate(levels), limit=1e-6)


def test_no_transform_is_the_identity():
    np.testing.assert_array_equal(time_matrix("none", 1), np.ones((1, 1), np.float32))


@pytest.mark.parametrize("kind, block", [("none", 2), ("fourier", 16), ("haar", 12)])
def test_impossible_transform_is_refused(kind, block):
    with pytest.raises(ValueError, match="Expected"):
        time_matrix(kind, block)


def test_bands_are_octaves():
    assert octave_bands(16).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8]
    assert band_sizes(16).tolist() == [1, 1, 2, 4, 8]
    assert octave_bands(1).tolist() == [0]
    for block in BLOCKS:
        assert band_sizes(block).sum() == block

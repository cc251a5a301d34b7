"""Streaming moments, and the bases fitted to them."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ToyModel, _planted, toy_profile_of
from tolerances import assert_close

from spectral_kv_core.arrays.basis import effective_rank, fit_basis, orthonormalize, rank_for_energy
from spectral_kv_core.calibration.moments import Moments


@pytest.mark.parametrize("pieces", [(1,), (1, 1, 1), (63, 257, 1), (500,)])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_equals_two_passes(pieces, offset):
    x = np.random.default_rng(0).standard_normal((2, 3, sum(pieces), 7)) + offset
    moments, start = Moments(), 0
    for n in pieces:
        moments.update(x[..., start : start + n, :])
        start += n
    centered = x - x.mean(-2, keepdims=True)
    assert moments.count == start
    assert_close("mean", moments.mean, x.mean(-2), "float64")
    limit = 1e-12 if offset == 0 else 1e-9
    assert_close("covariance", moments.covariance, np.swapaxes(centered, -1, -2) @ centered / start, limit=limit)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_vectors_are_refused(bad):
    moments = Moments()
    moments.update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.update(np.array([[1.0, bad]]))
    assert moments.count == 4


@pytest.mark.parametrize("dim", [1, 64, 80])
def test_basis_is_orthonormal_and_diagonalizes(dim):
    a = np.random.default_rng(dim).standard_normal((2, dim, dim))
    covariance = a @ np.swapaxes(a, -1, -2)
    basis, variance = fit_basis(covariance)
    assert_close("gram", np.swapaxes(basis, -1, -2) @ basis, np.broadcast_to(np.eye(dim), a.shape), "float64")
    assert_close("covariance", (basis * variance[..., None, :]) @ np.swapaxes(basis, -1, -2), covariance, "float64")
    assert np.all(np.diff(variance) <= 0) and np.all(variance >= 0)


def test_sign_does_not_depend_on_the_solver():
    a = np.random.default_rng(0).standard_normal((16, 16))
    covariance = a @ a.T
    basis, _ = fit_basis(covariance)
    largest = basis[np.abs(basis).argmax(0), np.arange(16)]
    assert np.all(largest > 0)
    reversed_channels, _ = fit_basis(covariance[::-1, ::-1])
    assert_close("basis of permuted channels", reversed_channels[::-1], basis, limit=1e-8)


def test_basis_recovers_a_planted_subspace():
    rng = np.random.default_rng(0)
    planted, _ = np.linalg.qr(rng.standard_normal((64, 5)))
    x = rng.standard_normal((4000, 5)) * 3 @ planted.T + 0.01 * rng.standard_normal((4000, 64)) + 7.0
    moments = Moments()
    moments.update(x)
    basis, variance = fit_basis(moments.covariance)
    assert np.linalg.svd(planted.T @ basis[:, :5], compute_uv=False).min() > 0.9999
    assert variance[5] < 1e-3 * variance[4]


def test_profile_recovers_the_planted_directions(toy_profile):
    model = ToyModel()
    fitted = toy_profile.basis_sets["head.post"].basis.astype(np.float64)
    for layer in range(model.layers):
        axes, _ = _planted(model, layer)
        overlap = np.swapaxes(axes[..., : model.planted], -1, -2) @ fitted[layer][..., : model.planted]
        assert np.linalg.svd(overlap, compute_uv=False).min() > 0.99


def test_profile_statistics_do_not_depend_on_the_run():
    again = toy_profile_of.__wrapped__(ToyModel()).basis_sets["head.post"]
    first = toy_profile_of(ToyModel()).basis_sets["head.post"]
    for name in first.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name), err_msg=name)


def test_orthonormalize_repairs_float16():
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 80, 20)))
    rounded = basis.astype(np.float16)
    gram = np.swapaxes(rounded, -1, -2).astype(np.float64) @ rounded
    assert np.abs(gram - np.eye(20)).max() > 1e-5  # there is something to repair
    repaired = orthonormalize(rounded)
    assert_close("gram", np.swapaxes(repaired, -1, -2) @ repaired, np.broadcast_to(np.eye(20), gram.shape), limit=1e-12)
    assert_close("basis", repaired, basis, "float16")


def test_rank_for_energy():
    variance = np.array([[8.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert rank_for_energy(variance, 0.8).tolist() == [1, 4]
    assert rank_for_energy(variance, 0.9).tolist() == [2, 4]
    assert rank_for_energy(variance, 1.0).tolist() == [3, 4]
    assert rank_for_energy(variance, 0.25).tolist() == [1, 1]
    assert rank_for_energy(variance, 1e-9).tolist() == [1, 1]
    assert rank_for_energy(np.zeros(4), 0.9) in range(1, 5)


def test_effective_rank_of_known_spectra():
    assert effective_rank(np.ones(8)) == pytest.approx(8)
    assert effective_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert np.isfinite(effective_rank(np.zeros(3)))

"""The operations whose semantics could differ between array libraries."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from spectral_kv_core.arrays import ops as core_ops
from spectral_kv_core.arrays.kernels import Kernels
from spectral_kv_core.arrays.namespace import ArrayNamespace

X = np.random.default_rng(0).standard_normal((2, 3, 21, 4)).astype(np.float32)


@pytest.mark.parametrize("axis", [-1, -2, 1])
def test_sorts_and_sums_run_along_an_axis(xp, axis):
    x = xp.asarray(X)
    np.testing.assert_array_equal(xp.to_numpy(xp.sort(x, axis=axis)), np.sort(X, axis=axis))
    np.testing.assert_array_equal(xp.to_numpy(xp.argsort(x, axis=axis)), np.argsort(X, axis=axis))
    got = xp.to_numpy(xp.cumulative_sum(x, axis=axis))
    np.testing.assert_allclose(got, np.cumsum(X, axis=axis), rtol=1e-5, atol=1e-5)


def test_equal_entries_stay_in_their_order(xp):
    x = np.random.default_rng(0).integers(0, 3, (4, 5000))
    np.testing.assert_array_equal(xp.to_numpy(xp.argsort(xp.asarray(x), axis=-1)), np.argsort(x, -1, kind="stable"))


def test_indices_are_broadcast_and_may_be_int32(xp):
    index = np.random.default_rng(0).integers(0, 21, (2, 3, 6, 1)).astype(np.int32)
    got = xp.take_along_axis(xp.asarray(X), xp.asarray(index), axis=2)
    np.testing.assert_array_equal(xp.to_numpy(got), np.take_along_axis(X, index, axis=2))


@pytest.mark.parametrize("count", [1, 2, 20, 21])
@pytest.mark.parametrize("axis", [-1, 2])
def test_real_transforms(xp, count, axis):
    x = X[:, :, :count] if axis == 2 else np.moveaxis(X[:, :, :count], 2, -1)
    spectrum = xp.rfft(xp.asarray(x), axis=axis)
    back = xp.irfft(spectrum, n=count, axis=axis)
    assert back.dtype == xp.float32
    np.testing.assert_allclose(xp.to_numpy(back), x, rtol=1e-5, atol=1e-6)
    mask = np.zeros(count // 2 + 1, np.float32)
    mask[-1] = 1  # what is left tells one frequency from the others
    mask = mask[:, None] if axis == 2 else mask
    got = xp.to_numpy(xp.irfft(spectrum * xp.asarray(mask), n=count, axis=axis))
    expected = np.fft.irfft(np.fft.rfft(x.astype(np.float64), axis=axis) * mask, n=count, axis=axis)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_zeros_are_float32(xp):
    assert xp.zeros((2, 3)).dtype == xp.float32 and xp.zeros((2,), dtype=xp.int32).dtype == xp.int32


@pytest.mark.parametrize("name", [name for name in vars(Kernels) if not name.startswith("_")])
def test_kernels_are_those_of_the_protocol(xp, name):
    """With the same arguments, behind which a backend may have some of its own; NumPy has none."""
    if xp.kernels is None:
        assert xp.__name__ == "spectral_kv_core.arrays.ops"
        return
    _, *expected = inspect.signature(getattr(Kernels, name)).parameters.values()
    found = list(inspect.signature(getattr(xp.kernels, name)).parameters.values())
    assert [(p.name, p.default) for p in found[: len(expected)]] == [(p.name, p.default) for p in expected]
    assert all(p.default is not p.empty for p in found[len(expected) :])


def test_the_protocol_of_a_namespace_names_what_every_library_gives(xp):
    assert sorted(ArrayNamespace.__annotations__) == sorted(core_ops.__all__)
    assert [name for name in ArrayNamespace.__annotations__ if not hasattr(xp, name)] == []

"""Packing of codes, Lloyd-Max tables, and grouped affine quantization."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.quantization.packing import append_rows, lowest_bits, pack, pack_rows, unpack, unpack_rows
from spectral_kv_core.quantization.quantizer import (
    BIT_WIDTHS,
    CELLS,
    CoefficientTables,
    dequantize_affine,
    empirical_tables,
    flat_tables,
    gaussian_tables,
    lloyd_max,
    quantize_affine,
    thresholds,
)

WIDTHS = range(1, 9)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def random_codes(bits: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@quick
@given(bits=st.sampled_from(WIDTHS), n=st.integers(0, 41), rows=st.integers(1, 3))
def test_unpack_inverts_pack(xp, bits, n, rows):
    codes = random_codes(bits, rows, 2, n, seed=n)
    packed = pack(xp, xp.asarray(codes), bits)
    assert tuple(packed.shape) == (rows, 2, -(-n // 8), bits)
    np.testing.assert_array_equal(xp.to_numpy(packed), pack(ops, codes, bits))
    assert xp.to_numpy(packed).dtype == np.uint8
    np.testing.assert_array_equal(xp.to_numpy(unpack(xp, packed, bits, n)), codes)


@quick
@given(bits=st.sampled_from(WIDTHS), n=st.integers(1, 35), rows=st.integers(1, 5), batch=st.integers(1, 2))
def test_rows_take_whole_units_and_one_rest(xp, bits, n, rows, batch):
    codes = random_codes(bits, batch, rows, n, seed=n)
    packed = pack_rows(xp, xp.asarray(codes), bits)
    units, rest = map(xp.to_numpy, packed)
    assert units.nbytes == batch * rows * (n // 8) * bits
    assert rest.nbytes == batch * -(-rows * (n % 8) // 8) * bits
    for got, expected in zip((units, rest), pack_rows(ops, codes, bits)):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(xp.to_numpy(unpack_rows(xp, packed, bits, n)), codes)


@quick
@given(bits=st.sampled_from(WIDTHS), pieces=st.lists(st.integers(1, 19), min_size=1, max_size=5))
def test_rows_appended_in_pieces_equal_rows_packed_at_once(xp, bits, pieces):
    codes = random_codes(bits, 2, 3, sum(pieces), seed=len(pieces))
    n = pieces[0]
    packed = pack_rows(xp, xp.asarray(codes[:, :, :n]), bits)
    for piece in pieces[1:]:
        packed = append_rows(xp, packed, n, xp.asarray(codes[:, :, n : n + piece]), bits)
        n += piece
    for got, expected in zip(packed, pack_rows(ops, codes, bits)):
        np.testing.assert_array_equal(xp.to_numpy(got), expected)


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_width_is_refused(bits):
    with pytest.raises(ValueError, match="between 1 and 8"):
        pack(ops, np.zeros(8, np.uint8), bits)


# Max 1960 (IRE Trans. IT 6), table I: positive levels and mean squared error
MAX_1960 = {
    1: ([0.7979], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


def gaussian_distortion(levels: np.ndarray) -> float:
    x = np.linspace(-9, 9, 180_001)
    density = np.exp(-(x**2) / 2)
    nearest = levels[np.searchsorted(thresholds(levels), x)]
    return float((np.square(x - nearest) * density).sum() / density.sum())


@pytest.fixture(scope="module")
def tables():
    return gaussian_tables()


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_levels_are_the_published_ones(tables, bits):
    levels, distortion = MAX_1960[bits]
    np.testing.assert_allclose(tables[bits], [*(-np.array(levels[::-1])), *levels], rtol=5e-3)
    assert gaussian_distortion(tables[bits]) == pytest.approx(distortion, rel=1e-3)


def test_distortion_falls_to_the_high_rate_limit(tables):
    distortion = {bits: gaussian_distortion(tables[bits]) for bits in BIT_WIDTHS if bits}
    assert list(distortion.values()) == sorted(distortion.values(), reverse=True)
    panter_dite = np.sqrt(3) * np.pi / 2
    for bits in (6, 8):  # the grid of the thresholds costs 2 % at 8 bits
        assert 0.85 * panter_dite < distortion[bits] * 4**bits < 1.03 * panter_dite


def test_empirical_tables_of_a_uniform_density_are_uniform():
    for bits, levels in empirical_tables(np.ones(4096), 1.0).items():
        expected = (np.arange(2**bits) + 0.5) / 2 ** (bits - 1) - 1
        np.testing.assert_allclose(levels, expected, atol=1e-3)
        np.testing.assert_array_equal(levels, -levels[::-1])


def test_fewer_values_than_levels_still_gives_ascending_levels():
    levels = lloyd_max(np.array([-1.0, 1.0]), np.ones(2), 3)
    assert np.all(np.diff(levels) >= 0)
    assert {-1.0, 1.0} <= set(np.round(levels, 5).tolist())


def test_codes_and_levels_are_the_same_everywhere(xp, tables):
    """Rows of all widths at once, in one [F, R] table: a row with no bits, and values on and beyond the thresholds."""
    widths = np.array(BIT_WIDTHS).reshape(2, 4)
    x = np.random.default_rng(0).standard_normal((3, 700, 2, 4)).astype(np.float32) * 2
    for f, r in np.ndindex(2, 4):
        if widths[f, r]:
            edges = thresholds(tables[widths[f, r]])
            x[0, : len(edges), f, r] = edges  # exactly on a threshold: the upper level
    x[1, :4] = np.array([3e38, -3e38, 0.0, -0.0], np.float32)[:, None, None]
    rows, reference = (
        CoefficientTables(o, tuple(map(o.asarray, flat_tables(tables, tables))), widths) for o in (xp, ops)
    )
    codes, expected = rows.quantize(xp.asarray(x)), reference.quantize(x)
    np.testing.assert_array_equal(xp.to_numpy(codes), expected)
    got = xp.to_numpy(rows.dequantize(codes))
    one = xp.to_numpy(rows.quantize(xp.asarray(x[:, :, 1]), 1))
    np.testing.assert_array_equal(one, expected[:, :, 1])
    np.testing.assert_array_equal(xp.to_numpy(rows.dequantize(xp.asarray(one), 1)), got[:, :, 1])
    for f, r in np.ndindex(2, 4):
        bits, code, row = widths[f, r], expected[..., f, r], x[..., f, r]
        if not bits:
            assert not code.any() and not got[..., f, r].any()
            continue
        levels = tables[bits]
        np.testing.assert_array_equal(code[0, : 2**bits - 1], np.arange(1, 2**bits))
        assert tuple(code[1, :2]) == (2**bits - 1, 0)
        np.testing.assert_array_equal(got[..., f, r], levels[code])
        inside = np.abs(row) < levels[-1]
        brute = np.abs(row[inside][:, None] - levels).min(1)
        assert np.all(np.abs(row - got[..., f, r])[inside] <= brute + 2 / CELLS)


def affine_formula(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    out = np.empty_like(x)
    for row in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], group):
            part = x[row][start : start + group]
            scale = np.float32(np.float16((part.max() - part.min()) / (2**bits - 1)))
            bias = np.float32(np.float16(part.min()))
            out[row][start : start + group] = np.clip(np.rint((part - bias) / scale), 0, 2**bits - 1) * scale + bias
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_is_the_formula(xp, bits):
    x = np.random.default_rng(bits).standard_normal((2, 3, 5, 128)).astype(np.float32)
    codes, scale, bias = quantize_affine(xp, xp.asarray(x), bits, 64)
    assert scale.dtype == bias.dtype == xp.float16 and tuple(scale.shape) == (2, 3, 5, 2)
    assert xp.to_numpy(codes).max() == 2**bits - 1
    got = xp.to_numpy(dequantize_affine(xp, codes, scale, bias))
    assert_close("affine", got, affine_formula(x, bits, 64))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_errs_no_more_than_mlx(bits):
    mx = pytest.importorskip("mlx.core")
    x = np.random.default_rng(bits).standard_normal((200, 128)).astype(np.float32)
    ours = dequantize_affine(ops, *quantize_affine(ops, x, bits, 64))
    theirs = mx.dequantize(*mx.quantize(mx.array(x), group_size=64, bits=bits), group_size=64, bits=bits)
    ours, theirs = relative_rms(ours, x), relative_rms(np.array(theirs), x)
    assert 0.5 * theirs < ours < 1.15 * theirs  # at 2 bits theirs clips one end and gains 12 %


@pytest.mark.parametrize("value", [0.0, -3.25, 1e-7, 60000.0])
def test_affine_of_a_constant_group_gives_the_constant(xp, value):
    x = np.full((2, 64), value, np.float32)
    got = xp.to_numpy(dequantize_affine(xp, *quantize_affine(xp, xp.asarray(x), 4, 64)))
    np.testing.assert_allclose(got, x, rtol=1e-3, atol=1e-6)


def test_affine_of_huge_values_stays_within_a_step(xp):
    x = np.random.default_rng(0).uniform(-6e4, 6e4, (4, 64)).astype(np.float32)
    got = xp.to_numpy(dequantize_affine(xp, *quantize_affine(xp, xp.asarray(x), 8, 64)))
    assert np.abs(got - x).max() < 1.2e5 / 255


@pytest.mark.parametrize("bits", range(1, 7))
def test_lowest_bits_of_packed_codes(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 24), np.uint8)
    packed = pack(ops, codes, bits)
    np.testing.assert_array_equal(lowest_bits(packed, bits)[..., None], pack(ops, codes & 1, 1))


def test_bytes_have_no_lowest_bits_side_by_side():
    with pytest.raises(ValueError, match="fewer than 8 bits"):
        lowest_bits(np.zeros((1, 8), np.uint8), 8)

"""Step tables, the quantizer they describe, and the entropy-coded streams."""

from __future__ import annotations

import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, assert_codes_close

from spectral_kv_core.arrays import ops
from spectral_kv_core.quantization.entropy import (
    DROP,
    RATES,
    TOTAL,
    StepTable,
    decode_streams,
    dequantize_steps,
    encode_streams,
    quantize_steps,
    step_table,
    step_tables,
)

pytest.importorskip("constriction")
LIMIT, HEADER = 12.0, 24
CENTRES = (np.arange(6000) + 0.5) * (LIMIT / 6000)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def student_histogram() -> np.ndarray:
    """Counts of a Student t density with 5 degrees of freedom and variance 1, from exact arithmetic alone."""
    share = 1 / (1 + CENTRES * CENTRES / 3)
    return np.floor(1e7 * share * share * share).astype(np.int64)


def gaussian_histogram() -> np.ndarray:
    return np.round(1e7 * np.exp(-np.square(CENTRES) / 2)).astype(np.int64)


HISTOGRAMS = {
    "student": student_histogram(),
    "gaussian": gaussian_histogram(),
    "few": np.bincount(np.random.default_rng(0).exponential(400, 500).astype(int).clip(0, 5999), minlength=6000),
}
STUDENT = step_tables(HISTOGRAMS["student"], LIMIT)


@pytest.fixture(params=HISTOGRAMS)
def tables(request) -> list[StepTable]:
    return step_tables(HISTOGRAMS[request.param], LIMIT)


def samples(histogram: np.ndarray, n: int) -> np.ndarray:
    """`n` values spread evenly over the probability of a mirrored histogram, in random order."""
    mass = np.concatenate([[0], np.cumsum(histogram)]) / histogram.sum()
    x = np.interp((np.arange(n) + 0.5) / n, mass, np.arange(len(mass)) * (LIMIT / len(histogram)))
    rng = np.random.default_rng(0)
    return rng.permutation(x * np.where(np.arange(n) % 2, 1, -1)).astype(np.float32)


def quantized(x: np.ndarray, table: StepTable) -> np.ndarray:
    return quantize_steps(ops, x, table.step, table.offset, table.limit)


def test_tables_are_convex_from_dropped_to_fine(tables):
    rate, mse = np.array([t.rate for t in tables]), np.array([t.mse for t in tables])
    assert tables[0] is DROP and (rate[0], mse[0], DROP.limit) == (0, 1, 0)
    assert (np.diff(rate) > 0).all() and (np.diff(mse) < 0).all()
    slope = -np.diff(mse) / np.diff(rate)
    assert (np.diff(slope) < 0).all(), slope


@pytest.mark.parametrize("name", ["student", "gaussian"])
def test_tables_cover_the_wanted_rates(name):
    rate = np.array([t.rate for t in step_tables(HISTOGRAMS[name], LIMIT)[1:]])
    assert len(rate) == len(RATES)
    assert np.abs(rate - RATES).max() < 0.08


def test_every_symbol_can_be_coded(tables):
    for t in tables[1:]:
        assert (t.limit + 1 - t.offset) * t.step >= LIMIT, "the last cell holds the limit"
        assert t.levels.dtype == np.float32 and t.levels[0] == 0
        assert t.frequencies.dtype == np.int64 and t.frequencies.shape == (2 * t.limit + 1,)
        assert t.frequencies.min() >= 1 and t.frequencies.sum() == TOTAL
        np.testing.assert_array_equal(t.frequencies, t.frequencies[::-1])


def test_levels_lie_in_their_cells(tables):
    for t in tables[1:]:
        codes = np.arange(-t.limit, t.limit + 1)
        np.testing.assert_array_equal(quantized(dequantize_steps(ops, codes, t.levels), t), codes)


def test_cells_without_counts_decode_to_their_middle():
    histogram = np.zeros(6000, np.int64)
    histogram[:1000] = 1  # up to 2 sigma
    t = step_table(histogram, LIMIT, 0.5, 0.3)
    np.testing.assert_allclose(t.levels[5:], (np.arange(5, t.limit + 1) + 0.2) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(t.levels[1:4], (np.arange(1, 4) + 0.2) * 0.5, rtol=1e-6)  # uniform: the same
    assert t.levels[4] == pytest.approx((3.7 * 0.5 + 2) / 2)  # the density ends inside this cell
    codes = 2 * t.limit + 1  # half a count for each: Krichevsky and Trofimov 1981
    assert set(t.frequencies[t.limit + 5 :]) == {1 + int(0.5 / (1000 + codes / 2) * (TOTAL - codes))}


def test_golden_tables():
    # The last two columns depend on no logarithm and must be the same everywhere: profiles may rebuild them.
    got = [
        (t.step, t.offset, t.rate, t.mse, zlib.crc32(t.frequencies.astype("<i8")), zlib.crc32(t.levels.astype("<f4")))
        for t in (STUDENT[i] for i in (1, 7, 14, 21))
    ]
    assert got == GOLDEN


GOLDEN = [
    (4.695, 0.15, 0.0384414329, 0.905789867, 2220815146, 2906634219),
    (1.66, 0.35, 1.0842322, 0.266236473, 2886242521, 2173131957),
    (0.2934, 0.5, 3.75460991, 0.00714507095, 1013582168, 2023839419),
    (0.01682, 0.5, 7.87281631, 2.36920505e-05, 2874353117, 2057191957),
]


@pytest.mark.parametrize("name", ["student", "gaussian"])
def test_rate_and_error_are_those_of_samples(name):
    x = samples(HISTOGRAMS[name], 200_000)
    for t in step_tables(HISTOGRAMS[name], LIMIT)[1:]:
        codes = quantized(x, t)
        error = np.mean(np.square(x - dequantize_steps(ops, codes, t.levels), dtype=np.float64)) / np.mean(np.square(x))
        assert error == pytest.approx(t.mse, rel=5e-3)
        assert t.code_lengths[np.abs(codes)].mean() == pytest.approx(t.rate, rel=5e-3, abs=1e-3)


def test_gaussian_rates_are_as_theory_says():
    # Gish and Pierce 1968: fine uniform steps cost log2(pi e / 6) / 2 over the rate-distortion bound, coarse ones less
    excess = [t.rate + np.log2(t.mse) / 2 for t in step_tables(HISTOGRAMS["gaussian"], LIMIT)]
    bound = np.log2(np.pi * np.e / 6) / 2
    assert min(excess) >= 0 and max(excess) < bound + 1e-3
    np.testing.assert_allclose(excess[-8:], bound, atol=1e-3)


def test_histograms_that_say_nothing_are_refused():
    for histogram in (np.zeros(8), np.array([5, 0, 0]), np.array([1, -1, 3]), np.array([1, np.nan])):
        with pytest.raises(ValueError, match="Expected a histogram"):
            step_tables(histogram, LIMIT)
    for step, offset in ((0.0, 0.5), (1.0, 0.6), (1.0, 0.0), (30.0, 0.5)):
        with pytest.raises(ValueError, match="dead zone"):
            step_table(HISTOGRAMS["few"], LIMIT, step, offset)
    with pytest.raises(ValueError, match="int16"):
        step_table(HISTOGRAMS["few"], LIMIT, 1e-4, 0.5)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 257)], ids=str)
@pytest.mark.parametrize("index", [0, 1, 7, 21])
def test_quantize_and_dequantize_on_every_library(xp, shape, index):
    t = STUDENT[index]
    x = np.float32(2) * np.random.default_rng(index).standard_normal(shape).astype(np.float32)
    codes = quantize_steps(xp, xp.asarray(x), t.step, t.offset, t.limit)
    got = xp.to_numpy(codes)
    assert got.dtype == np.int32 and got.shape == shape
    formula = np.clip(np.floor(np.abs(x.astype(np.float64)) / t.step + t.offset), 0, t.limit)
    assert_codes_close("codes", got, np.sign(x) * formula)
    decoded = xp.to_numpy(dequantize_steps(xp, codes, xp.asarray(t.levels)))
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, np.sign(got) * t.levels[np.abs(got)])


def test_steps_may_differ_by_row(xp):
    rows = [STUDENT[i] for i in (0, 3, 12)]
    x = 3 * np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    step, offset, limit = (
        xp.asarray(np.array([[getattr(t, name)] for t in rows], np.float32)) for name in ("step", "offset", "limit")
    )
    codes = xp.to_numpy(quantize_steps(xp, xp.asarray(x), step, offset, limit))
    for i, t in enumerate(rows):
        assert_codes_close(f"row {i}", codes[:, i], quantized(x[:, i], t))


def test_extremes_are_clipped(xp):
    x = np.array([0.0, -0.0, 1e30, -1e30, 12.5, -1e-30], np.float32)
    for t in STUDENT[1:]:
        codes = xp.to_numpy(quantize_steps(xp, xp.asarray(x), t.step, t.offset, t.limit))
        np.testing.assert_array_equal(codes, [0, 0, t.limit, -t.limit, t.limit, 0])


def test_int16_codes_are_dequantized(xp):
    t = STUDENT[20]
    codes = np.array([-t.limit, -1, 0, 1, t.limit], np.int16)
    got = xp.to_numpy(dequantize_steps(xp, xp.asarray(codes), xp.asarray(t.levels)))
    assert_close("levels", got, [-t.levels[-1], -t.levels[1], 0, t.levels[1], t.levels[-1]], limit=0)


@quick
@given(data=st.data())
def test_decode_inverts_encode(data):
    chosen = data.draw(st.lists(st.sampled_from(STUDENT), max_size=5))
    codes = [
        np.array(
            data.draw(st.lists(st.sampled_from([-t.limit, -1, 0, 1, t.limit]) if t.limit else st.just(0))), np.int32
        )
        for t in chosen
    ]
    codes = [np.clip(c, -t.limit, t.limit) for c, t in zip(codes, chosen)]
    decoded = decode_streams(encode_streams(codes, chosen), [len(c) for c in codes], chosen)
    assert len(decoded) == len(codes)
    for got, expected in zip(decoded, codes):
        assert got.dtype == np.int16
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_every_code_of_every_table_survives(dtype):
    codes = [np.arange(-t.limit, t.limit + 1) for t in STUDENT]
    codes = [c[np.abs(c) <= np.iinfo(dtype).max].astype(dtype) for c in codes]
    data = encode_streams([c[:, None] for c in codes], STUDENT)  # any shape, in C order
    for got, expected in zip(decode_streams(data, [len(c) for c in codes], STUDENT), codes):
        np.testing.assert_array_equal(got, expected)


def test_nothing_takes_a_header_only():
    empty = [np.zeros(0, np.int16)] * len(STUDENT)
    assert len(encode_streams(empty, STUDENT)) == len(encode_streams([], [])) == HEADER
    assert decode_streams(encode_streams([], []), [], []) == []
    dropped = encode_streams([np.zeros(1000, np.int16)], [DROP])
    assert len(dropped) == HEADER
    np.testing.assert_array_equal(decode_streams(dropped, [1000], [DROP])[0], np.zeros(1000))


def test_golden_stream():
    # pins the format and how the coder rounds probabilities: a library that codes differently must fail here
    table = STUDENT[9]
    codes = np.array([0, 1, -1, 0, 0, 2, -3, 0, table.limit, -table.limit, 0, 0, 1])
    data = encode_streams([codes, np.array([3])], [table, STUDENT[12]])
    assert data.hex() == GOLDEN_STREAM


GOLDEN_STREAM = "534b4531030000000e000000000000009c22672cab5ee03ef8ffff69dd315a3688432000"


@pytest.mark.parametrize("name", ["student", "gaussian"])
def test_bytes_are_near_the_cross_entropy(name):
    histogram = HISTOGRAMS[name]
    x = samples(histogram, 100_000)
    total = ideal = 0.0
    for t in step_tables(histogram, LIMIT)[1:]:
        codes = quantized(x, t)
        length = t.code_lengths[np.abs(codes)].sum() / 8
        size = len(encode_streams([codes], [t])) - HEADER
        assert -4 <= size - length <= 8 + 1e-4 * length, f"{size} bytes for {length:.1f} at rate {t.rate}"
        total, ideal = total + size, ideal + t.rate * len(x) / 8
    assert total == pytest.approx(ideal, rel=0.01)


def test_truncated_and_altered_data_are_refused():
    table = STUDENT[9]
    data = encode_streams([np.random.default_rng(0).integers(-2, 3, 40)], [table])
    cases = [(data[:n], "bytes or more that start with") for n in range(HEADER)]
    cases += [(data[:n], f"Expected {len(data)} bytes .* received {n}: truncated") for n in range(HEADER, len(data))]
    cases += [(data + bytes(4), "truncated or altered")]
    for i in range(len(data)):
        altered = data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]
        cases += [(altered, "that start with" if i < 4 else "truncated or altered" if i < 8 else "valid checksum")]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            decode_streams(changed, [40], [table])
            pytest.fail(f"accepted {changed.hex()} for {data.hex()}")


def test_other_counts_and_tables_are_refused():
    chosen = [STUDENT[9], STUDENT[9]]
    data = encode_streams([np.array([1, -1, 0]), np.array([2])], chosen)
    with pytest.raises(ValueError, match="add up to the 4 codes in the data, received 5"):
        decode_streams(data, [3, 2], chosen)
    for counts, tables in (([2, 2], chosen), ([3, 1], [STUDENT[9], STUDENT[10]]), ([3, 1], [STUDENT[9], DROP])):
        with pytest.raises(ValueError, match="same tables and counts"):
            decode_streams(data, counts, tables)
    for counts in ([4], [5, -1]):
        with pytest.raises(ValueError, match="one count >= 0 for each of 2 tables"):
            decode_streams(data, counts, chosen)


def test_codes_that_a_table_lacks_are_refused():
    limit = STUDENT[9].limit
    for codes in ([limit + 1], [0, -limit - 1], [2**40]):
        with pytest.raises(ValueError, match=f"table 1 between -{limit} and {limit}"):
            encode_streams([np.zeros(1, int), np.array(codes)], [DROP, STUDENT[9]])
    with pytest.raises(ValueError, match="integer codes for table 0, received float64"):
        encode_streams([np.array([0.5])], [STUDENT[9]])
    with pytest.raises(ValueError, match="zip"):
        encode_streams([np.array([0])], STUDENT)


def test_without_constriction_the_package_is_named(monkeypatch):
    data = encode_streams([np.array([1])], [STUDENT[9]])
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pip install constriction"):
        encode_streams([np.array([1])], [STUDENT[9]])
    with pytest.raises(ImportError, match=r"pip install constriction"):
        decode_streams(data, [1], [STUDENT[9]])

"""Token scorers: every formula against a slow reference of its own, alike on three libraries, and what may change."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import pywt
from cases import ToyModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import Rope, rotate
from spectral_kv_core.calibration.moments import QueryMoments
from spectral_kv_core.profile.profile import QueryStatistics
from spectral_kv_core.scorers import SCORERS, Tokens, get_scorer
from spectral_kv_core.scorers.fourierkv import low_pass, tukey
from spectral_kv_core.scorers.terms import ranks, with_terms, zscore
from spectral_kv_core.scorers.waveletfourierkv import FRAME, nonstationarity, octaves, windowed_filter
from spectral_kv_core.scorers.waveletkv import band_energies, band_gains, bands, filter_bank, num_levels, reach

NAMES = list(SCORERS)
QUERY_BLIND = ["fourierkv", "waveletkv", "waveletfourierkv"]
LENGTHS = [1, 2, 7, 16, 63, 257]
WAVELETS = ["haar", "db2", "db4", "sym4", "bior2.2", "bior1.3", "coif1", "rbio3.1"]
ROPES = {
    "half": Rope(tuple(10000.0 ** (-np.arange(0, 16, 2) / 16))),
    "interleaved": Rope(tuple(10000.0 ** (-np.arange(0, 16, 2) / 16)), interleaved=True),
    "partial": Rope(tuple(10000.0 ** (-np.arange(0, 8, 2) / 8))),
    "scaled": Rope(tuple(10000.0 ** (-np.arange(0, 16, 2) / 16)), scaling=1.3),
    "none": None,
}
every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
every_scorer = pytest.mark.parametrize("name", NAMES)


@cache
def text(tokens: int, batch: int = 2, heads: int = 2, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Vectors [B, H, T, D] float32 with a mean and a memory, so that neighbors are alike."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, batch, heads, dim))
    for t in range(1, tokens):
        x[t] = 0.7 * x[t - 1] + 0.7 * x[t]
    return np.moveaxis(x + 0.5 * rng.standard_normal((heads, dim)), 0, 2).astype(np.float32)


@cache
def statistics(rope: Rope | None, heads: int = 2, group: int = 3, dim: int = 16) -> QueryStatistics:
    """Statistics of one layer as the profiler makes them, from queries after RoPE."""
    rng = np.random.default_rng(1)
    queries = 0.4 * rng.standard_normal((heads * group, 200, dim)) + 0.3 * rng.standard_normal((heads * group, 1, dim))
    moments = QueryMoments(heads, rope)
    moments.update(queries.astype(np.float32) if rope is None else rotate(ops, queries, rope, 0))
    return QueryStatistics(*moments.result())


def tokens_of(xp, keys: np.ndarray, rope: Rope | None = ROPES["half"], positions=None, **fields) -> Tokens:
    """Everything that any scorer needs, for post-RoPE `keys`; queries are the last rows of another text."""
    batch, heads, count, dim = keys.shape
    queries = statistics(rope, heads, dim=dim)
    recent = np.tile(text(max(count, 1), batch, heads, dim, seed=5), (1, 3, 1, 1))[:, :, -5:]
    given = {
        "values": xp.asarray(text(count, batch, heads, dim, seed=6)),
        "query_mean": queries.mean,
        "query_root": queries.root,
        "query_amplitude": queries.amplitude,
        "recent": xp.asarray(recent),
    }
    return Tokens(xp, xp.asarray(keys), positions=positions, rope=rope, **{**given, **fields})


def scored(xp, name: str, tokens: Tokens, **options) -> np.ndarray:
    return xp.to_numpy(SCORERS[name](tokens, **options))


# --- every scorer ---------------------------------------------------------------------------------------------------


@every_scorer
@pytest.mark.parametrize("count", LENGTHS)
def test_shape_dtype_and_numbers(xp, name, count):
    got = SCORERS[name](tokens_of(xp, text(count)))
    assert tuple(got.shape) == (2, 2, count) and got.dtype == xp.float32
    assert np.isfinite(xp.to_numpy(got)).all()


@every_scorer
@pytest.mark.parametrize("count", [5, 130])
def test_libraries_agree(xp, name, count):
    expected = SCORERS[name](tokens_of(ops, text(count)))
    assert_close(name, scored(xp, name, tokens_of(xp, text(count))), expected)


@every_scorer
def test_no_token_no_score(xp, name):
    assert SCORERS[name](tokens_of(xp, text(0))).shape[-1] == 0


@every_scorer
def test_rows_of_a_batch_are_independent(name):
    keys, alone = text(70), slice(1, 2)
    whole = tokens_of(ops, keys)
    row = tokens_of(ops, keys[alone], values=whole.values[alone], recent=whole.recent[alone])
    np.testing.assert_allclose(scored(ops, name, row)[0], scored(ops, name, whole)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SCORERS.keys() - {"random"}))  # which scores a head by its number
def test_heads_can_be_permuted(name):
    whole = tokens_of(ops, text(70))

    def flip(x, axis):
        groups = np.reshape(x, (*x.shape[:axis], 2, -1, *x.shape[axis + 1 :]))
        return np.flip(groups, axis).reshape(x.shape)

    flipped = tokens_of(
        ops,
        flip(whole.post_rope, 1),
        values=flip(whole.values, 1),
        recent=flip(whole.recent, 1),
        query_mean=flip(whole.query_mean, 0),
        query_root=flip(whole.query_root, 0),
        query_amplitude=flip(whole.query_amplitude, 0),
    )
    np.testing.assert_allclose(
        scored(ops, name, flipped), scored(ops, name, whole)[:, ::-1], rtol=1e-5, atol=1e-6, err_msg=name
    )


@every_scorer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_scored_in_float32(name, dtype):
    torch = pytest.importorskip("torch")
    from spectral_kv_torch import ops as xp

    whole = tokens_of(xp, text(70))
    halves = {key: getattr(whole, key).to(getattr(torch, dtype)) for key in ("post_rope", "values", "recent")}
    low = tokens_of(xp, text(70), **{k: v for k, v in halves.items() if k != "post_rope"})
    low = Tokens(**{**low.__dict__, "post_rope": halves["post_rope"]})
    same = tokens_of(
        xp, xp.to_numpy(halves["post_rope"]), values=halves["values"].float(), recent=halves["recent"].float()
    )
    got = SCORERS[name](low)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(xp.to_numpy(got), scored(xp, name, same))


@pytest.mark.parametrize("name", [*QUERY_BLIND, "keydiff", "knorm"])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_constant_keys_are_all_alike(xp, name, wavelet):
    keys = np.broadcast_to(np.float32([0.3, -1.7, 2.1, 0.9]), (1, 2, 150, 4))
    options = {"wavelet": wavelet} if name.startswith("wavelet") else {"norm": 0} if name == "fourierkv" else {}
    got = scored(xp, name, tokens_of(xp, np.ascontiguousarray(keys), rope=None), **options)
    edge = FRAME if name == "waveletfourierkv" else 0  # frames that reach over the end of the text see a step there
    inner = got[:, :, edge : 150 - edge]
    assert np.ptp(inner) <= 1e-4 * max(np.abs(inner).max(), 1e-2)


@every_scorer
def test_arguments_are_left_alone(name):
    tokens = tokens_of(ops, text(70).copy())
    before = {key: np.array(value) for key, value in tokens.__dict__.items() if isinstance(value, np.ndarray)}
    SCORERS[name](tokens)
    for key, value in before.items():
        np.testing.assert_array_equal(getattr(tokens, key), value, err_msg=key)


def test_missing_fields_and_names():
    bare = Tokens(ops, text(9))
    with pytest.raises(ValueError, match="Expected query_mean, query_amplitude for the scorer triattention"):
        SCORERS["triattention"](bare)
    with pytest.raises(ValueError, match="a scorer among fourierkv, waveletkv, .*, random, received 'fourier'"):
        get_scorer("fourier")
    with pytest.raises(ValueError, match="positions"):
        Tokens(ops, text(9), positions=np.arange(8))
    assert get_scorer("knorm").name == "knorm"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fourierkv", {"band": "middle"}, "low.*high.*'middle'"),
        ("fourierkv", {"recency": 0.6, "norm": -0.6}, "recency=0.6, norm=-0.6"),
        ("waveletkv", {"wavelet": "db99"}, "haar, db, sym, coif, bior, rbio, dmey, such as db2 .*'db99'"),
        ("waveletfourierkv", {"wavelet": "mexh"}, "a discrete wavelet .*'mexh'"),
        ("wavelettriattention", {"wavelet": None}, "received None"),
        ("wavelettriattention", {"weight": 1.5}, "1.5"),
        ("triattention", {"pool": "median"}, "mean.*max.*'median'"),
        ("snapkv", {"kernel": 4}, "odd kernel, received 4"),
    ],
)
def test_bad_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        SCORERS[name](tokens_of(ops, text(9)), **options)


# --- terms ----------------------------------------------------------------------------------------------------------


def test_terms_weigh_rank_age_and_norm(xp):
    rng = np.random.default_rng(0)
    scores, keys = rng.standard_normal((2, 3, 40)).astype(np.float32), text(40, heads=3)
    rank = np.array([[[np.sum(row < s) for s in row] for row in head] for head in scores]) / 39
    length = np.linalg.norm(keys, axis=-1)
    norm_rank = np.array([[[np.sum(row < s) for s in row] for row in head] for head in length]) / 39
    expected = 0.5 * rank + 0.2 * np.arange(40) / 39 - 0.3 * norm_rank
    got = with_terms(xp, xp.asarray(scores), xp.asarray(keys), recency=0.2, norm=-0.3)
    assert_close("blend", xp.to_numpy(got), expected)
    same = xp.asarray(scores)
    assert with_terms(xp, same, xp.asarray(keys)) is same


@pytest.mark.parametrize("name", [*QUERY_BLIND, "wavelettriattention"])
def test_terms_are_options_of_the_spectral_scorers(name):
    tokens = tokens_of(ops, text(70))
    assert np.all(scored(ops, name, tokens, recency=1.0, norm=0).argsort(-1) == np.arange(70))
    shortest = np.linalg.norm(text(70), axis=-1).argmin(-1)
    np.testing.assert_array_equal(scored(ops, name, tokens, norm=-1.0).argmax(-1), shortest)


def test_ranks_of_equal_scores_follow_the_order(xp):
    got = xp.to_numpy(ranks(xp, xp.asarray(np.float32([[2, 1, 2, 1, 2]]))))
    np.testing.assert_allclose(got, [[0.5, 0, 0.75, 0.25, 1]])


@example(row=[0.0, 2e-28], shift=0.0)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=50), st.floats(-1e3, 1e3, width=32))
def test_zscore_has_mean_zero_and_size_one_or_is_flat(row, shift):
    x = np.float32([row]) + np.float32(shift)
    z = zscore(ops, x)
    rounding = 1e-3 + 1e-6 * np.abs(x).max() / max(x.std(), 1e-6)
    assert abs(z.mean()) < rounding and z.std() < 1 + rounding
    if x.std() > 1:
        assert z.std() > 0.99


def test_zscore_of_rounding_noise_is_small(xp):
    x = np.float32(1 / 3) + np.float32([[0, 1, 0, -1, 2]]) * np.float32(3e-8)
    assert np.abs(xp.to_numpy(zscore(xp, xp.asarray(x)))).max() < 0.3


# --- FourierKV ------------------------------------------------------------------------------------------------------


def slow_low_pass(x: np.ndarray, cutoff: float, roll: float) -> np.ndarray:
    """[T, D]: DFT as a sum, every frequency times its weight, and the sum back."""
    tokens, t = len(x), np.arange(len(x))
    out = np.zeros(x.shape, np.complex128)
    for m in range(tokens):
        frequency = 2 * min(m, tokens - m) / tokens  # share of Nyquist
        over = max(frequency / cutoff - 1, 0) / roll
        weight = 0.5 + 0.5 * np.cos(np.pi * over) if over < 1 else 0.0
        wave = np.exp(2j * np.pi * m * t / tokens)
        out += weight * wave[:, None] * (np.conj(wave) @ x) / tokens
    return out.real


@pytest.mark.parametrize("count", [1, 2, 37, 64])
@pytest.mark.parametrize(("cutoff", "roll"), [(0.25, 0.5), (0.6, 0.1), (0.05, 2.0)])
def test_fourier_equals_the_direct_sum(xp, count, cutoff, roll):
    keys = text(count)
    expected = {"low": np.zeros((2, 2, count)), "high": np.zeros((2, 2, count))}
    for b in range(2):
        for h in range(2):
            centered = keys[b, h].astype(np.float64) - keys[b, h].mean(0, dtype=np.float64)
            low = slow_low_pass(centered, cutoff, roll)
            expected["low"][b, h] = np.linalg.norm(low, axis=-1)
            expected["high"][b, h] = np.linalg.norm(centered - low, axis=-1)
    for band, answer in expected.items():
        got = scored(xp, "fourierkv", tokens_of(xp, keys, rope=None), band=band, cutoff=cutoff, roll=roll, norm=0)
        np.testing.assert_allclose(got, answer, rtol=1e-4, atol=2e-6, err_msg=band)


def test_full_band_passes_everything(xp):
    x = text(63)
    centered = x - x.mean(2, keepdims=True)
    assert_close("all", xp.to_numpy(low_pass(xp, xp.asarray(centered), 1.0, 0.5)), centered)
    centered = np.linalg.norm(centered, axis=-1)
    assert_close("low", scored(xp, "fourierkv", tokens_of(xp, x, rope=None), band="low", cutoff=1.0, norm=0), centered)
    high = scored(xp, "fourierkv", tokens_of(xp, x, rope=None), band="high", cutoff=1.0, norm=0)
    assert high.max() < 1e-5 * centered.max()


def test_short_text_has_no_low_band(xp):
    """Of five tokens only the mean is slow, and rounding must not rank them."""
    assert not scored(xp, "fourierkv", tokens_of(xp, text(5), rope=None), band="low", cutoff=0.25, norm=0).any()


@given(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 3))
def test_tukey_mask_is_flat_inside_and_falls_outside(first, second, roll):
    low, high = min(first, second), max(first, second) + 1e-3
    low = low if low > 1e-6 else 0.0
    f = np.linspace(0, 0.5, 201)
    mask = tukey(f, low, high, roll)
    assert mask.min() >= 0 and mask.max() <= 1
    np.testing.assert_array_equal(mask[(f >= low) & (f <= high)], 1)
    above = mask[f >= high]
    assert np.all(np.diff(above) <= 0) and np.all(mask[f > high * (1 + roll) + 1e-6] < 1e-6)
    assert np.all(np.diff(mask[f <= low]) >= 0) and np.all(mask[f < low / (1 + roll) - 1e-6] < 1e-6)


def test_tukey_mask_rings_less_than_a_sharp_edge():
    step = np.where(np.arange(512) < 256, 0.0, 1.0)[None, None, :, None].astype(np.float32)
    far = [np.abs(low_pass(ops, step - 0.5, 0.1, roll)[0, 0, 300:450, 0] - 0.5).max() for roll in (0.0, 0.5, 1.0)]
    assert far[2] < far[1] < far[0] / 3


# --- WaveletKV ------------------------------------------------------------------------------------------------------


def stationary_transform(x: np.ndarray, wavelet: str) -> list[np.ndarray]:
    """Bands of [T, D] by PyWavelets: its circular transform, far from the seam, moved to where ours are centered."""
    tokens, levels, bank = len(x), num_levels(len(x)), pywt.Wavelet(wavelet)
    if not levels:
        return [x]
    before = 256
    total = -(-(tokens + 2 * before) // 2**levels) * 2**levels
    padded = np.concatenate([np.repeat(x[:1], before, 0), x, np.repeat(x[-1:], total - tokens - before, 0)])
    found = pywt.swt(padded, wavelet, level=levels, axis=0)[::-1]  # fine to coarse, each level sqrt(2) times larger
    low, high = (np.flatnonzero(taps[::-1]) for taps in (bank.dec_lo, bank.dec_hi))  # the rest is filling

    def moved(band, level, steps):
        """`band`, of one `steps` of taps per filter of the cascade, by where PyWavelets has its first and last one."""
        first = sum(2**j * (taps[0] - (bank.dec_len // 2 - 1)) for j, taps in enumerate(steps))
        support = 1 + sum(2**j * (taps[-1] - taps[0]) for j, taps in enumerate(steps))
        return np.roll(band, support // 2 + first, 0)[before : before + tokens] / 2 ** (level / 2)

    details = [moved(found[j - 1][1], j, [low] * (j - 1) + [high]) for j in range(1, levels + 1)]
    return [*details, moved(found[-1][0], levels, [low] * levels)]


def test_haar_and_db2_are_the_closed_forms():
    """Daubechies 1992, Ten Lectures on Wavelets, table 6.1, and the quadrature mirror of the low-pass filter."""
    root = 3**0.5
    for names, low in (
        (("haar", "db1", "bior1.1"), (0.5, 0.5)),
        (("db2",), [c / 8 for c in (1 + root, 3 + root, 3 - root, 1 - root)]),
    ):
        for name in names:
            found = filter_bank(name)
            np.testing.assert_allclose(found[0], low, rtol=1e-12)
            np.testing.assert_allclose(found[1], [(-1) ** k * c for k, c in enumerate(reversed(low))], rtol=1e-12)


@pytest.mark.parametrize("name", pywt.wavelist(kind="discrete"))
def test_every_discrete_wavelet_is_a_filter_bank(name):
    """A mean and what departs from it, without the zeros that fill a filter up, centered alike."""
    low, high = filter_bank(name)
    assert sum(low) == pytest.approx(1, abs=1e-9)
    assert abs(sum(high)) < (1e-3 if name == "dmey" else 1e-9)  # which PyWavelets cuts off
    assert all((low[0], low[-1], high[0], high[-1])) and (len(low) - len(high)) % 2 == 0


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("count", [1, 7, 8, 63, 128, 300])
def test_bands_equal_pywavelets(xp, wavelet, count):
    x = text(count)
    got = [xp.to_numpy(band) for band in bands(xp, xp.asarray(x), wavelet)]
    assert len(got) == num_levels(count) + 1
    for b in range(2):
        for h in range(2):
            for level, expected in enumerate(stationary_transform(x[b, h].astype(np.float64), wavelet)):
                assert_close(f"{wavelet} band {level + 1}", got[level][b, h], expected)


@pytest.mark.parametrize("name", QUERY_BLIND[1:])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_libraries_agree_on_every_wavelet(xp, name, wavelet):
    expected = SCORERS[name](tokens_of(ops, text(130)), wavelet=wavelet)
    assert_close(wavelet, scored(xp, name, tokens_of(xp, text(130)), wavelet=wavelet), expected)


@pytest.mark.parametrize("wavelet, lag", [("bior2.2", 0), ("bior4.4", 0), ("rbio2.2", 0), ("bior1.3", 1), ("haar", 1)])
def test_symmetric_filters_see_both_sides_alike(wavelet, lag):
    """A single other token shows as far before it as after it; filters of even length are centered half a token early."""
    x = np.zeros((1, 1, 401, 2), np.float32)
    x[:, :, 200] = 1
    for band in bands(ops, x, wavelet):
        energy = np.square(band[0, 0]).sum(-1)[lag:]
        assert energy.max() > 0
        np.testing.assert_allclose(energy, energy[::-1], atol=1e-7)


def test_levels_follow_the_length():
    assert [num_levels(t) for t in (1, 7, 8, 15, 16, 31, 32, 64, 127, 128, 10**6)] == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5]
    for t in range(1, 300):
        assert num_levels(t) == min(5, max(int(np.log2(t)) - 2, 0))
    assert (reach("haar", 5), reach("db2", 5), reach("haar", 0)) == (15, 46, 0)
    assert (reach("bior2.2", 1), reach("bior2.2", 5), reach("rbio2.2", 5)) == (2, 62, 47)


@pytest.mark.parametrize("count", [9, 130])
def test_wavelet_score_is_energy_over_median_energy(xp, count):
    x = text(count)
    expected = np.zeros((2, 2, count))
    for b in range(2):
        for h in range(2):
            for band in stationary_transform(x[b, h].astype(np.float64), "db2"):
                energy = np.square(band).sum(-1)
                expected[b, h] += energy / np.median(energy)
    assert_close("score", scored(xp, "waveletkv", tokens_of(xp, x, rope=None), wavelet="db2"), expected)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_only_the_last_tokens_change_when_one_is_appended(wavelet):
    """Exactly the last `reach` tokens can change, and with given gains their scores are all that changes."""
    x, gains = text(201).copy(), np.ones((2, 6))
    x[:, :, 200] *= 1e8  # the outermost taps of long filters are small
    short, long = (scored(ops, "waveletkv", tokens_of(ops, x[:, :, :t], rope=None), wavelet=wavelet, gains=gains)
                   for t in (200, 201))  # fmt: skip
    changed = np.flatnonzero((short != long[:, :, :200]).any((0, 1)))
    assert changed.min() == 200 - reach(wavelet, 5) and changed.max() == 199
    energies = [band_energies(ops, bands(ops, x[:, :, :t], wavelet)) for t in (200, 201)]
    low, high = (len(taps) - 1 for taps in filter_bank(wavelet))
    for level in range(5):
        differ = np.flatnonzero((energies[0][:, :, level] != energies[1][:, :, level, :200]).any((0, 1)))
        assert differ.size == (low * (2**level - 1) + high * 2**level) // 2 <= reach(wavelet, level + 1)


@settings(max_examples=25)
@given(st.integers(128, 400), st.integers(1, 60), st.sampled_from(["haar", "db2", "bior2.2", "rbio3.1"]))
def test_order_of_old_tokens_stays_as_the_text_grows(count, more, wavelet):
    x, gains = text(460, batch=1), np.float32([1, 2, 3, 4, 5, 6]) * np.ones((2, 1))
    short = scored(ops, "waveletkv", tokens_of(ops, x[:, :, :count], rope=None), wavelet=wavelet, gains=gains)
    long = scored(ops, "waveletkv", tokens_of(ops, x[:, :, : count + more], rope=None), wavelet=wavelet, gains=gains)
    old = count - reach(wavelet, 5)
    np.testing.assert_array_equal(short[..., :old], long[..., :old])


def test_given_gains_equal_measured_ones(xp):
    x = text(150)
    gains = band_gains(ops, band_energies(ops, bands(ops, x[:1], "db2")))[0, :, :, 0]
    got = scored(xp, "waveletkv", tokens_of(xp, x[:1], rope=None), gains=gains)
    assert_close("scores", got, scored(xp, "waveletkv", tokens_of(xp, x[:1], rope=None)))


def test_a_jump_stands_out():
    x = np.ones((1, 1, 200, 4), np.float32) + 0.01 * text(200, 1, 1, 4)
    x[:, :, 90] += 3
    near_symmetric = [name for family in ("sym", "bior", "rbio", "dmey") for name in pywt.wavelist(family)]
    for wavelet in ("haar", "db2", "coif1", *near_symmetric):
        assert abs(scored(ops, "waveletkv", tokens_of(ops, x, rope=None), wavelet=wavelet).argmax() - 90) <= 1


@pytest.mark.parametrize("name", QUERY_BLIND)
def test_a_jump_in_constant_keys_is_finite(xp, name):
    """The median energy of the details is zero there, and its inverse must not overflow."""
    x = np.ones((1, 1, 200, 4), np.float32)
    x[:, :, 90] = 1e5
    options = {"wavelet": "haar"} if name.startswith("wavelet") else {}
    got = scored(xp, name, tokens_of(xp, x, rope=None), **options)
    assert np.isfinite(got).all() and abs(got.argmax() - 90) <= (0 if name == "waveletkv" else FRAME)


# --- WaveletFourierKV -----------------------------------------------------------------------------------------------


def slow_windowed_filter(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[T, D]: frame by frame, with the DFT as a matrix."""
    tokens, half = len(x), FRAME // 2
    padded = np.concatenate([np.zeros((half, x.shape[1])), x, np.zeros((2 * FRAME, x.shape[1]))])
    out, t = np.zeros(padded.shape), np.arange(FRAME)
    full = np.concatenate([mask, mask[-2:0:-1]])
    dft = np.exp(-2j * np.pi * np.outer(t, t) / FRAME)
    for start in range(0, tokens + half, half):
        spectrum = dft @ (padded[start : start + FRAME] * np.sin(np.pi * t / FRAME)[:, None] ** 2)
        out[start : start + FRAME] += (np.conj(dft) @ (spectrum * full[:, None])).real / FRAME
    return out[half : half + tokens]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 150])
def test_windowed_filter_equals_the_direct_sum(xp, count):
    x, mask = text(count), tukey(np.fft.rfftfreq(FRAME), 0.125, 0.25, 0.5)
    got = xp.to_numpy(windowed_filter(xp, xp.asarray(x), mask))
    assert_close("filtered", got[1, 1], slow_windowed_filter(x[1, 1].astype(np.float64), mask.astype(np.float64)))
    assert_close("no-op", xp.to_numpy(windowed_filter(xp, xp.asarray(x), np.ones(FRAME // 2 + 1, np.float32))), x)


@pytest.mark.parametrize("count", [9, 150])
def test_waveletfourier_equals_its_parts(xp, count):
    x = text(count)
    got = scored(xp, "waveletfourierkv", tokens_of(xp, x, rope=None), wavelet="haar")
    for b in range(2):
        for h in range(2):
            parts = stationary_transform(x[b, h].astype(np.float64), "haar")
            plain, cleaned = np.zeros(count), np.zeros(count)
            for part, (low, high) in zip(parts, octaves(len(parts) - 1)):
                energy = np.square(part).sum(-1)
                plain += energy / np.median(energy)
                filtered = slow_windowed_filter(part, tukey(np.fft.rfftfreq(FRAME), low, high, 0.5).astype(np.float64))
                energy = np.square(filtered).sum(-1)
                cleaned += energy / np.median(energy)
            blocks = plain[: count // 8 * 8].reshape(8, -1).mean(1)
            alpha = min(blocks.std() / blocks.mean(), 1)
            assert_close("scores", got[b, h], alpha * plain + (1 - alpha) * cleaned)


def test_octaves_cover_every_frequency_once():
    for levels in range(6):
        edges = sorted(octaves(levels))
        assert edges[0][0] == 0 and edges[-1][1] == 0.5
        assert all(first[1] == second[0] for first, second in pairwise(edges))


def test_nonstationarity_of_known_energies():
    even, burst = np.ones((1, 1, 80), np.float32), np.zeros((1, 1, 80), np.float32)
    burst[..., 30:35] = 1
    half = even.copy()
    half[..., 40:] = 3
    assert nonstationarity(ops, even) == 0 and nonstationarity(ops, burst) == 1
    assert nonstationarity(ops, half) == pytest.approx(0.5)
    assert nonstationarity(ops, np.zeros((1, 1, 80), np.float32)) == 0


def test_energies_of_waveletfourier_change_near_the_end_only():
    x = text(301)
    found = []
    for t in (300, 301):
        parts = zip(bands(ops, x[:, :, :t], "haar"), octaves(5))
        found.append(
            band_energies(ops, [windowed_filter(ops, p, tukey(np.fft.rfftfreq(FRAME), *o, 0.5)) for p, o in parts])
        )
    changed = np.flatnonzero((found[0] != found[1][..., :300]).any((0, 1, 2)))
    assert changed.min() >= 300 - (reach("haar", 5) + FRAME - 1)


# --- TriAttention ---------------------------------------------------------------------------------------------------


def pairs(x: np.ndarray, rope: Rope) -> np.ndarray:
    """[..., D] as complex numbers [..., rotary_dim / 2]."""
    x, half = np.asarray(x, np.float64)[..., : rope.rotary_dim], rope.rotary_dim // 2
    return x[..., 0::2] + 1j * x[..., 1::2] if rope.interleaved else x[..., :half] + 1j * x[..., half:]


def slow_triattention(pre_rope, positions, now, rope, mean, amplitude, pool):
    """From the formula, one token, query head, offset and pair at a time; keys before RoPE with their positions."""
    batch, heads, tokens, _ = pre_rope.shape
    group = len(mean) // heads
    center, keys = pairs(mean, rope), pairs(pre_rope, rope)
    result = np.full((batch, heads, tokens), -np.inf)
    for b in range(batch):
        for q in range(len(mean)):
            raw = np.zeros(tokens)
            for t in range(tokens):
                k, c = keys[b, q // group, t], center[q]
                trig = [
                    np.sum(abs(c) * abs(k) * np.cos(np.array(rope.inv_freq) * (now - positions[t] + 2**i)
                                                    + np.angle(c * np.conj(k))))
                    for i in range(17)
                ]  # fmt: skip
                rest = mean[q, rope.rotary_dim :] @ pre_rope[b, q // group, t, rope.rotary_dim :].astype(np.float64)
                raw[t] = getattr(np, pool)(trig) + rest + np.sum((amplitude[q] - abs(c)) * abs(k))
            z = (raw - raw.mean()) / raw.std()
            result[b, q // group] = np.maximum(result[b, q // group], z)
    return result


@pytest.mark.parametrize("rope", [r for r in ROPES.values() if r], ids=[n for n, r in ROPES.items() if r])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_triattention_equals_the_formula(xp, rope, pool):
    pre_rope, queries = text(20), statistics(rope)
    positions = np.array([0, 1, 2, 3, 7, 9, 50, 51, 52, 300, 301, 310, 400, 401, 402, 403, 404, 405, 406, 407])
    post_rope = np.concatenate([rotate(ops, pre_rope[:, :, [i]], rope, p) for i, p in enumerate(positions)], axis=2)
    # the model's queries and keys both carry the scaling; statistics have it twice, and plain keys not at all
    expected = slow_triattention(pre_rope, positions, 450, rope, queries.mean, queries.amplitude, pool)
    got = scored(xp, "triattention", tokens_of(xp, post_rope, rope, positions, now=450), pool=pool)
    assert_close("scores", got, expected, limit=3e-5)


def test_statistics_are_the_centers_of_the_paper():
    """c_f = E[q_f] and m_f = E|q_f|, of queries before RoPE, are what `QueryStatistics` holds."""
    rope, rng = ROPES["interleaved"], np.random.default_rng(0)
    queries = rng.standard_normal((6, 100, 16)) + 1
    moments = QueryMoments(2, rope)
    moments.update(rotate(ops, queries, rope, 0))
    mean, _, amplitude = moments.result()
    assert_close("c", np.abs(pairs(mean, rope) - pairs(queries, rope).mean(1)), np.zeros((6, 8)), limit=1e-6)
    assert_close("m", amplitude, np.abs(pairs(queries, rope)).mean(1))
    assert np.all(np.abs(pairs(mean, rope)) <= amplitude)


def test_triattention_finds_what_queries_look_at():
    rope, model = ROPES["half"], statistics(ROPES["half"])
    keys = 0.05 * text(60, 1)
    ahead = rotate(ops, model.mean.reshape(2, 3, 16)[:, :1], rope, 100)[None]
    keys[:, :, 33:34] = 3 * ahead
    assert np.all(scored(ops, "triattention", tokens_of(ops, keys, rope, now=99), offsets=(1,)).argmax(-1) == 33)


def test_wavelettriattention_blends_two_z_scores(xp):
    tokens = tokens_of(xp, text(150))

    def z(name):
        x = scored(xp, name, tokens).astype(np.float64)
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    for weight in (0.0, 0.3, 1.0):
        expected = weight * z("waveletkv") + (1 - weight) * z("triattention")
        assert_close("blend", scored(xp, "wavelettriattention", tokens, weight=weight, norm=0), expected)


def test_waveletattention_adds_three_z_scores(xp):
    tokens = tokens_of(xp, text(150))

    def z(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    def share(name):
        x = scored(xp, name, tokens).astype(np.float64)
        return z(np.log(x / x.mean(-1, keepdims=True) + 0.1))

    expected = (
        z(scored(xp, "waveletkv", tokens, norm=0).astype(np.float64)) + share("snapkv") + share("expected-attention")
    )
    assert_close("blend", scored(xp, "waveletattention", tokens), expected)


# --- yardsticks -----------------------------------------------------------------------------------------------------


@every_rope
def test_expected_attention_equals_kvpress(xp, rope):
    """Its mean rotation matrix, applied to mean and covariance, softmax, mean over the group, times the value's norm."""
    keys, queries, future = text(40), statistics(rope), 512
    tokens = tokens_of(xp, keys, rope)
    matrix = np.eye(16)
    if rope is not None:
        matrix = np.mean([rotate(ops, np.eye(16)[:, None], rope, p)[:, 0].T for p in range(40, 40 + future)], axis=0)
        matrix = matrix / rope.scaling  # the scaling of the key is in the key
        matrix[range(rope.rotary_dim, 16), range(rope.rotary_dim, 16)] = 1 / rope.scaling
        matrix[: rope.rotary_dim] /= rope.scaling
    expected = np.zeros((2, 2, 40))
    for b in range(2):
        for q in range(6):
            k, covariance = keys[b, q // 3].astype(np.float64), queries.root[q // 3] @ queries.root[q // 3]
            logits = k @ (matrix @ queries.mean[q]) + 0.5 * np.sum(k @ (matrix @ covariance @ matrix.T) * k, axis=-1)
            share = np.exp(logits - logits.max())
            expected[b, q // 3] += share / share.sum() / 3
    expected *= np.linalg.norm(xp.to_numpy(tokens.values), axis=-1)
    assert_close("scores", scored(xp, "expected-attention", tokens, future=future), expected)


def test_snapkv_equals_its_pseudo_code(xp):
    keys, kernel, length = text(40), 5, 5
    tokens = tokens_of(xp, keys)
    recent, expected = xp.to_numpy(tokens.recent).astype(np.float64), np.zeros((2, 2, 40))
    for b in range(2):
        for q in range(6):
            logits = recent[b, q] @ keys[b, q // 3].T.astype(np.float64)
            logits[np.arange(40)[None] > np.arange(35, 40)[:, None]] = -np.inf
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            share = np.pad(weights[:, : 40 - length].mean(0), kernel // 2)
            expected[b, q // 3, :-length] += np.convolve(share, np.ones(kernel) / kernel, "valid") / 3
    expected[..., -length:] = expected.max(-1, keepdims=True)
    assert_close("scores", scored(xp, "snapkv", tokens, kernel=kernel), expected)


def test_simple_yardsticks(xp):
    keys = text(40)
    directions = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = directions.mean(2, keepdims=True)
    cosine = np.sum(directions * anchor, -1) / np.linalg.norm(anchor, axis=-1)
    positions = np.arange(0, 80, 2)
    tokens = tokens_of(xp, keys, positions=positions)
    assert_close("knorm", scored(xp, "knorm", tokens), -np.linalg.norm(keys, axis=-1))
    assert_close("keydiff", scored(xp, "keydiff", tokens), -cosine)
    np.testing.assert_array_equal(scored(xp, "streaming", tokens), np.broadcast_to(positions, (2, 2, 40)))


def test_random_scores_stay_with_the_token(xp):
    whole = scored(xp, "random", tokens_of(xp, text(257)))
    assert whole.min() >= 0 and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.05
    assert len(np.unique(whole[0])) == 2 * 257
    np.testing.assert_array_equal(scored(xp, "random", tokens_of(xp, text(63))), whole[..., :63])
    left = np.sort(np.random.default_rng(0).permutation(257)[:63])
    per_head = np.broadcast_to(left, (2, 2, 63))
    np.testing.assert_array_equal(scored(xp, "random", tokens_of(xp, text(63), positions=per_head)), whole[..., left])
    assert not np.array_equal(scored(xp, "random", tokens_of(xp, text(63)), seed=1), whole[..., :63])


# --- positions after eviction ---------------------------------------------------------------------------------------


@every_rope
def test_pre_rope_keys_come_from_true_positions(xp, rope):
    keys = text(50)
    turned = keys if rope is None else rotate(ops, keys, rope, 0)
    kept = np.stack([np.stack([np.sort(np.random.default_rng(2 * b + h).permutation(50)[:20]) for h in range(2)])
                     for b in range(2)])  # fmt: skip
    left = np.take_along_axis(turned, kept[..., None], axis=2)
    got = tokens_of(xp, left, rope, positions=kept).pre_rope
    assert_close("keys", xp.to_numpy(got), np.take_along_axis(keys, kept[..., None], axis=2))


def test_a_real_profile_has_what_scorers_need(toy_profile):
    model, queries = ToyModel(), toy_profile.queries
    keys, values = model.sample(0, 100)
    tokens = Tokens(ops, keys, values, rope=model.rope, query_mean=queries.mean[0], query_root=queries.root[0],
                    query_amplitude=queries.amplitude[0], recent=model.queries(0, 5))  # fmt: skip
    for name in NAMES:
        assert np.isfinite(scored(ops, name, tokens)).all(), name

"""The entropy-coded codec: error against real bytes, parity of the array libraries, the search for a size."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from cases import ToyModel, plan_of, toy_profile_of
from tolerances import assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.codecs.entropy_coded import ENTROPY_BITS, FIT_SLACK, EntropyCodec, fit_bits
from spectral_kv_core.codecs.registry import make_codec, make_plan
from spectral_kv_core.planning.budget import elements_per_token
from spectral_kv_core.planning.methods import Method, get_live_method, get_method
from spectral_kv_core.planning.plan import Plan

pytest.importorskip("constriction")
MODEL = ToyModel(layers=1, rotated=True)
TOKENS = 1024


@cache
def stored_plan(bits: float, group: str = "layer", rope: str = "pre", rounding: str = "expected-attention") -> Plan:
    method = Method("test", "entropy-coded", "", "", rope=rope, group=group, time="dct", block=16, rounding=rounding)
    return make_plan(MODEL.shape, toy_profile_of(MODEL, group, rope), method, bits)


def sample(seed: int = 1, batch: int = 1):
    return MODEL.sample(seed, TOKENS, batch)


def real_bits(chunk) -> float:
    return 8 * chunk.arrays[0].shape[0] / (elements_per_token(MODEL.shape) * chunk.tokens * chunk.batch)


def decoded(codec, chunk) -> list[np.ndarray]:
    return [codec.xp.to_numpy(x) for x in codec.decode(chunk)]


@pytest.mark.parametrize("group, rope", [("layer", "pre"), ("head", "post"), ("side", "pre")])
def test_error_falls_as_bytes_grow(xp, group, rope):
    keys, values = sample(batch=2)
    errors, sizes = [], []
    for bits in (0.25, 0.5, 1, 2, 4):
        codec = EntropyCodec(xp, stored_plan(bits, group, rope), 0)
        chunk = codec.encode(xp.asarray(keys), xp.asarray(values), 0)
        got = decoded(codec, chunk)
        errors.append([relative_rms(got[0], keys), relative_rms(got[1], values)])
        sizes.append(real_bits(chunk))
    assert np.all(np.diff(errors, axis=0) < 0), errors
    assert np.all(np.diff(sizes) > 0), sizes
    assert np.max(errors[-1]) < 0.1


def test_entropy_coding_beats_fixed_widths():
    """At the bytes of the live method with the same basis, on other text than was calibrated on."""
    keys, values = sample()
    live = make_codec(ops, plan_of(MODEL, 1, "layer", "pre"), 0)
    stored = EntropyCodec(ops, stored_plan(0.92, rounding="nearest"), 0)
    chunk = stored.encode(keys, values, 0)
    assert real_bits(chunk) <= 1
    for of_stored, of_live, x in zip(decoded(stored, chunk), live.decode(live.encode(keys, values, 0)), (keys, values)):
        assert relative_rms(of_stored, x) < 0.95 * relative_rms(of_live, x)


def test_bytes_of_one_library_decode_on_every_other(xp):
    codec, reference = (EntropyCodec(x, stored_plan(2), 0) for x in (xp, ops))
    chunk = reference.encode(*sample(), 20)
    moved = type(chunk)(chunk.batch, chunk.start, chunk.tokens, tuple(map(xp.asarray, chunk.arrays)))
    for got, expected in zip(decoded(codec, moved), decoded(reference, chunk)):
        assert_close("decoded", got, expected, limit=1e-5)


def test_a_chunk_remembers_where_it_starts():
    codec = EntropyCodec(ops, stored_plan(4), 0)
    keys, values = sample()
    late = codec.encode(keys[:, :, 512:], values[:, :, 512:], 512)
    assert relative_rms(codec.decode(late)[0], keys[:, :, 512:]) < 0.05


def test_bytes_of_another_plan_are_refused():
    chunk = EntropyCodec(ops, stored_plan(2), 0).encode(*sample(), 0)
    with pytest.raises(ValueError, match="Expected counts"):
        EntropyCodec(ops, stored_plan(1), 0).decode(chunk)


def test_nan_is_refused():
    keys, values = sample()
    keys[0, 0, 7, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        EntropyCodec(ops, stored_plan(2), 0).encode(keys, values, 0)


@pytest.mark.parametrize("bits", [0.3, 1.0, 3.0])
def test_files_are_as_large_as_asked_and_never_larger(bits):
    keys, values = sample(5)

    def make(planned):
        chunk = EntropyCodec(ops, stored_plan(planned), 0).encode(keys, values, 0)
        return chunk, real_bits(chunk)

    real = real_bits(fit_bits(make, bits))
    assert bits * (1 - 2 * FIT_SLACK) < real <= bits


def steep(planned: float) -> float:
    """Real bits of a model whose keys have half the rank that they could: what noise takes beyond 3.9 bits."""
    return 1.03 * planned if planned < 3.9 else min(4.0 + 40 * (planned - 3.9), 13 + planned / 10)


def factor(planned: float) -> float:
    return 1.4 * planned


def steps(planned: float) -> float:
    """Real bits that move in steps of a hundredth."""
    return round(1.1 * planned, 2)


@pytest.mark.parametrize("real_of", [steep, factor, steps])
def test_the_search_reaches_every_budget_and_more_bits_are_never_fewer(real_of):
    before = 0.0
    for bits in np.arange(0.2, 7.01, 0.1):
        tried: list[float] = []
        planned = fit_bits(lambda b, tried=tried: (tried.append(b) or b, real_of(b)), bits)
        assert 0.98 * bits < real_of(planned) <= bits and planned >= before, (bits, planned, tried)
        assert len(tried) == len(set(tried)) <= (20 if real_of is steep else 4), tried
        before = planned


def test_a_jump_that_leaves_out_the_budget_ends_the_search():
    """No plan is nearer than the one before the jump."""
    tried = []
    planned = fit_bits(lambda b: (tried.append(b) or b, b if b < 2 else 9.0), 5.0)
    assert 1.998 < planned < 2 and len(tried) <= 20


def test_bits_that_a_text_does_not_fit_in_are_refused():
    with pytest.raises(ValueError, match=r"Expected bits .* received 0\.2; it takes 0\.3"):
        fit_bits(lambda planned: (None, max(planned, 0.3)), 0.2)


def test_the_search_ends_at_the_finest_plan():
    tried = []
    fit_bits(lambda planned: (tried.append(planned) or planned, planned / 2), 6.0)
    assert max(tried) == ENTROPY_BITS[1]
    assert len(tried) <= 3


def test_plan_of_entropy_coded_tables():
    plans = [stored_plan(bits) for bits in (0.25, 1, 4)]
    for plan, bits in zip(plans, (0.25, 1, 4)):
        assert 0.97 * bits < plan.bits_per_element <= bits
        assert 15 <= len(plan.tables) <= 30
    assert len({plan.hash for plan in plans}) == 3
    again = make_plan(MODEL.shape, toy_profile_of(MODEL, "layer", "pre"), plans[0].method, 0.25)
    assert again.hash == plans[0].hash
    assert plans[0].staging is None


def test_a_profile_without_a_histogram_says_to_calibrate_again():
    profile = toy_profile_of(MODEL, "layer", "pre")
    (basis_set,) = profile.basis_sets.values()
    histogram, basis_set.histogram = basis_set.histogram, None
    try:
        with pytest.raises(ValueError, match="histogram .* Calibrate again"):
            make_plan(MODEL.shape, profile, get_method("spectral-stored"), 1)
    finally:
        basis_set.histogram = histogram


def test_the_method_for_files_has_no_live_cache():
    assert not get_method("spectral-stored").live
    with pytest.raises(ValueError, match="spectral-stored, which is for files"):
        get_live_method("spectral-stored")
    with pytest.raises(ValueError, match="which is for files"):
        make_codec(ops, stored_plan(1), 0)

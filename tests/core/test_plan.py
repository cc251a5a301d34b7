"""From a budget to widths: ranges, monotony, determinism, and the bytes of the real cache."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import ToyModel

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.transform import band_sizes
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.codecs.registry import make_codec, make_plan
from spectral_kv_core.planning.loss import COHERENCE, MAX_EXPANSION, coherent_cost, costs, expansion
from spectral_kv_core.planning.methods import METHODS, Method, get_method
from spectral_kv_core.profile.basis_set import BasisSet
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS

MODEL = ToyModel()
SHAPE = MODEL.shape


def predicted_cost(plan) -> float:
    basis_set: BasisSet = plan.basis_set
    cost = costs(basis_set, {}) * band_sizes(basis_set.block)[:, None]
    index = np.searchsorted(BIT_WIDTHS, plan.widths)[..., None]
    return float(np.take_along_axis(cost, index, -1).sum())


@pytest.mark.parametrize("bits", [0.24, 8.01, 0, -1, float("nan")])
def test_bits_out_of_range_names_the_range(toy_profile, bits):
    with pytest.raises(ValueError, match=r"between 0\.25 and 8 for spectral, received"):
        make_plan(SHAPE, toy_profile, "spectral", bits)


def test_default_is_spectral_at_3_bits(toy_profile):
    plan = make_plan(SHAPE, toy_profile)
    assert (plan.method.name, plan.bits) == ("spectral", 3.0)
    assert plan.widths.shape == (2, 4, 64, 5) and plan.widths.dtype == np.uint8


@pytest.mark.parametrize("bits", [0.25, 1, 2.5, 4, 8])
def test_budget_is_kept_and_used(toy_profile, bits):
    plan = make_plan(SHAPE, toy_profile, "spectral", bits)
    assert 0.99 * bits < plan.bits_per_element <= bits
    bands = plan.widths.astype(int) @ band_sizes(16)  # bits of 16 tokens
    assert plan.bits_per_element == pytest.approx(bands.sum() / (16 * 2 * 2 * 2 * 64))


def test_more_bits_never_cost_more(toy_profile):
    costs = [predicted_cost(make_plan(SHAPE, toy_profile, "spectral", b)) for b in np.linspace(0.25, 8, 63)]
    assert all(later <= earlier for earlier, later in pairwise(costs))
    assert costs[-1] < 1e-3 * costs[0]


def test_strong_components_get_more_bits(toy_profile):
    widths = make_plan(SHAPE, toy_profile, "spectral", 2).widths
    assert widths[:, :, : MODEL.planted].mean() > widths[:, :, MODEL.planted :].mean() + 2


def test_plan_is_the_same_in_another_process(toy_profile, tmp_path):
    path = toy_profile.save(tmp_path / "toy.safetensors")
    code = (
        "import sys\n"
        "from spectral_kv_core.codecs.registry import make_plan\n"
        "from spectral_kv_core.profile.profile import Profile\n"
        "p = Profile.load(sys.argv[1])\n"
        "for bits in (0.5, 2, 3.7): print(make_plan(p.shape, p, 'spectral', bits).hash)"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=True)
    ours = [make_plan(SHAPE, toy_profile, "spectral", bits).hash for bits in (0.5, 2, 3.7)]
    assert result.stdout.split() == ours
    assert len(set(ours)) == 3


def test_hosts_that_differ_in_the_last_bits_of_rope_make_one_plan(toy_profile):
    rope = replace(SHAPE.rope, inv_freq=tuple(float(np.float32(w)) for w in SHAPE.rope.inv_freq))
    assert rope != SHAPE.rope
    for method in ("spectral", "turboquant", "xkv"):
        ours, theirs = (
            make_plan(shape, toy_profile, METHODS[method], 4.5) for shape in (SHAPE, replace(SHAPE, rope=rope))
        )
        assert ours.hash == theirs.hash
    other = replace(SHAPE, rope=replace(rope, interleaved=True))
    assert make_plan(other, None, METHODS["xkv"], 4.5).hash != ours.hash


def test_missing_or_wrong_profile_is_refused(toy_profile):
    with pytest.raises(ValueError, match="spectralkv profile"):
        make_plan(SHAPE, None, "spectral", 2)
    with pytest.raises(ValueError, match="head_dim 80"):
        make_plan(replace(SHAPE, head_dim=80), toy_profile, "spectral", 2)
    with pytest.raises(ValueError, match=r"basis set layer\.pre"):
        make_plan(SHAPE, toy_profile, Method("m", "spectral", "", "", rope="pre", group="layer"), 2)


def test_unknown_method_lists_the_names():
    with pytest.raises(
        ValueError,
        match="spectral, spectral-trellis, spectral-dense, spectral-dense-pairs, .*affine, .*received 'spectrl'",
    ):
        get_method("spectrl")
    assert all(get_method(name).name == name for name in METHODS)
    for wrong in ({"codec": "zip"}, {"codec": "spectral", "rope": "mid"}, {"codec": "spectral", "group": "model"}):
        with pytest.raises(ValueError, match="Expected"):
            Method(**({"name": "m", "summary": "", "source": ""} | wrong))


@pytest.mark.parametrize("bits, width", [(2.5, 2), (3.0, 2), (3.5, 3), (4.6, 4), (8.5, 8)])
def test_affine_takes_the_widest_codes_within_the_ceiling(bits, width):
    plan = make_plan(SHAPE, None, "affine", bits)
    assert plan.code_bits == width
    assert plan.bits_per_element == width + 0.5 <= bits


@pytest.mark.parametrize("bits", [2.49, 8.6, 16])
def test_affine_names_the_values_it_can_reach(bits):
    with pytest.raises(ValueError, match=r"2\.5, 3\.5, 4\.5, 5\.5, 6\.5, 8\.5 for affine, received"):
        make_plan(SHAPE, None, "affine", bits)


def test_head_dim_must_be_whole_groups():
    with pytest.raises(ValueError, match="multiple of the group of 64 channels, received head_dim 80"):
        make_plan(ToyModel(80).shape, None, "affine", 4.5)


def test_identity_needs_no_profile():
    plan = make_plan(SHAPE, None, "identity")
    assert plan.bits_per_element == 16 and plan.make_codec(ops, 0) is None
    assert make_codec(ops, plan, 0) is None


def real_bytes(plan, context: int, window: int, sinks: int) -> int:
    total = 0
    for row in range(MODEL.layers):
        cache = LayerCache(ops, make_codec(ops, plan, row), sinks, window)
        keys, values = MODEL.sample(1, context, layer=row)
        cache.append(keys.astype(np.float16), values.astype(np.float16))
        total += sum(array.nbytes for array in cache.arrays())
    return total


def plan_within(profile, budget: int, context: int, **exact):
    return CacheRequest(budget_bytes=budget, max_context=context, **exact).plan(SHAPE, profile)[0]


@pytest.mark.parametrize("context", [600, 1500, 1507])
@pytest.mark.parametrize("bits", [0.4, 1.7, 6.3])
@pytest.mark.parametrize("window, sinks", [(64, 4), (0, 0)])
def test_real_cache_stays_within_budget_bytes(toy_profile, context, bits, window, sinks):
    fixed = min(context, window + sinks + 15) * 2 * 2 * 2 * 64 * 2
    budget = int(fixed + bits / 8 * (context - window - sinks) * 2 * 2 * 2 * 64)
    plan = plan_within(toy_profile, budget, context, window=window, sinks=sinks)
    held = real_bytes(plan, context, window, sinks)
    assert 0.75 * budget < held <= budget  # the rest is kept for the 15 tokens that may wait for their block


def test_budget_bytes_out_of_reach_names_the_range(toy_profile):
    with pytest.raises(ValueError, match="budget_bytes between") as caught:
        plan_within(toy_profile, 1000, 2000)
    low = int(str(caught.value).split("between ")[1].split(" and")[0].replace(",", ""))
    assert real_bytes(plan_within(toy_profile, low, 2000), 2000, 64, 4) <= low
    with pytest.raises(ValueError, match="budget_bytes between"):
        plan_within(toy_profile, low - 1, 2000)


def test_impossible_arguments_are_refused(toy_profile):
    wrong = [
        ({"window": -1}, "window"),
        ({"sinks": 1.5}, "sinks"),
        ({"bits": 2.0, "budget_bytes": 10**6, "max_context": 2000}, "both"),
        ({"budget_bytes": 10**6}, "max_context"),
        ({"budget_bytes": 10**6, "max_context": 83}, "above sinks"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            CacheRequest(**arguments).plan(SHAPE, toy_profile)


def test_passed_layers_count_against_budget_bytes(toy_profile):
    request = CacheRequest(budget_bytes=400_000, max_context=2000)
    plans = [request.plan(SHAPE, toy_profile, other_bytes=n)[0] for n in (0, 100_000)]
    assert plans[1].bits < plans[0].bits < 8


@pytest.mark.parametrize("distortion", [1e-4, 0.01, 0.12, 0.36, 0.7, 1.0])
def test_decoded_coefficients_are_expanded_by_what_costs_least(distortion):
    """Against a search over all expansions l: shrinkage (1 - l (1 - D))^2 costs k times what noise l^2 D (1 - D) costs."""
    l = np.linspace(0.5, MAX_EXPANSION, 20001)
    loss = COHERENCE * (1 - l * (1 - distortion)) ** 2 + l**2 * distortion * (1 - distortion)
    assert coherent_cost(distortion) * distortion == pytest.approx(loss.min(), rel=1e-3)
    if distortion < 1:
        assert expansion(distortion) == pytest.approx(l[loss.argmin()], abs=1e-3)


def test_plans_decode_to_expanded_levels(toy_profile):
    plan = make_plan(SHAPE, toy_profile, "spectral", 2)
    levels = plan.basis_set.levels
    expansion = {b: float(np.mean(plan.levels[b][-1] / levels[b][-1])) for b in levels}
    assert 1.25 < expansion[1] < 1.4 and 1.05 < expansion[2] < 1.12 and 1 < expansion[8] < 1.001
    assert all(np.allclose(plan.levels[b], levels[b] * expansion[b], rtol=1e-5) for b in levels)

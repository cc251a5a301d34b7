"""`==` and `hash` of what holds arrays: profiles, plans and stored prompts."""

from __future__ import annotations

import copy
import pickle
from dataclasses import is_dataclass, replace

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of

from spectral_kv_core.codecs.registry import FAMILIES, make_plan
from spectral_kv_core.codecs.tiers import TieredPlan, make_tiered_plan
from spectral_kv_core.planning.methods import METHODS, get_method
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.profile import Profile

MODEL = ToyModel(head_dim=64, kv_heads=4)  # kvtc and the like have no plan without a set of their own
METHOD_NAMES = [m.name for m in METHODS.values() if m.codec != "none" and m.group not in ("model", "layer2")]


def profile_for(name: str) -> Profile | None:
    method = get_method(name)
    basis_set = method.profile_set
    return toy_profile_of(MODEL, *basis_set.split(".")) if basis_set else None


def test_profiles_are_equal_that_say_the_same(toy_profile, tmp_path):
    one, two = (Profile.load(toy_profile.save(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert one == two and hash(one) == hash(two) and one.path != two.path
    assert len({one, two}) == 1 and pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    two.basis_sets["head.post"].levels[3][0] -= 1
    assert one != two
    assert one != replace(one, model="another") and one != replace(one, queries=None) and one != "a profile"
    other = replace(one.queries, root=one.queries.root + np.float16(1))
    assert one != replace(one, queries=other) and one.queries == copy.copy(one.queries)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_plans_are_equal_that_say_the_same_of_the_same_profile(name):
    profile = profile_for(name)
    one, two = (make_plan(MODEL.shape, profile, name) for _ in range(2))
    assert one is not two and one == two and hash(one) == hash(two) and one.hash == two.hash
    other = make_plan(replace(MODEL.shape, hidden_size=1), None if profile is None else replace(profile, shape=replace(
        MODEL.shape, hidden_size=1)), name)  # fmt: skip
    assert one != other and one != make_plan(MODEL.shape, profile_for("affine"), "affine", 2.5)


def test_plans_with_tiers_and_of_different_bits():
    profile = profile_for("spectral")
    method = get_method("knorm+spectral")
    one, two = (make_tiered_plan(MODEL.shape, profile, method, ((0.5, 4), (0.5, 1))) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != make_tiered_plan(MODEL.shape, profile, method, ((0.5, 4), (0.5, 2)))
    assert make_plan(MODEL.shape, profile, "spectral", 2.0) != make_plan(MODEL.shape, profile, "spectral", 2.5)


@pytest.mark.parametrize("family", sorted({*FAMILIES.values(), TieredPlan}, key=lambda family: family.__name__))
def test_no_family_compares_its_arrays_as_dataclasses_do(family):
    """A dataclass makes an `__eq__` of its own unless told, which asks an array whether it is true."""
    assert is_dataclass(family) and family.__eq__ is Plan.__eq__ and family.__hash__ is Plan.__hash__

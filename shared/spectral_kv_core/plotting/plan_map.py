"""What a plan gives every layer and head of a profile: stored bits and kept components."""

from __future__ import annotations

import numpy as np

from ..arrays.transform import band_sizes
from ..codecs.registry import make_plan
from ..codecs.transform import TransformPlan
from ..planning.methods import METHODS, Method
from ..profile.basis_set import BasisSet
from ..profile.profile import Profile
from .results import Skip


def map_method(profile: Profile) -> Method:
    """The method whose groups are heads; raises Skip for a profile that has none."""
    for method in METHODS.values():
        if method.transforms and method.group == "head" and method.basis_set in profile.basis_sets:
            return method
    raise Skip("the profile has no basis per head")


def map_basis_set(profile: Profile) -> BasisSet:
    """The basis set of `map_method`."""
    name = map_method(profile).basis_set
    assert name is not None
    return profile.basis_set(name)


def map_plan(profile: Profile, bits: float | None) -> TransformPlan:
    """The plan of `map_method` at `bits`; raises ValueError for a budget that it cannot have."""
    plan = make_plan(profile.shape, profile, map_method(profile), bits)
    assert isinstance(plan, TransformPlan)
    return plan


def bits_by_head(plan: TransformPlan) -> np.ndarray:
    """Stored bits per element [L, G] of every head."""
    block = plan.basis_set.block
    return (plan.rates * band_sizes(block)).sum((-1, -2)) / (block * plan.shape.head_dim)


def kept_by_head(plan: TransformPlan) -> np.ndarray:
    """Components [L, G] of every head that are stored, as a mean over the frequencies of a block."""
    block = plan.basis_set.block
    return (plan.coded * band_sizes(block)).sum((-1, -2)) / block

"""What a plan gives every layer and head of a profile: stored bits and kept components."""

from __future__ import annotations

import numpy as np

from ..arrays.transform import band_sizes
from ..codecs.transform import TransformPlan
from ..planning.methods import METHODS, Method
from ..profile.profile import Profile
from .results import Skip


def map_method(profile: Profile) -> Method:
    """The method whose groups are heads; raises Skip for a profile that has none."""
    for method in METHODS.values():
        if method.transforms and method.group == "head" and method.basis_set in profile.basis_sets:
            return method
    raise Skip("the profile has no basis per head")


def bits_by_head(plan: TransformPlan) -> np.ndarray:
    """Stored bits per element [L, G] of every head."""
    block = plan.basis_set.block
    return (plan.rates * band_sizes(block)).sum((-1, -2)) / (block * plan.shape.head_dim)


def kept_by_head(plan: TransformPlan) -> np.ndarray:
    """Components [L, G] of every head that are stored, as a mean over the frequencies of a block."""
    block = plan.basis_set.block
    return (plan.coded * band_sizes(block)).sum((-1, -2)) / block

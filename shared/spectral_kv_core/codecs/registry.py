"""The codec families, and what asks them: plans and codecs of any method."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

from ..errors import UsageError
from ..native import disabled
from ..planning.budget import SINKS, WINDOW, whole_number
from ..planning.methods import Method, get_live_method, get_method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..profile.stored_profile import loaded
from ..quantization import trellis
from .affine import AffinePlan
from .eigen_attention import EigenPlan
from .entropy_coded import EntropyCodedPlan
from .jarviskv import JarvisPlan
from .kivi import KiviPlan
from .kvtc import KvtcPlan
from .none import PlainPlan
from .spectral import SpectralPlan
from .svdq import SvdqPlan
from .svdq_prompt import SvdqPromptPlan
from .think import ThinkPlan
from .trellis_coded import TrellisPlan
from .turboquant import TurboQuantPlan
from .xkv import XkvPlan

FAMILIES: dict[tuple[str, str], type[Plan]] = {  # codec and quantizer of a method -> its plans
    ("none", "scalar"): PlainPlan,
    ("affine", "scalar"): AffinePlan,
    ("spectral", "scalar"): SpectralPlan,
    ("spectral", "trellis"): TrellisPlan,
    ("entropy-coded", "scalar"): EntropyCodedPlan,
    ("kivi", "scalar"): KiviPlan,
    ("turboquant", "scalar"): TurboQuantPlan,
    ("turboquant-qjl", "scalar"): TurboQuantPlan,
    ("jarviskv", "scalar"): JarvisPlan,
    ("svdq", "scalar"): SvdqPlan,
    ("svdq-prompt", "scalar"): SvdqPromptPlan,
    ("eigen-attention", "scalar"): EigenPlan,
    ("think", "scalar"): ThinkPlan,
    ("xkv", "scalar"): XkvPlan,
    ("kvtc", "scalar"): KvtcPlan,
}
NO_SHAPE = ModelShape(0, 0, 0, 0, 0, (), None)  # for families whose range does not depend on the model
# the least and the largest heads that models have: where a range depends on the model, it lies between those of these
EXTREMES = tuple(ModelShape(1, 0, heads, heads, dim, (0,), None) for dim in (8, 1024) for heads in (1, 256))


def family_of(method: Method) -> type[Plan]:
    """The plans of the family that codes for `method`; raises UsageError for a codec without such a quantizer."""
    key = method.codec, method.quantizer
    if key not in FAMILIES:
        raise UsageError(f"Expected a codec that has the quantizer {method.quantizer}, received {method.codec}.")
    return FAMILIES[key]


def make_plan(
    shape: ModelShape, profile: Profile | None, method: str | Method = "spectral", bits: float | None = None
) -> Plan:
    """Allocate `bits` per sealed element for a model of `shape`; None: what the family takes by itself.

    Raises UsageError for a budget out of range (with the possible one), a profile of another model, or a head_dim that
    the method's groups do not divide.
    """
    method = get_method(method)
    family = family_of(method)
    profile = loaded(profile)
    if bits is None:
        bits = family.default_bits(shape, method)
    if method.profile_set and profile is not None:
        profile.check(shape)
    if method.basis_set and profile is None:
        if not family.bits_by_shape:
            family.check_bits(shape, method, bits)
        raise UsageError(
            f"Expected a profile for the method {method.name}, received none. Make one: spectralkv profile"
        )
    plan = family.make(shape, profile if method.profile_set else None, method, bits)
    for layer_group in range(len(plan.layer_groups) if shape.ropes else 0):
        plan.rope(layer_group)  # which refuses layers that are rotated in several ways
    return plan


def with_zeros(shape: ModelShape, method: str | Method, bits: float | None) -> float | None:
    """`bits` per element of a model's keys and values, as a plan has them: zeros that fill the narrower side up count too.

    Raises UsageError where too few bits were asked for; a method's own bits (None) are raised to what it can do.
    """
    if not shape.widths:
        return bits
    method = get_method(method)
    low, high = bits_range(method, shape)
    is_given = bits is not None
    bits = family_of(method).default_bits(shape, method) if bits is None else bits
    if bits * shape.filled < low and is_given:
        raise UsageError(
            f"Expected bits of at least {low / shape.filled:.4g} for {method.name} with a model whose keys have "
            f"{shape.side_widths[0]} channels and values {shape.side_widths[1]}, received {bits:g}."
        )
    return min(max(bits * shape.filled, low), high)


def plan_for(
    shape: ModelShape,
    profile: Profile | None,
    method: str | Method = "spectral",
    bits: float | None = None,
    window: int = WINDOW,
    sinks: int = SINKS,
) -> Plan:
    """`make_plan` for a new cache; raises UsageError for a `window` or `sinks` that are no numbers of tokens too."""
    whole_number("window", window, 0)
    whole_number("sinks", sinks, 0)
    method = usable_method(method)
    return make_plan(shape, profile, method, with_zeros(shape, method, bits))


def make_codec(xp, plan: Plan, layer_group: int, like=None):
    """Codec of a layer group, by number, for a live cache, or None for a plan that compresses nothing.

    Raises UsageError for a method that makes files only.
    """
    get_live_method(plan.method)
    return plan.make_codec(xp, layer_group, like)


def bits_range(method: Method, shape: ModelShape | None = None) -> tuple[float, float]:
    """Lowest and highest `bits` that a method can reach; without a `shape`, bounds where they depend on it."""
    family = family_of(method)
    if shape is not None:
        return family.bits_range(shape, method)
    if not family.bits_by_shape:
        return family.bits_range(NO_SHAPE, method)
    lows, highs = zip(*(family.bits_range(extreme, method) for extreme in EXTREMES))
    return min(lows), max(highs)


def check_bits(method: Method, bits: float | None, shape: ModelShape | None = None) -> None:
    """Raise UsageError for `bits` that `method` cannot reach for a model of `shape`; without a shape, for any model.

    None asks for the method's own bits. What this lets pass without a shape can still be out of range for a model.
    """
    low, high = bits_range(method, shape)
    if bits is not None and not low <= bits <= high:
        family = family_of(method)
        options = ", ".join(f"{option:g}" for option in family.bits_options(shape or NO_SHAPE, method))
        reach = f"of {options}" if options else f"between {low:g} and {high:g}"
        whose = f"{method.name} with any model" if shape is None and family.bits_by_shape else method.name
        raise UsageError(f"Expected bits {reach} for {whose}, received {bits:g}.")


def usable_method(method: str | Method) -> Method:
    """`get_method` for a cache that is new: with the scalar quantizer, said once, where no trellis can be searched fast."""
    method = get_method(method)
    if method.quantizer != "trellis" or trellis.is_fast():
        return method
    _say_scalar()
    return replace(method, quantizer="scalar")


@cache
def _say_scalar() -> None:
    if not disabled():
        warnings.warn(
            "spectralkv found no C compiler, which its trellis codes need: codes are chosen one by one, at some 1.4 times the "
            "divergence for the same bytes. Install one (cc, gcc or clang; on a Mac: xcode-select --install).",
            stacklevel=4,
        )

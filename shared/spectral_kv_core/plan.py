"""Profile + budget + method -> the plan: which width every coefficient of every layer gets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .allocation import allocate_bits
from .methods import Method, get_method
from .profile import BasisSet, ModelShape, Profile
from .quantizer import BIT_WIDTHS
from .transform import band_sizes

MIN_BITS, MAX_BITS = 0.25, 8.0
AFFINE_WIDTHS = (2, 3, 4, 5, 6, 8)
PADDING = 1 / 1024  # share of the budget kept for codes that do not fill a byte, so that `bits` stays a ceiling
MEASURED_SHARE = 0.5  # beta of RATE_DISTORTION.md, section 5, step 4: measured against product-model costs


@dataclass(frozen=True)
class Plan:
    """What one method stores under one budget.

    bits: the ceiling asked for, average stored bits per K or V element of the sealed region. widths: [L, G, R, F]
    uint8 for the spectral codec, None otherwise. affine_bits: width of the codes of the affine codec.
    """

    method: Method
    bits: float
    shape: ModelShape
    basis_set: BasisSet | None = None
    widths: np.ndarray | None = None
    affine_bits: int = 0
    profile: Profile | None = None

    @cached_property
    def bits_per_element(self) -> float:
        """Average bits per element that a sealed token really takes, everything stored per token included."""
        if self.method.codec == "none":
            return 16.0
        if self.method.codec == "affine":
            return self.affine_bits + 32 / self.method.group_size
        sizes = band_sizes(self.basis_set.block)
        per_block = int((self.widths.astype(np.int64) * sizes).sum())
        return per_block / (self.basis_set.block * elements_per_token(self.shape))

    @property
    def hash(self) -> str:
        """Identifies what codes mean: method and widths."""
        digest = hashlib.sha256(f"{self.method}{self.affine_bits}".encode())
        if self.widths is not None:
            digest.update(np.ascontiguousarray(self.widths).tobytes())
        return digest.hexdigest()[:16]


def elements_per_token(shape: ModelShape) -> int:
    """K and V elements of one token over all compressible layers."""
    return 2 * len(shape.layers) * shape.kv_heads * shape.head_dim


def make_plan(
    shape: ModelShape, profile: Profile | None, method: str | Method = "spectral", bits: float | None = None
) -> Plan:
    """Allocate `bits` (default 3) per sealed element for a model of `shape`.

    Raises ValueError for a budget out of range (with the possible one), a profile of another model, or a head_dim that
    the method's groups do not divide.
    """
    method = get_method(method)
    bits = 3.0 if bits is None else float(bits)
    if method.codec == "none":
        return Plan(method, 16.0, shape)
    if method.codec == "affine":
        return _affine_plan(shape, method, bits)
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"Expected bits between {MIN_BITS:g} and {MAX_BITS:g} for {method.name}, received {bits:g}.")
    if profile is None:
        raise ValueError(
            f"Expected a profile for the method {method.name}, received none. Make one: spectralkv profile"
        )
    profile.check(shape)
    basis_set = profile.basis_set(method.basis_set)
    sizes = band_sizes(basis_set.block)
    budget = int(np.floor(bits * (1 - PADDING) * elements_per_token(shape) * basis_set.block))
    copies = np.broadcast_to(sizes, basis_set.variance.shape).reshape(-1)
    widths = allocate_bits(_costs(basis_set, sizes).reshape(len(copies), -1), copies, budget)
    return Plan(method, bits, shape, basis_set, widths.reshape(basis_set.variance.shape), 0, profile)


def plan_for(
    shape: ModelShape,
    profile: Profile | None,
    method: str | Method = "spectral",
    bits: float | None = None,
    budget_bytes: int | None = None,
    max_context: int | None = None,
    window: int = 64,
    sinks: int = 4,
    element_bytes: int = 2,
    other_bytes: int = 0,
) -> Plan:
    """`make_plan` from `bits`, or from `budget_bytes` for a cache of `max_context` tokens.

    `element_bytes`: size of an exact element; `other_bytes`: what the layers that pass through need at that length.
    """
    for name, value in (("window", window), ("sinks", sinks)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"Expected {name} to be a number of tokens, 0 or more, received {value!r}.")
    if budget_bytes is None:
        return make_plan(shape, profile, method, bits)
    if bits is not None:
        raise ValueError("Expected bits or budget_bytes, received both.")
    if max_context is None:
        raise ValueError("Expected max_context, the tokens that budget_bytes must hold, received none.")
    bits = bits_for_bytes(shape, budget_bytes, max_context, window, sinks, element_bytes, other_bytes)
    return make_plan(shape, profile, method, bits)


def bits_for_bytes(
    shape: ModelShape,
    budget_bytes: int,
    context: int,
    window: int,
    sinks: int,
    element_bytes: int,
    other_bytes: int = 0,
) -> float:
    """Bits per sealed element that keep a cache of `context` tokens within `budget_bytes`.

    `other_bytes`: what the layers that pass through need. Raises ValueError with the possible range.
    """
    exact = min(context, sinks + window + 15)  # up to 15 tokens wait for their block to fill
    per_token = elements_per_token(shape)
    fixed = exact * per_token * element_bytes + other_bytes
    sealed = context - exact
    if sealed <= 0:
        raise ValueError(
            f"Expected a max_context above sinks + window + 15 = {exact} tokens for budget_bytes, received {context}."
        )
    bits = (budget_bytes - fixed) * 8 / (sealed * per_token)
    if not bits >= MIN_BITS:
        low = int(np.ceil(fixed + MIN_BITS * sealed * per_token / 8))
        high = int(fixed + MAX_BITS * sealed * per_token / 8)
        raise ValueError(
            f"Expected budget_bytes between {low:,} and {high:,} for {context:,} tokens with {sinks} sinks and a window "
            f"of {window}, received {budget_bytes:,}."
        )
    return min(bits, MAX_BITS)


def _affine_plan(shape: ModelShape, method: Method, bits: float) -> Plan:
    if shape.head_dim % method.group_size:
        raise ValueError(
            f"Expected a head_dim that is a multiple of the group of {method.group_size} channels, received head_dim "
            f'{shape.head_dim}. Use method="spectral", which has no groups.'
        )
    overhead = 32 / method.group_size
    reachable = [b for b in AFFINE_WIDTHS if b + overhead <= bits]
    if not reachable or bits > AFFINE_WIDTHS[-1] + overhead:
        options = ", ".join(f"{b + overhead:g}" for b in AFFINE_WIDTHS)
        raise ValueError(f"Expected bits of at least one of {options} for affine, received {bits:g}.")
    return Plan(method, bits, shape, affine_bits=reachable[-1])


def _costs(basis_set: BasisSet, sizes: np.ndarray) -> np.ndarray:
    """Expected loss [L, G, R, F, W] of every coefficient band at every width, up to one common factor.

    J(b) = n_f * (beta * E[g^2 (y - Q_b(y))^2] + (1 - beta) * E[g^2] E[y^2] D(b)): the second-order loss of a Fisher
    metric (RATE_DISTORTION.md, section 5), half measured, half the product model that generalises better.
    """
    product = basis_set.sensitivity.astype(np.float64) * basis_set.variance
    distortion = np.array([1.0] + [_distortion(basis_set.levels[b]) for b in BIT_WIDTHS if b])
    mixed = MEASURED_SHARE * basis_set.cost.astype(np.float64) + (1 - MEASURED_SHARE) * product[..., None] * distortion
    return mixed * sizes[:, None]


def _distortion(levels: np.ndarray) -> float:
    """Mean squared error of a quantizer on the standard normal density."""
    grid = np.linspace(-6, 6, 4001)
    density = np.exp(-(grid**2) / 2)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    return float(((grid - nearest) ** 2 * density).sum() / density.sum())

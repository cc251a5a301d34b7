"""Profile + budget + method -> the plan: which width every coefficient of every layer gets."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from ..arrays.transform import band_sizes
from ..codecs.registry import plan_class
from ..profile.basis_set import HISTOGRAM_LIMIT, BasisSet
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.entropy import StepTable, step_tables
from ..quantization.quantizer import BIT_WIDTHS, flat_levels, flat_tables
from ..quantization.trellis import ERROR_RATIOS, codebooks
from ..scorers import get_scorer
from .allocation import allocate_bits
from .methods import Method, get_method

HASH_VERSION = 2  # of what a plan's hash is made of; 1 was the representation of Python objects
DECIDING = ("codec", "rope", "group", "time", "block", "group_size", "quantizer", "rounding")  # fields of a method
SEAL = 16  # tokens are sealed in multiples of this, and of the block of their codec
MIN_BITS, MAX_BITS = 0.25, 8.0
STORED_BITS = (0.1, 7.0)  # the range of entropy-coded plans
RATE_UNIT = 2**-16  # of the rates of entropy-coded tables, in bits: sums of integers are the same on every machine
AFFINE_WIDTHS = (2, 3, 4, 5, 6, 8)
PADDING = 1 / 1024  # share of the budget kept for codes that do not fill a byte, so that `bits` stays a ceiling;
FULL_PADDING = 0.5  # below so many bits more, as the bytes that they waste stay the same
STAGING_BITS = 4.0  # of a prompt that is still coming in
MIN_GAIN = 1e-3  # a frequency that costs next to nothing still has a defined rounding
MEASURED_SHARE = 0.9  # of the measured cost beside the product model; results/experiments.md
COHERENCE = 3.0  # how much more an error that follows the signal costs than one that does not; results/experiments.md
MAX_EXPANSION = 1.35  # of decoded coefficients: a rare code of a wide dead zone is nearly right as it is


@dataclass(frozen=True)
class Plan:
    """What one method stores under one budget.

    bits: the ceiling asked for, average stored bits per K or V element of the sealed region. widths: [L, G, R, F]
    uint8 for the spectral codec, None otherwise. affine_bits: width of the codes of the affine codec. tables, choices:
    the quantizers of the stored codec, from the one that drops a coefficient to the finest, and which of them a
    coefficient has, [L, G, R, F] uint8.
    """

    method: Method
    bits: float
    shape: ModelShape
    basis_set: BasisSet | None = None
    widths: np.ndarray | None = None
    affine_bits: int = 0
    profile: Profile | None = None
    tables: tuple[StepTable, ...] = ()
    choices: np.ndarray | None = None

    def __deepcopy__(self, memo) -> Plan:
        """Itself: nothing in a plan changes, and caches that are copied share what was made of it."""
        return self

    @cached_property
    def layer_groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the layers that every row of the plan stands for."""
        return self.shape.layer_groups(self.method.group)

    @property
    def coded(self) -> np.ndarray:
        """Which coefficients are stored at all: bool [L, G, R, F]."""
        return (self.widths if self.choices is None else self.choices) > 0

    @property
    def rates(self) -> np.ndarray:
        """Bits per coefficient [L, G, R, F] float64; of entropy codes on calibration text, before time rounding."""
        if self.choices is None:
            return self.widths.astype(np.float64)
        return (_table_rates(self.tables) * RATE_UNIT)[self.choices]

    @cached_property
    def bits_per_element(self) -> float:
        """Average bits per element that a sealed token really takes, everything stored per token included."""
        if self.method.codec == "none":
            return 16.0
        if self.method.codec == "affine":
            return self.affine_bits + 32 / self.method.group_size
        per_block = float((self.rates * band_sizes(self.basis_set.block)).sum())
        return per_block / (self.basis_set.block * elements_per_token(self.shape))

    @cached_property
    def staging(self) -> Plan | None:
        """What holds a prompt until it ends: the same recipe at `STAGING_BITS`; None for a plan of as many bits.

        Later calls of a prompt attend to what earlier ones left; at few bits the error of every call would build up
        through the layers (docs/decisions/rate-distortion-2.md, section 4).
        """
        if self.widths is None or self.profile is None or self.bits >= STAGING_BITS:
            return None
        plain = replace(self.method, rounding="nearest", quantizer="scalar")
        return make_plan(self.shape, self.profile, plain, STAGING_BITS)

    @cached_property
    def levels(self) -> dict[int, np.ndarray]:
        """What codes are decoded to by width, in standard deviations: `nearest_levels`, expanded (`_expansion`)."""
        expansion = _expansion(np.array(_distortions(self.basis_set, self.trellis)))
        return {b: (self.nearest_levels[b] * e).astype(np.float32) for b, e in zip(BIT_WIDTHS, expansion) if b}

    @cached_property
    def nearest_levels(self) -> dict[int, np.ndarray]:
        """What codes stand for when they are chosen, by width: the profile's levels, a trellis' codebooks in their place."""
        levels = self.basis_set.levels
        return {**levels, **codebooks(levels)} if self.trellis else levels

    @property
    def trellis(self) -> bool:
        """Whether codes are those of `trellis`."""
        return self.method.quantizer == "trellis"

    def quantizers(self, xp, like=None) -> tuple:
        """`quantizer.flat_tables` as arrays of `xp` on the device of `like`, made once for all layers."""
        made = self.__dict__.setdefault("_quantizers", {})
        key = (xp.__name__, str(getattr(like, "device", like)))
        if key not in made:
            made[key] = tuple(xp.asarray(table, like=like) for table in self._flat_tables)
        return made[key]

    @cached_property
    def search_tables(self) -> tuple[np.ndarray, ...]:
        """`quantizer.flat_tables`, and the levels that a trellis search takes codes for, laid out in the same way."""
        return *self._flat_tables, flat_levels(self.nearest_levels)

    @cached_property
    def _flat_tables(self) -> tuple[np.ndarray, np.ndarray]:
        return flat_tables(self.basis_set.levels, self.levels)

    @property
    def rounds(self) -> bool:
        """Whether codes are chosen by what each token will weigh; a profile without query statistics rounds to nearest."""
        if self.method.rounding == "nearest":
            return False
        return bool(self.query_statistics(0)) or not get_scorer(self.method.rounding).needs_queries

    def query_statistics(self, row: int) -> dict[str, np.ndarray]:
        """What `scorers.Tokens` takes of the profile for the heads of the layers of `row`; empty where it has nothing."""
        queries = self.profile.queries if self.profile is not None else None
        if queries is None:
            return {}
        numbers = [self.shape.layers.index(layer_idx) for layer_idx in self.layer_groups[row]]
        return {f"query_{name}": np.concatenate(getattr(queries, name)[numbers]) for name in queries.ARRAYS}

    def gain(self, row: int) -> np.ndarray:
        """Root of what losing a whole coefficient costs [G, R, F], relative to the largest of its component."""
        loss = self.loss(row)
        peak = loss.max(-1, keepdims=True)
        return np.sqrt(np.maximum(loss / np.where(peak > 0, peak, 1), MIN_GAIN**2))

    def loss(self, row: int) -> np.ndarray:
        """What losing a whole coefficient costs [G, R, F] float64, up to one factor."""
        basis_set = self.basis_set
        product = basis_set.sensitivity[row].astype(np.float64) * basis_set.variance[row]
        return MEASURED_SHARE * basis_set.cost[row, ..., 0] + (1 - MEASURED_SHARE) * product

    def decides(self) -> dict:
        """By name, the arrays and numbers that say what codes mean; the order of a trellis follows from losses."""
        basis_set, arrays = self.basis_set, {}
        if self.method.codec == "affine":
            return {"code_bits": self.affine_bits}
        if basis_set is None:
            return {}
        arrays = {name: getattr(basis_set, name) for name in ("mean", "weight", "basis", "variance")}
        if self.choices is not None:
            arrays["choices"] = self.choices
            for i, table in enumerate(self.tables):
                steps = np.array([table.step, table.offset])
                arrays |= {f"tables/{i}/{n}": x for n, x in (("levels", table.levels), ("steps", steps))}
                arrays[f"tables/{i}/frequencies"] = table.frequencies
            return arrays
        arrays["widths"] = self.widths
        arrays |= {f"nearest_levels/{b}": x for b, x in basis_set.levels.items()}
        arrays |= {f"levels/{b}": x for b, x in self.levels.items()}
        if self.trellis:
            arrays["loss"] = np.stack([self.loss(row) for row in range(len(self.widths))])
        return arrays

    @cached_property
    def hash(self) -> str:
        """Identifies what codes mean: the first digits of SHA-256 of versioned JSON of all that decides them.

        RoPE frequencies are not part of it: hosts differ in their last bits, and files compare them by a tolerance
        (`ModelShape.mismatch`).
        """
        shape = self.shape
        fields = {
            "version": HASH_VERSION,
            "method": {name: getattr(self.method, name) for name in DECIDING},
            "layers": list(shape.layers),
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "rotary_dim": shape.rope.rotary_dim if shape.rope else 0,
            "interleaved": bool(shape.rope and shape.rope.interleaved),
            "arrays": {name: _array_digest(x) for name, x in self.decides().items()},
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _array_digest(x) -> str:
    """SHA-256 of the dtype, the shape and the bytes of an array, little-endian."""
    x = np.ascontiguousarray(x)
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(f"{x.dtype.str}{x.shape}".encode() + x.tobytes()).hexdigest()


def elements_per_token(shape: ModelShape) -> int:
    """K and V elements of one token over all compressible layers."""
    return 2 * len(shape.layers) * shape.kv_heads * shape.head_dim


def make_plan(
    shape: ModelShape, profile: Profile | None, method: str | Method = "spectral", bits: float | None = None
) -> Plan:
    """Allocate `bits` per sealed element for a model of `shape`; default 3, 4-bit codes for affine, or the method's own.

    Raises ValueError for a budget out of range (with the possible one), a profile of another model, or a head_dim that
    the method's groups do not divide.
    """
    method = get_method(method)
    family = plan_class(method.codec)
    if bits is None:
        defaults = {"none": 16.0, "affine": 4 + 32 / method.group_size, "spectral": 3.0, "entropy-coded": 1.0}
        bits = family.default_bits(shape, method) if family else defaults[method.codec]
    if method.profile_set and profile is not None:
        profile.check(shape)
    if method.codec == "affine":
        return replace(_affine_plan(shape, method, bits), profile=profile if method.profile_set else None)
    if not family:  # a family has its own words for what it can reach
        check_bits(method, shape, bits)
    if method.codec == "none":
        return Plan(method, bits, shape, profile=profile if method.profile_set else None)
    if method.basis_set and profile is None:
        raise ValueError(
            f"Expected a profile for the method {method.name}, received none. Make one: spectralkv profile"
        )
    if family:
        return family.make(shape, profile, method, bits)
    basis_set = profile.basis_set(method.basis_set)
    if (basis_set.time, basis_set.block) != (method.time, method.block):
        raise ValueError(
            f"Expected the time transform {method.time} over {method.block} tokens for {method.name}, the profile has "
            f"{basis_set.time} over {basis_set.block}. Calibrate again: spectralkv profile --model {profile.model}"
        )
    if method.codec == "entropy-coded":
        return _stored_plan(shape, profile, method, bits)
    sizes = band_sizes(basis_set.block)
    padding = PADDING * max(1.0, FULL_PADDING / bits)
    budget = int(np.floor(bits * (1 - padding) * elements_per_token(shape) * basis_set.block))
    copies = np.broadcast_to(sizes, basis_set.variance.shape).reshape(-1)
    costs = _costs(basis_set, method.quantizer == "trellis") * sizes[:, None]
    widths = allocate_bits(costs.reshape(len(copies), -1), copies, budget)
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
    whole_number("window", window, 0)
    whole_number("sinks", sinks, 0)
    if budget_bytes is None:
        return make_plan(shape, profile, method, bits)
    if bits is not None:
        raise ValueError("Expected bits or budget_bytes, received both.")
    if max_context is None:
        raise ValueError("Expected max_context, the tokens that budget_bytes must hold, received none.")
    method = get_method(method)
    allowed, block = bits_range(method, shape), max(SEAL, method.block)
    bits = bits_for_bytes(shape, budget_bytes, max_context, window, sinks, element_bytes, other_bytes, allowed, block)
    return make_plan(shape, profile, method, bits)


def check_bits(method: Method, shape: ModelShape, bits: float) -> None:
    """Raise ValueError unless `bits` lie within what `method` can reach."""
    low, high = bits_range(method, shape)
    if not low <= bits <= high:
        raise ValueError(f"Expected bits between {low:g} and {high:g} for {method.name}, received {bits:g}.")


def whole_number(name: str, value, least: int) -> None:
    """Raise ValueError unless `value` is a number of tokens, `least` or more; NumPy's integers are, True is not."""
    try:
        right = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        right = False
    if not right:
        raise ValueError(f"Expected {name} to be a number of tokens, {least} or more, received {value!r}.")


def bits_range(method: Method, shape: ModelShape | None = None) -> tuple[float, float]:
    """Lowest and highest `bits` that a method can reach; without a `shape`, bounds where they depend on it."""
    if family := plan_class(method.codec):
        return family.range(shape, method) if shape is not None else (0.0, 16.0)
    if method.codec == "none":
        return 16.0, 16.0
    if method.codec == "affine":
        overhead = 32 / method.group_size
        return AFFINE_WIDTHS[0] + overhead, AFFINE_WIDTHS[-1] + overhead
    if method.codec == "entropy-coded":
        return STORED_BITS
    return MIN_BITS, MAX_BITS


def bits_for_bytes(
    shape: ModelShape,
    budget_bytes: int,
    context: int,
    window: int,
    sinks: int,
    element_bytes: int,
    other_bytes: int = 0,
    allowed: tuple[float, float] = (MIN_BITS, MAX_BITS),
    block: int = SEAL,
) -> float:
    """Bits per sealed element that keep a cache of `context` tokens within `budget_bytes`.

    `other_bytes`: what the layers that pass through need; `allowed`: lowest and highest bits of the method; `block`:
    tokens that are sealed at a time.
    Raises ValueError with the possible range.
    """
    waiting = block - 1  # tokens, at most, until their block is full
    exact = min(context, sinks + window + waiting)
    per_token = elements_per_token(shape)
    fixed = exact * per_token * element_bytes + other_bytes
    sealed = context - exact
    if sealed <= 0:
        raise ValueError(
            f"Expected a max_context above sinks + window + {waiting} = {exact} tokens for budget_bytes, received {context}."
        )
    bits = (budget_bytes - fixed) * 8 / (sealed * per_token)
    if not bits >= allowed[0]:
        low = int(np.ceil(fixed + allowed[0] * sealed * per_token / 8))
        high = int(fixed + allowed[1] * sealed * per_token / 8)
        raise ValueError(
            f"Expected budget_bytes between {low:,} and {high:,} for {context:,} tokens with {sinks} sinks and a window "
            f"of {window}, received {budget_bytes:,}."
        )
    return min(bits, allowed[1])


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
        raise ValueError(f"Expected bits of {options} for affine, received {bits:g}.")
    return Plan(method, bits, shape, affine_bits=reachable[-1])


def _stored_plan(shape: ModelShape, profile: Profile, method: Method, bits: float) -> Plan:
    """One Lagrangian over all coefficients and tables, with the rates that the tables have on calibration text."""
    basis_set = profile.basis_set(method.basis_set)
    if basis_set.histogram is None:
        raise ValueError(
            f"Expected a profile with the histogram that {method.name} codes by, {profile.path or 'this one'} is older. "
            f"Calibrate again: spectralkv profile --model {profile.model}"
        )
    tables = _step_tables(basis_set.histogram.tobytes())
    tables = tuple(replace(t, levels=(t.levels * _expansion(t.mse)).astype(np.float32)) for t in tables)
    sizes, rates = band_sizes(basis_set.block), _table_rates(tables)
    budget = int(bits * elements_per_token(shape) * basis_set.block / RATE_UNIT)
    copies = np.broadcast_to(sizes, basis_set.variance.shape).reshape(-1)
    costs = (_stored_costs(basis_set, tables) * sizes[:, None]).reshape(len(copies), -1)
    choices = allocate_bits(costs, copies, budget, rates)
    choices = choices.reshape(basis_set.variance.shape)
    return Plan(method, bits, shape, basis_set, profile=profile, tables=tables, choices=choices)


@lru_cache(maxsize=4)
def _step_tables(histogram: bytes) -> tuple[StepTable, ...]:
    return tuple(step_tables(np.frombuffer(histogram, np.int64), HISTOGRAM_LIMIT))


def _table_rates(tables: tuple[StepTable, ...]) -> np.ndarray:
    """Rates [tables] int64 in `RATE_UNIT`."""
    return np.array([round(t.rate / RATE_UNIT) for t in tables], np.int64)


def _stored_costs(basis_set: BasisSet, tables: tuple[StepTable, ...]) -> np.ndarray:
    """`_costs` for entropy-coded tables, [L, G, R, F, tables].

    What was measured at a fixed width b is taken over as a ratio to the product model, E[g^2 (y - Q_b(y))^2] /
    (E[g^2] E[y^2] D(b)), and interpolated linearly in log D.
    """
    product = basis_set.sensitivity.astype(np.float64) * basis_set.variance
    safe = np.where(product > 0, product, 1.0)
    distortion = _distortions(basis_set)
    known = [-math.log(d) for d in distortion]  # ascending
    columns = []
    for t in tables:
        at = min(max(-math.log(t.mse), known[0]), known[-1])
        i = min(int(np.searchsorted(known, at, side="right")), len(known) - 1)
        share = float(f"{(at - known[i - 1]) / (known[i] - known[i - 1]):.9g}")  # logarithms differ between machines
        low, high = (basis_set.cost[..., j] / safe / distortion[j] for j in (i - 1, i))
        ratio = low * (1 - share) + high * share
        columns.append((MEASURED_SHARE * ratio + (1 - MEASURED_SHARE)) * product * t.mse * _coherent_cost(t.mse))
    return np.stack(columns, axis=-1)


def planned_loss(plan: Plan) -> np.ndarray:
    """What the codes of `plan` cost by its own reckoning, [L, G] float64 per block, up to one factor."""
    costs = _costs(plan.basis_set, plan.trellis) * band_sizes(plan.basis_set.block)[:, None]
    places = np.searchsorted(BIT_WIDTHS, plan.widths)[..., None]
    return np.take_along_axis(costs, places, -1)[..., 0].sum((-1, -2))


def _costs(basis_set: BasisSet, trellis: bool = False) -> np.ndarray:
    """Expected loss [L, G, R, F, W] of one coefficient of every band at every width, up to one common factor.

    J(b) = (beta * E[g^2 (y - Q_b(y))^2] + (1 - beta) * E[g^2] E[y^2] D(b)): the second-order loss of a Fisher
    metric (docs/decisions/rate-distortion.md, section 5), mostly measured, times `_coherent_cost`. What was measured
    of scalar quantizers is worth as much less with a trellis as its squared error is.
    """
    product = basis_set.sensitivity.astype(np.float64) * basis_set.variance
    distortion = np.array(_distortions(basis_set, trellis))
    measured = basis_set.cost * (distortion / _distortions(basis_set))
    cost = MEASURED_SHARE * measured + (1 - MEASURED_SHARE) * product[..., None] * distortion
    return cost * _coherent_cost(distortion)


def _expansion(distortion):
    """What decoded coefficients are multiplied by, at a mean squared error D of their quantizer (in variances).

    A centroid quantizer decodes y to (1 - D) y and noise of variance D (1 - D). Attention averages the noise over tokens;
    what is lost, D y, points the same way in every token and component and flattens the scores. Where it costs
    k = `COHERENCE` times what noise costs, decoding to k / (D + k (1 - D)) times the centroid is best.
    """
    return np.minimum(COHERENCE / (distortion + COHERENCE * (1 - distortion)), MAX_EXPANSION)


def _coherent_cost(distortion):
    """Cost at a mean squared error D, expansion included, in units of what D would cost as mere noise; 1 at D = 0."""
    expansion = _expansion(distortion)
    lost = 1 - expansion * (1 - distortion)
    return COHERENCE * lost**2 / distortion + expansion**2 * (1 - distortion)


def _distortions(basis_set: BasisSet, trellis: bool = False) -> list[float]:
    """`_distortion` at every width, as much lower as a `trellis` makes it."""
    ratios = ERROR_RATIOS if trellis else {}
    return [1.0] + [_distortion(basis_set.levels[b]) * ratios.get(b, 1.0) for b in BIT_WIDTHS if b]


def _distortion(levels: np.ndarray) -> float:
    """Mean squared error of a quantizer on the standard normal density."""
    grid = np.linspace(-6, 6, 4001)
    density = np.exp(-(grid**2) / 2)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    error = ((grid - nearest) ** 2 * density).sum() / density.sum()
    return float(f"{error:.9g}")  # the last bits of exp and of a sum differ between machines

"""One attention layer of a known shape with random keys and values: what speed depends on, without a model."""

from __future__ import annotations

import numpy as np

from ..arrays import ops
from ..arrays.rope import Rope, rotate
from ..arrays.transform import band_sizes
from ..codecs.registry import family_of, make_plan, usable_method
from ..codecs.spectral import SpectralPlan
from ..codecs.transform import TransformPlan
from ..errors import UsageError
from ..planning.methods import Method
from ..planning.plan import Plan
from ..profile.basis_set import HISTOGRAM_BINS, HISTOGRAM_LIMIT, BasisSet
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile, QueryStatistics
from ..profile.store import packaged_profiles
from ..quantization.quantizer import BIT_WIDTHS, empirical_tables

SHAPES = {  # q_heads, kv_heads, head_dim, RoPE base
    "llama-3.1-8b": (32, 8, 128, 5e5),
    "qwen2.5-7b": (28, 4, 128, 1e6),
    "gemma-3-1b": (4, 1, 256, 1e6),
    "smollm2-135m": (9, 3, 64, 1e5),
}
PLANS = ("flat", "typical")


def synthetic_shape(name: str) -> ModelShape:
    """A layer of the model `name` as a model of its own; raises UsageError that lists the names there are."""
    if name not in SHAPES:
        raise UsageError(f"Expected a shape among {', '.join(SHAPES)} for `synthetic`, received {name!r}.")
    q_heads, kv_heads, head_dim, base = SHAPES[name]
    rope = Rope(tuple(float(w) for w in base ** (-np.arange(0, head_dim, 2) / head_dim)))
    return ModelShape(1, q_heads * head_dim, q_heads, kv_heads, head_dim, (0,), rope)


def synthetic_vectors(shape: ModelShape, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys, both after RoPE, and values [1, H, tokens, D] float32: independent normal numbers."""
    rng, rope = np.random.default_rng(seed), shape.rope
    assert rope is not None, "every shape of SHAPES has one"

    def draw(heads):
        return rng.standard_normal((1, heads, tokens, shape.head_dim), dtype=np.float32)

    queries, keys, values = draw(shape.q_heads), draw(shape.kv_heads), draw(shape.kv_heads)
    return rotate(ops, queries, rope, 0), rotate(ops, keys, rope, 0), values


def synthetic_profile(shape: ModelShape, methods: list[Method], seed: int = 0) -> Profile:
    """Profile that fits `synthetic_vectors`: random orthogonal bases, in which every coefficient has variance 1."""
    rng = np.random.default_rng(seed)
    sets = {name: _white_set(shape, m, name, rng) for m in methods if (name := m.basis_set)}
    scale = shape.head_dim**-0.5  # is in the statistics of queries
    queries = QueryStatistics(
        mean=np.zeros((1, shape.q_heads, shape.head_dim)),
        root=np.broadcast_to(scale * np.eye(shape.head_dim), (1, shape.kv_heads, shape.head_dim, shape.head_dim)),
        amplitude=np.full((1, shape.q_heads, shape.head_dim // 2), scale * np.sqrt(np.pi / 2)),
    )
    return Profile(shape, "synthetic", {}, sets, queries)


def synthetic_plan(shape: ModelShape, profile: Profile, method: Method, bits: float, plan: str | None) -> Plan:
    """What `method` stores: `flat` has every coefficient at `bits`, `typical` the widths of a real plan of so many bits.

    The published methods have one plan for their bits. Raises UsageError for bits that are no width of a flat plan, or
    that the method cannot reach.
    """
    method = usable_method(method)
    family = family_of(method)
    if not method.compresses:
        return make_plan(shape, None, method)
    if family.bits_by_shape:
        return make_plan(shape, profile, method, bits)
    if plan == "flat":
        _check_flat(bits)
    if not method.transforms:
        return make_plan(shape, None, method, family.flat_bits(method, bits) if plan == "flat" else bits)
    assert issubclass(family, SpectralPlan) and method.basis_set is not None, "what transforms has widths and a basis"
    basis_set = profile.basis_set(method.basis_set)
    if plan == "flat":
        held = np.full(basis_set.variance.shape, bits, np.uint8)
    else:
        held = typical_widths(_real_plan(method, bits), *basis_set.variance.shape[1:3])
    return family(method, float(bits), shape, profile, basis_set, held)


def _check_flat(bits: float) -> None:
    if bits not in BIT_WIDTHS[1:]:
        widths = ", ".join(map(str, BIT_WIDTHS[1:]))
        raise UsageError(f"Expected `bits` of {widths} for a flat plan, received {bits:g}. Or take `plan` typical.")


def typical_widths(real: SpectralPlan, groups: int, rank: int) -> np.ndarray:
    """Widths [1, groups, rank, F] with the share of each width per band that plan `real` has, keys and values apart.

    As in a real plan, early components have the larger widths, in every band.
    """
    sides = 2 if groups > 1 else 1  # groups are keys then values, or all in one
    made = []
    for side in np.split(real.widths, sides, axis=1):
        entries = groups // sides * rank
        bands = [np.sort(_resample(side[..., f].reshape(-1), entries))[::-1] for f in range(side.shape[-1])]
        made.append(np.stack(bands, axis=-1).reshape(rank, groups // sides, -1).swapaxes(0, 1))
    return np.concatenate(made)[None].astype(np.uint8)


def kept_share(plan: Plan) -> float:
    """Share of the coefficients that have any bits."""
    if not isinstance(plan, TransformPlan):
        return 1.0
    sizes = band_sizes(plan.basis_set.block)
    return float((plan.coded * sizes).sum() / (plan.coded[..., 0].size * sizes.sum()))


def _real_plan(method: Method, bits: float) -> SpectralPlan:
    real = Profile.load(packaged_profiles()[0])
    plan = make_plan(real.shape, real, method, bits)
    assert isinstance(plan, SpectralPlan), "asked of methods that transform alone"
    return plan


def _resample(widths: np.ndarray, entries: int) -> np.ndarray:
    """`entries` values that have the histogram of `widths`, to the nearest whole number."""
    places = ((np.arange(entries) + 0.5) / entries * len(widths)).astype(int)
    return np.sort(widths)[places]


def _white_set(shape: ModelShape, method: Method, name: str, rng: np.random.Generator) -> BasisSet:
    group, rope = name.split(".")
    time, block = ("dct", 16) if method.reads else (method.time, method.block)
    shape.layer_groups(group)  # raises where layers are coded together
    groups = {"head": 2 * shape.kv_heads, "side": 2, "layer": 1}[group]
    members = 2 * shape.kv_heads // groups
    rank = members * shape.head_dim
    basis = np.linalg.qr(rng.standard_normal((1, groups, rank, rank)))[0]
    centers = (np.arange(HISTOGRAM_BINS) + 0.5) * (HISTOGRAM_LIMIT / HISTOGRAM_BINS)
    histogram = np.round(1e9 * np.exp(-(centers**2) / 2)).astype(np.int64)
    variance = np.ones((1, groups, rank, len(band_sizes(block))), np.float32)
    return BasisSet(
        group,
        rope,
        time,
        block,
        mean=np.zeros((1, groups, rank), np.float32),
        weight=np.ones((1, groups, members), np.float32),
        basis=basis.astype(np.float32),
        variance=variance,
        sensitivity=variance,
        cost=variance[..., None] * np.float32(4.0) ** -np.array(BIT_WIDTHS, np.float32),
        levels=empirical_tables(histogram, HISTOGRAM_LIMIT),
        histogram=histogram,
    )

"""What the codecs of latents share: plans over coefficients, and keys and values <-> coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any

import numpy as np

from ..arrays.basis import orthonormalize
from ..arrays.rope import Rope, rotate, unrotate
from ..arrays.transform import band_sizes, octave_bands, time_matrix, to_frequency, to_time
from ..errors import UsageError
from ..planning.budget import elements_per_token
from ..planning.loss import coefficient_loss, rounding_gain
from ..planning.methods import Method
from ..planning.plan import Plan, needed, read_set
from ..profile.basis_set import BasisSet
from ..profile.profile import Profile
from ..quantization.time_rounding import TokenWeights
from ..scorers import get_scorer
from .base import Codec, Reader
from .chunk import join_layers, split_layers


@dataclass(frozen=True, eq=False)
class TransformPlan(Plan):
    """A plan over coefficients: layer groups L, groups G, components R and bands F of frequencies.

    basis_set: what vectors are projected on, never None in a plan that is made.
    """

    basis_set: BasisSet = None  # type: ignore[assignment]  # a field behind those with defaults

    @classmethod
    def fitting_basis_set(cls, profile: Profile | None, method: Method) -> BasisSet:
        """The basis set of `profile` that `method` reads; raises UsageError for one of another time transform."""
        basis_set = read_set(profile, method)
        if (basis_set.time, basis_set.block) != (method.time, method.block):
            raise UsageError(
                f"Expected the time transform {method.time} over {method.block} tokens for {method.name}, the profile has "
                f"{basis_set.time} over {basis_set.block}. Calibrate again: spectralkv profile --model {needed(profile).model}"
            )
        return basis_set

    @property
    def coded(self) -> np.ndarray:
        """Which coefficients are stored at all: bool [L, G, R, F]."""
        raise NotImplementedError

    @property
    def rates(self) -> np.ndarray:
        """Bits per coefficient [L, G, R, F] float64."""
        raise NotImplementedError

    @cached_property
    def bits_per_element(self) -> float:
        """Average bits per element that a sealed token really takes, everything stored per token included."""
        per_block = float((self.rates * band_sizes(self.basis_set.block)).sum())
        return per_block / (self.basis_set.block * elements_per_token(self.shape))

    @property
    def rounds(self) -> bool:
        """Whether codes are chosen by what each token will weigh; a profile without query statistics rounds to nearest."""
        if self.method.rounding == "nearest":
            return False
        return bool(self.query_statistics(0)) or not get_scorer(self.method.rounding).needs_queries

    def loss(self, layer_group: int) -> np.ndarray:
        """What losing a whole coefficient costs [G, R, F] float64, up to one factor."""
        return coefficient_loss(self.basis_set, layer_group)

    def gain(self, layer_group: int) -> np.ndarray:
        """Root of `loss` [G, R, F], relative to the largest of its component."""
        return rounding_gain(self.loss(layer_group))

    def decides(self) -> dict[str, Any]:
        return {name: getattr(self.basis_set, name) for name in ("mean", "weight", "basis", "variance")}


@dataclass
class Axes:
    """Keys and values of one layer's `heads` <-> latents, in `groups` that share a basis.

    mean, weight: [G, 1, Dg], the latter None for 1 everywhere; basis: [G, Dg, R].
    """

    xp: Any
    heads: int
    mean: Any
    basis: Any
    weight: Any

    def latents(self, keys, values):
        """Latents [B, G, T, R] of keys and values [B, H, T, D]."""
        xp, (groups, channels, _) = self.xp, self.basis.shape
        x = xp.concat([keys, values], axis=1)
        batch, _, tokens, dim = x.shape
        x = x.reshape(batch, groups, -1, tokens, dim)
        x = xp.permute_dims(x, (0, 1, 3, 2, 4)).reshape(batch, groups, tokens, channels)
        x = x - self.mean if self.weight is None else (x - self.mean) * self.weight
        return xp.matmul(x, self.basis)

    def vectors(self, z):
        """Keys and values [B, H, T, D] of latents [B, G, T, R]."""
        xp, (batch, groups, tokens, _) = self.xp, z.shape
        x = xp.matmul(z, xp.permute_dims(self.basis, (0, 2, 1)))
        x = x + self.mean if self.weight is None else x / self.weight + self.mean
        x = x.reshape(batch, groups, tokens, 2 * self.heads // groups, -1)
        x = xp.permute_dims(x, (0, 1, 3, 2, 4)).reshape(batch, 2 * self.heads, tokens, -1)
        return x[:, : self.heads], x[:, self.heads :]

    def arrays(self) -> list:
        return [x for x in (self.mean, self.basis, self.weight) if x is not None]


class TransformReader(Reader):
    """Coefficients -> keys and values of the layers that `axes` has, the heads of the first layer first.

    `time`: see `arrays.transform.time_matrix`. `rope`: None for a model without.
    """

    method: Method
    rope: Rope | None
    axes: list[Axes]
    time: Any

    @property
    def mean(self):
        """[G, 1, Dg] of a reader of one layer; basis [G, Dg, R] and weight, None or [G, 1, Dg], likewise."""
        (axes,) = self.axes
        return axes.mean

    @property
    def basis(self):
        (axes,) = self.axes
        return axes.basis

    @property
    def weight(self):
        (axes,) = self.axes
        return axes.weight

    def vectors(self, spectrum, start):
        """Keys and values [B, H, T, D] float32 of coefficients [B, G, block, R, T / block], which have their scale.

        Keys are rotated as the model had them, at `start` (see `Chunk`).
        """
        xp = self.xp
        z = to_time(xp, spectrum, self.time)  # [B, G, T, R]
        keys, values = join_layers(xp, [axes.vectors(z) for axes in self.axes])
        return (rotate(xp, keys, self.rope, start) if self.rope and self.method.rope == "pre" else keys), values


class TransformCodec(TransformReader, Codec):
    """Keys and values of a layer group <-> coefficients: basis across channels, transform over blocks of time.

    H counts the heads of all layers of the group, its first layer's first; `axes` has those of each layer.
    Components of which the plan stores no coefficient are never computed.
    """

    def __init__(self, xp, plan: TransformPlan, layer_group: int, like=None):
        basis_set, method = plan.basis_set, plan.method
        self.xp, self.method, self.block = xp, method, basis_set.block
        self.rope = plan.shape.rope
        self.layers = len(plan.layer_groups[layer_group])
        self.kv_heads, self.head_dim = plan.shape.kv_heads * self.layers, plan.shape.head_dim
        self.groups = basis_set.mean.shape[1]
        members = 2 * self.kv_heads // self.groups  # the first ones of a layer group that has fewer layers than others

        def table(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        kept = kept_components(plan.coded[layer_group])  # [G, R]
        self.rank = kept.shape[1]
        basis = np.take_along_axis(orthonormalize(basis_set.basis[layer_group]), kept[:, None], -1)  # [G, Dg, R]
        weight = np.repeat(basis_set.weight[layer_group, :, :members], self.head_dim, axis=-1)[:, None]  # [G, 1, Dg]
        mean = basis_set.mean[layer_group][:, None]
        channels = np.arange(members * self.head_dim)  # keys of all layers, then values
        if self.layers > 1:
            channels = channels.reshape(2, self.layers, -1).swapaxes(0, 1)
        self.axes = [
            Axes(
                xp,
                plan.shape.kv_heads,
                table(mean[..., own]),
                table(basis[:, own]),
                None if np.all(weight[..., own] == 1) else table(weight[..., own]),
            )
            for own in channels.reshape(self.layers, -1)
        ]
        self.time = table(time_matrix(basis_set.time, basis_set.block))

        self.normalize = table(1 / deviations(basis_set, layer_group, kept)[:, None])  # [G, 1, F, R]
        self.weigh = TokenWeights(xp, plan, layer_group, table) if plan.rounds else None
        self.gain = self.weigh and table(by_frequency(plan.gain(layer_group), kept, self.block)[:, None])

    def coefficients(self, keys, values, start):
        """Transform [B, H, T, D] keys and values (T a multiple of `block`) of tokens at `start` (see `Chunk`).

        Returns coefficients [B, G, T / block, block, R] in standard deviations, and what a token weighs in every group,
        [B, G, T / block, block], or None for plain rounding.
        """
        xp, pre = self.xp, self.method.rope == "pre"
        keys, values = xp.astype(keys, xp.float32), xp.astype(values, xp.float32)
        turned = unrotate(xp, keys, self.rope, start) if self.rope and (pre or self.weigh) else keys
        layers = split_layers(turned if pre else keys, values, self.layers)
        z = reduce(add, (axes.latents(*layer) for axes, layer in zip(self.axes, layers)))
        z = to_frequency(xp, z, self.time) * self.normalize
        if self.weigh is None:
            return z, None
        weights = self.weigh(turned, values)
        weights = xp.concat([weights, weights], axis=1).reshape(keys.shape[0], self.groups, -1, keys.shape[2])
        return z, xp.mean(weights, axis=2).reshape(*z.shape[:4])

    def tables(self) -> list:
        """Every array that all sequences share."""
        arrays = [self.time, self.normalize, *(x for axes in self.axes for x in axes.arrays())]
        if self.weigh is not None:
            arrays += [*self.weigh.tables, self.gain]
        return arrays


def kept_components(coded: np.ndarray) -> np.ndarray:
    """Components [G, R] with anything stored in `coded` [G, R, F], ascending; as many in every group, others fill up."""
    used = coded.any(-1)
    rank = max(int(used.sum(-1).max()), 1)
    return np.sort(np.argsort(~used, axis=-1, kind="stable")[:, :rank], axis=-1)


def by_frequency(x: np.ndarray, kept: np.ndarray, block: int) -> np.ndarray:
    """`x` [G, R, bands] of all components -> [G, block, R] of the components `kept` [G, R]."""
    return np.take_along_axis(x, kept[..., None], 1)[..., octave_bands(block)].transpose(0, 2, 1)


def deviations(basis_set: BasisSet, layer_group: int, kept: np.ndarray) -> np.ndarray:
    """Standard deviations [G, block, R] of the components `kept` [G, R]; 1 for a coefficient that never moved."""
    sigma = np.sqrt(by_frequency(basis_set.variance[layer_group], kept, basis_set.block))
    return np.where(sigma > 0, sigma, np.float32(1))

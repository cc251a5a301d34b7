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
from . import outliers
from .base import Codec, Reader
from .chunk import Adaptation, Chunk, check_finite, join_layers, next_start, split_by_chunk, split_layers

QUIET = 1 / 64  # least share of a group's variance that counts as expected loss


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

    def stored_rank(self, layer_group: int) -> tuple[int, int]:
        """Groups, and components of each with anything stored: (G, R)."""
        return kept_components(self.coded[layer_group]).shape

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
        return self.xp.matmul(self._centered(keys, values), self.basis)

    def _centered(self, keys, values):
        """[B, G, T, Dg] of keys and values [B, H, T, D]."""
        xp, (groups, channels, _) = self.xp, self.basis.shape
        x = xp.concat([keys, values], axis=1)
        batch, _, tokens, dim = x.shape
        x = x.reshape(batch, groups, -1, tokens, dim)
        x = xp.permute_dims(x, (0, 1, 3, 2, 4)).reshape(batch, groups, tokens, channels)
        return x - self.mean if self.weight is None else (x - self.mean) * self.weight

    def energy(self, keys, values):
        """Squared length [B, G, T] of keys and values [B, H, T, D] about their mean, weighted as latents are."""
        return self.xp.sum(self._centered(keys, values) ** 2, axis=-1)

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

    def vectors(self, spectrum, start, adaptation: Adaptation | None = None):
        """Keys and values [B, H, T, D] float32 of coefficients [B, G, block, R, T / block], which have their scale.

        Keys are rotated as the model had them, at `start` (see `Chunk`).
        """
        keys, values = self.unrotated(spectrum, adaptation)
        return (rotate(self.xp, keys, self.rope, start) if self.rope and self.method.rope == "pre" else keys), values

    def unrotated(self, spectrum, adaptation: Adaptation | None = None):
        """`vectors` with keys as the codec has them: before RoPE where it works there."""
        xp = self.xp
        if adaptation:
            spectrum = spectrum * xp.astype(adaptation.gain, xp.float32)[:, :, None, :, None]
        z = to_time(xp, spectrum, self.time)  # [B, G, T, R]
        keys, values = join_layers(xp, [axes.vectors(z) for axes in self.axes])
        if not adaptation:
            return keys, values
        key_offset, value_offset = self.offsets(adaptation)
        return keys + key_offset, values + value_offset

    def offsets(self, adaptation: Adaptation) -> tuple:
        """Offsets [B, H, 1, D] of the keys and values that this one decodes."""
        return adaptation.keys, adaptation.values


class TransformCodec(TransformReader, Codec):
    """Keys and values of a layer group <-> coefficients: basis across channels, transform over blocks of time.

    H counts the heads of all layers of the group, its first layer's first; `axes` has those of each layer.
    Components of which the plan stores no coefficient are never computed. grows: a chunk takes further blocks.
    """

    grows = True

    def __init__(self, xp, plan: TransformPlan, layer_group: int, like=None):
        basis_set, method = plan.basis_set, plan.method
        self.xp, self.method, self.block = xp, method, basis_set.block
        self.rope = plan.rope(layer_group)
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

        stored = by_frequency(plan.coded[layer_group], kept, self.block)  # [G, F, R]
        self.stored = table(stored[:, None], np.uint8)
        self.moving_counts = tuple(stored[:, 1:].sum((1, 2)).tolist())  # of a block, by group, without frequency 0
        variance = np.square(deviations(basis_set, layer_group, kept)) * stored
        sizes = band_sizes(basis_set.block)
        whole = (basis_set.variance[layer_group].astype(np.float64) * sizes).sum((-1, -2))
        self.expected_loss = table(np.maximum(whole - variance.sum((-1, -2), dtype=np.float64), QUIET * whole)[:, None])
        self.normalize = table(1 / deviations(basis_set, layer_group, kept)[:, None])  # [G, 1, F, R]
        self.weigh = TokenWeights(xp, plan, layer_group, table) if plan.rounds else None
        self.gain = self.weigh and table(by_frequency(plan.gain(layer_group), kept, self.block)[:, None])

    def coefficients(self, keys, values, start, adaptation: Adaptation | None = None):
        """Transform [B, H, T, D] keys and values (T a multiple of `block`) of tokens at `start` (see `Chunk`).

        Returns coefficients [B, G, T / block, block, R] in standard deviations, and what a token weighs in every group,
        [B, G, T / block, block], or None for plain rounding.
        """
        xp, pre = self.xp, self.method.rope == "pre"
        keys, values = xp.astype(keys, xp.float32), xp.astype(values, xp.float32)
        turned = unrotate(xp, keys, self.rope, start) if self.rope and (pre or self.weigh) else keys
        sides = (turned if pre else keys), values
        if adaptation:
            sides = sides[0] - adaptation.keys, sides[1] - adaptation.values
        layers = split_layers(*sides, self.layers)
        z = reduce(add, (axes.latents(*layer) for axes, layer in zip(self.axes, layers)))
        z = to_frequency(xp, z, self.time) * self.normalize
        if adaptation:
            z = z / xp.astype(adaptation.gain, xp.float32)[:, :, None, None]
        if self.weigh is None:
            return z, None
        weights = self.weigh(turned, values)
        weights = xp.concat([weights, weights], axis=1).reshape(keys.shape[0], self.groups, -1, keys.shape[2])
        return z, xp.mean(weights, axis=2).reshape(*z.shape[:4])

    def spectrum(self, chunk: Chunk):
        """Dequantized coefficients [B, G, block, R, n]."""
        raise NotImplementedError

    def code(self, chunk: Chunk | None, z, weights, position) -> Chunk:
        """`chunk`, or a new one at `position` (see `Chunk`), with the codes of these `coefficients` behind its own."""
        raise NotImplementedError

    @property
    def at_once(self) -> int:
        """Tokens whose coefficients are computed together; 0: those of one chunk."""
        return 0

    def extend(self, chunks: list[Chunk], keys, values, position, adapts: bool = False) -> list[Chunk]:
        chunks, tokens, start = list(chunks), keys.shape[2], 0
        while start < tokens:
            stop = min(start + (self.at_once or self.chunk_tokens - self._growing(chunks)), tokens)
            k, v = keys[:, :, start:stop], values[:, :, start:stop]
            here = position + start if isinstance(position, int) else self.xp.copy(position[:, :, start:stop])
            z, weights = self.coefficients(k, v, here)
            check_finite(self.xp, z)
            if adapts and isinstance(here, int):
                outliers.extend(self, chunks, k, v, here, z, weights)
            else:
                self.extend_plain(chunks, z, weights, here)
            start = stop
        return chunks

    def extend_plain(self, chunks: list[Chunk], z, weights, position) -> None:
        """Put codes of these `coefficients`, of tokens at `position`, behind `chunks`, in plain ones."""
        block, growing = self.block, self._growing(chunks)
        for start, stop in split_by_chunk(0, z.shape[2] * block, growing, self.chunk_tokens):
            last, part = (chunks.pop() if growing else None), slice(start // block, stop // block)
            growing = 0
            here = position + start if isinstance(position, int) else self.xp.copy(position[:, :, start:stop])
            weighed = None if weights is None else weights[:, :, part]
            chunks.append(self.code(last, z[:, :, part], weighed, here))

    def _growing(self, chunks: list[Chunk]) -> int:
        """Tokens of the last of `chunks` where it is plain and not full, else 0."""
        return chunks[-1].tokens % self.chunk_tokens if self.grows and chunks and chunks[-1].is_plain else 0

    def stored_counts(self) -> np.ndarray:
        """Coefficients of a block that are stored, [G, R]."""
        return self.xp.to_numpy(self.stored).sum((1, 2))

    def lost_energy(self, keys, values, start: int, squares):
        """Energy of blocks [B, G, n] in coefficients that are not stored, to what the profile expects there.

        `squares`: of those that are stored, in standard deviations. A floor of `QUIET` of the whole keeps it meaningful
        where all but nothing is expected.
        """
        xp = self.xp
        keys, values = self._unrotated_input(keys, values, start)
        layers = split_layers(keys, values, self.layers)
        whole = reduce(add, (axes.energy(*layer) for axes, layer in zip(self.axes, layers)))
        whole = xp.sum(whole.reshape(*whole.shape[:2], -1, self.block), axis=-1)
        kept = xp.sum(xp.sum(squares / (self.normalize * self.normalize), axis=-1), axis=-1)
        return (whole - kept) / self.expected_loss

    def centered(self, keys, values, start: int) -> Adaptation:
        """The means of T tokens as offsets, with a gain of 1."""
        xp, batch = self.xp, keys.shape[0]
        blank = xp.zeros((batch, self.groups, self.block, self.rank, 1), dtype=xp.float32, like=self.time)
        gain = xp.asarray(np.ones((batch, self.groups, self.rank), np.float16), like=self.time)
        (key_mean, value_mean), sides = self.unrotated(blank), self._unrotated_input(keys, values, start)
        keys, values = (xp.mean(x, axis=2, keepdims=True) for x in sides)
        return Adaptation(keys - key_mean[:, :, :1], values - value_mean[:, :, :1], gain)

    def mean_error(self, chunk: Chunk, keys, values, start: int, adaptation: Adaptation) -> tuple:
        """Means [B, H, 1, D] of what `keys` and `values` are above what the codes of `chunk` stand for."""
        decoded = self.unrotated(self.spectrum(chunk), adaptation)
        sides = zip(self._unrotated_input(keys, values, start), decoded)
        return tuple(self.xp.mean(x - y, axis=2, keepdims=True) for x, y in sides)

    def _unrotated_input(self, keys, values, start) -> tuple:
        """Keys and values float32, keys as the codec has them: before RoPE where it works there."""
        keys, values = (self.xp.astype(x, self.xp.float32) for x in (keys, values))
        if self.rope and self.method.rope == "pre":
            keys = unrotate(self.xp, keys, self.rope, start)
        return keys, values

    def encode(self, keys, values, start) -> Chunk:
        """A new chunk from T tokens at `start`, T a multiple of `block`; raises UsageError on NaN or infinity."""
        z, weights = self.coefficients(keys, values, start)
        check_finite(self.xp, z)
        return self.code(None, z, weights, start)

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own; `positions` [B, H, T] of a chunk that has those of all tokens."""
        start = next_start(chunk, positions)
        z, weights = self.coefficients(keys, values, start)
        check_finite(self.xp, z)
        return self.code(chunk, z, weights, start)

    def tables(self) -> list:
        """Every array that all sequences share."""
        arrays = [
            self.time,
            self.normalize,
            self.stored,
            self.expected_loss,
            *(x for axes in self.axes for x in axes.arrays()),
        ]
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

"""The spectral family: coefficients in a basis over channels and blocks of time, as packed codes of a table each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..arrays.transform import band_sizes
from ..planning.allocation import allocate_bits
from ..planning.budget import CHUNK_TOKENS, elements_per_token
from ..planning.loss import costs, distortions, expansion
from ..planning.methods import Method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.packing import UNIT, append_rows, interleave, pack_rows, unpack_rows
from ..quantization.quantizer import BIT_WIDTHS, CoefficientTables, dequantize, flat_levels, flat_tables
from ..quantization.time_rounding import round_in_time
from .chunk import TILE_CHUNKS, Chunk, check_finite, extended, kept_positions, next_start
from .spectral_reader import LayerView, SpectralReader
from .transform import TransformCodec, TransformPlan, by_frequency, deviations, kept_components

MIN_BITS, MAX_BITS = 0.25, 8.0
DEFAULT_BITS = 3.0
PADDING = 1 / 1024  # share of the budget kept for codes that do not fill a byte, so that `bits` stays a ceiling;
FULL_PADDING = 0.5  # below so many bits more, as the bytes that they waste stay the same
STAGING_BITS = 4.0  # of a prompt that is still coming in


@dataclass(frozen=True, eq=False)
class SpectralPlan(TransformPlan):
    """widths [L, G, R, F] uint8: bits of every coefficient."""

    widths: np.ndarray = None  # type: ignore[assignment]  # a field behind those with defaults

    ERROR_RATIOS: ClassVar[Mapping[int, float]] = {}  # of scalar quantizers to themselves

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return DEFAULT_BITS

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return MIN_BITS, MAX_BITS

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> SpectralPlan:
        """One Lagrangian over all coefficients of the model."""
        cls.check_bits(shape, method, bits)
        basis_set = cls.fitting_basis_set(profile, method)
        sizes = band_sizes(basis_set.block)
        padding = PADDING * max(1.0, FULL_PADDING / bits)
        budget = int(np.floor(bits * (1 - padding) * elements_per_token(shape) * basis_set.block))
        copies = np.broadcast_to(sizes, basis_set.variance.shape).reshape(-1)
        cost = costs(basis_set, cls.ERROR_RATIOS) * sizes[:, None]
        widths = allocate_bits(cost.reshape(len(copies), -1), copies, budget)
        return cls(method, bits, shape, profile, basis_set, widths.reshape(basis_set.variance.shape))

    @property
    def codec_class(self) -> type[SpectralCodec]:
        return SpectralCodec

    @property
    def coded(self) -> np.ndarray:
        return self.widths > 0

    @property
    def rates(self) -> np.ndarray:
        return self.widths.astype(np.float64)

    @cached_property
    def staging(self) -> Plan | None:
        """What holds a prompt until it ends: the same recipe at `STAGING_BITS`; None for a plan of as many bits.

        Later calls of a prompt attend to what earlier ones left; at few bits the error of every call would build up
        through the layers (docs/decisions/rate-distortion-2.md, section 4).
        """
        if self.profile is None or self.bits >= STAGING_BITS:
            return None
        plain = replace(self.method, rounding="nearest", quantizer="scalar")
        return SpectralPlan.make(self.shape, self.profile, plain, STAGING_BITS)

    @cached_property
    def levels(self) -> dict[int, np.ndarray]:
        """What codes are decoded to by width, in standard deviations: `nearest_levels`, expanded (`loss.expansion`)."""
        factors = expansion(np.array(distortions(self.basis_set.levels, self.ERROR_RATIOS)))
        return {b: (self.nearest_levels[b] * e).astype(np.float32) for b, e in zip(BIT_WIDTHS, factors) if b}

    @property
    def nearest_levels(self) -> dict[int, np.ndarray]:
        """What codes stand for when they are chosen, by width: the profile's levels."""
        return self.basis_set.levels

    def shared_tables(self, xp, like=None) -> tuple:
        """`quantizer.flat_tables` as arrays of `xp` on the device of `like`."""
        make = lambda: tuple(xp.asarray(table, like=like) for table in self._flat_tables)  # noqa: E731
        return self.made.once("quantizers", xp, like, make)

    @cached_property
    def search_tables(self) -> tuple[np.ndarray, ...]:
        """`quantizer.flat_tables`, and the levels that a trellis search takes codes for, laid out in the same way."""
        return *self._flat_tables, flat_levels(self.nearest_levels)

    @cached_property
    def _flat_tables(self) -> tuple[np.ndarray, np.ndarray]:
        return flat_tables(self.basis_set.levels, self.levels)

    @cached_property
    def coefficients_by_width(self) -> list[dict[int, int]]:
        """Of every layer group, how many coefficients of a block have each width that it stores."""
        sizes = band_sizes(self.basis_set.block)
        return [{int(b): int(((widths == b) * sizes).sum()) for b in np.unique(widths) if b} for widths in self.widths]

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        arrays: list[tuple] = []
        units, rest = divmod(tokens // self.method.block, UNIT)
        for bits, count in self.coefficients_by_width[layer_group].items():
            arrays += [((batch, count, units, bits), "uint8"), ((batch, -(-count * rest // UNIT), bits), "uint8")]
        return arrays

    def decides(self) -> dict[str, Any]:
        arrays = super().decides() | {"widths": self.widths}
        arrays |= {f"nearest_levels/{b}": x for b, x in self.basis_set.levels.items()}
        return arrays | {f"levels/{b}": x for b, x in self.levels.items()}

    def planned_loss(self) -> np.ndarray:
        """What the codes cost by the plan's own reckoning, [L, G] float64 per block, up to one factor."""
        cost = costs(self.basis_set, self.ERROR_RATIOS) * band_sizes(self.basis_set.block)[:, None]
        places = np.searchsorted(BIT_WIDTHS, self.widths)[..., None]
        return np.take_along_axis(cost, places, -1)[..., 0].sum((-1, -2))


class SpectralCodec(SpectralReader, TransformCodec):
    """Coefficients as packed codes: one table entry per coefficient.

    Coefficients with 0 bits are not stored. The others (group, frequency, component) are sorted by width, and
    the codes of each are packed along time. A chunk holds, width by width, whole units [B, n, units, bits] of the n
    coefficients and then the codes that wait for their unit to fill (`pack_rows`).
    """

    def __init__(self, xp, plan: SpectralPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)

        def table(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        kept = kept_components(plan.coded[layer_group])
        widths, sigma = (
            by_frequency(plan.widths[layer_group], kept, self.block),
            deviations(plan.basis_set, layer_group, kept),
        )
        self.quantizers = CoefficientTables(xp, plan.shared_tables(xp, like), widths[:, None])
        widths, sigma = widths.reshape(-1), sigma.reshape(-1)  # in the order (group, frequency, component)
        self.bits = [int(b) for b in np.unique(widths) if b]
        numbers = [np.flatnonzero(widths == b) for b in self.bits]
        order = np.full(len(widths), sum(map(len, numbers)), np.int32)  # dropped ones read the zero at the end
        if numbers:
            order[np.concatenate(numbers)] = np.arange(len(order[widths > 0]))
        self.order = table(order, np.int32)
        self.numbers = [table(chosen, np.int32) for chosen in numbers]
        self.scale = [table(sigma[chosen][:, None]) for chosen in numbers]
        self.levels = [table(plan.levels[b]) for b in self.bits]

    @cached_property
    def packer(self):
        """What the array library has to pack the codes of all widths at once, or None."""
        return self.xp.kernels and self.xp.kernels.packer(self)

    @cached_property
    def of_layers(self) -> Sequence[SpectralReader]:
        return [self] if self.layers == 1 else [LayerView(self, number) for number in range(self.layers)]

    def choose(self, keys, values, start):
        """Codes uint8 [B, G, T / block, block, R] of T tokens at `start`, T a multiple of `block`.

        Raises ValueError on NaN or infinity.
        """
        z, weights = self.coefficients(keys, values, start)
        check_finite(self.xp, z)
        return self.quantize(z, weights)

    def quantize(self, z, weights=None):
        """Coefficients [B, G, n, block, R] -> codes uint8 of the same shape."""
        if weights is None:
            return self.quantizers.quantize(z)
        return round_in_time(self.xp, z, weights, self.gain, self.time, self.quantizers)

    def pack(self, codes, chunk: Chunk | None = None) -> tuple:
        """Arrays of a chunk with `codes` [B, G, n, block, R], behind those of `chunk` where one is given."""
        xp, (batch, _, n, _, _) = self.xp, codes.shape
        codes = xp.permute_dims(codes, (0, 1, 3, 4, 2)).reshape(batch, -1, n)
        by_width = [xp.take(codes, chosen, axis=1) for chosen in self.numbers]
        if chunk is None:
            return interleave([pack_rows(xp, x, b) for x, b in zip(by_width, self.bits)])
        held = chunk.tokens // self.block
        held_and_new = zip(_pairs(chunk.arrays), by_width, self.bits)
        return interleave([append_rows(xp, old, held, new, b) for old, new, b in held_and_new])

    def seal(self, chunk: Chunk | None, codes, position) -> Chunk:
        """`chunk` with `codes` [B, G, n, block, R] behind its own, or a new one; `position`: where these tokens stand.

        position: a number, or int32 [B, H, T] of a chunk that has those of all tokens.
        """
        tokens, arrays = codes.shape[2] * self.block, (self.packer or self.pack)(codes, chunk)
        if chunk is None:
            return Chunk(codes.shape[0], position, tokens, arrays)
        return extended(self.xp, chunk, tokens, arrays, None if isinstance(position, int) else position)

    def encode(self, keys, values, start) -> Chunk:
        """A new chunk from T tokens at `start`, T a multiple of `block`; raises ValueError on NaN or infinity."""
        return self.seal(None, self.choose(keys, values, start), start)

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own; `positions` [B, H, T] of a chunk that has those of all tokens."""
        start = next_start(chunk, positions)
        return self.seal(chunk, self.choose(keys, values, start), start)

    @property
    def at_once(self) -> int:
        """Tokens whose codes are chosen together; 0: those of one chunk."""
        return TILE_CHUNKS * CHUNK_TOKENS if self.packer else 0

    def keep(self, chunks: list[Chunk], blocks, size: int) -> list[Chunk]:
        """`chunks` of `size` tokens with the blocks `blocks` of all of them, int32 [B, H, m] ascending; codes are copied.

        One head stands for all where the plan codes heads together.
        """
        xp, arrays = self.xp, []
        for i, (bits, numbers) in enumerate(zip(self.bits, self.numbers)):
            heads = xp.to_numpy(numbers) // (self.block * self.rank) % blocks.shape[1]
            codes = [
                unpack_rows(xp, chunk.arrays[2 * i : 2 * i + 2], bits, chunk.tokens // self.block) for chunk in chunks
            ]
            index = xp.take(blocks, xp.asarray(heads.astype(np.int32), like=blocks), axis=1)
            arrays.append(xp.take_along_axis(xp.concat(codes, axis=2), index, axis=2))
        starts = kept_positions(xp, chunks, blocks, self.block)
        step, total = size // self.block, blocks.shape[2]
        return [
            Chunk(
                blocks.shape[0],
                xp.copy(starts[:, :, i * self.block : (i + step) * self.block]),
                (min(i + step, total) - i) * self.block,
                interleave([pack_rows(xp, c[:, :, i : i + step], b) for c, b in zip(arrays, self.bits)]),
            )
            for i in range(0, total, step)
        ]

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`, a multiple of `block`; codes are copied, not decoded."""
        xp, n = self.xp, chunk.tokens // self.block
        codes = [unpack_rows(xp, packed, b, n) for packed, b in zip(_pairs(chunk.arrays), self.bits)]
        packed = [pack_rows(xp, c[:, :, : tokens // self.block], b) for c, b in zip(codes, self.bits)]
        return replace(chunk, tokens=tokens, arrays=interleave(packed))

    def spectrum(self, chunk: Chunk):
        """Dequantized coefficients [B, G, block, R, n]."""
        xp, n = self.xp, chunk.tokens // self.block
        codes = [unpack_rows(xp, packed, b, n) for packed, b in zip(_pairs(chunk.arrays), self.bits)]
        parts = self._dequantized(codes)
        parts.append(xp.zeros((chunk.batch, 1, n), dtype=xp.float32, like=self.time))
        y = xp.take(xp.concat(parts, axis=1), self.order, axis=1)
        return y.reshape(chunk.batch, self.groups, self.block, self.rank, n)

    def _dequantized(self, codes: list) -> list:
        """Coefficients [B, n, blocks] of codes, width by width."""
        return [dequantize(self.xp, *of_width) * scale for *of_width, scale in zip(codes, self.levels, self.scale)]

    def tables(self) -> list:
        own = [self.order, *self.numbers, *self.scale, *self.levels, *self.quantizers.arrays()]
        packer = self.packer.tables() if self.packer else []
        views = [x for view in self.of_layers if view is not self for x in view.tables()]
        return super().tables() + own + packer + views


def _pairs(arrays: tuple) -> list[tuple]:
    return list(zip(arrays[0::2], arrays[1::2]))

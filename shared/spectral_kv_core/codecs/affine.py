"""Grouped affine quantization per token, in the layout of mlx-lm's quantized cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError
from ..planning.methods import Method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.packing import UNIT, pack, unpack
from ..quantization.quantizer import AFFINE_WIDTHS, dequantize_affine, quantize_affine
from .base import Codec, highest_within
from .chunk import Chunk, check_finite, extended, kept_positions, next_start


@dataclass(frozen=True, eq=False)
class AffinePlan(Plan):
    """code_bits: width of every code; a group has a scale and a bias of 16 bits each."""

    code_bits: int = 0

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 4 + 32 / method.group_size

    @classmethod
    def bits_options(cls, shape: ModelShape, method: Method) -> tuple[float, ...]:
        return tuple(b + 32 / method.group_size for b in AFFINE_WIDTHS)

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        options = cls.bits_options(shape, method)
        return options[0], options[-1]

    @classmethod
    def flat_bits(cls, method: Method, width: float) -> float:
        return width + 32 / method.group_size

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> AffinePlan:
        if shape.head_dim % method.group_size:
            raise UsageError(
                f"Expected a head_dim that is a multiple of the group of {method.group_size} channels, received head_dim "
                f'{shape.head_dim}. Use method="spectral", which has no groups.'
            )
        options = list(zip(cls.bits_options(shape, method), AFFINE_WIDTHS))
        return cls(method, bits, shape, profile, highest_within(method, options, bits))

    @property
    def codec_class(self) -> type[AffineCodec]:
        return AffineCodec

    @property
    def bits_per_element(self) -> float:
        return self.code_bits + 32 / self.method.group_size

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        lead = batch, self.shape.kv_heads, tokens
        scales = ((*lead, self.shape.head_dim // self.method.group_size), "float16")
        return 2 * [((*lead, -(-self.shape.head_dim // UNIT), self.code_bits), "uint8"), scales, scales]

    def decides(self) -> dict[str, Any]:
        return {"code_bits": self.code_bits}


class AffineCodec(Codec):
    """Grouped affine quantization per token: codes [B, H, T, D / 8, bits], scale and bias [B, H, T, D / group]."""

    block = 1

    def __init__(self, xp, plan: AffinePlan, layer_group: int, like=None):
        self.xp, self.bits, self.group_size = xp, plan.code_bits, plan.method.group_size

    def encode(self, keys, values, start) -> Chunk:
        """A new chunk from T tokens at `start`; raises UsageError on NaN or infinity."""
        xp, arrays = self.xp, []
        for x in (keys, values):
            codes, scale, bias = quantize_affine(xp, x, self.bits, self.group_size)
            check_finite(xp, xp.concat([scale, bias], axis=-1))  # NaN, infinity, and what float16 cannot hold
            arrays += [pack(xp, codes, self.bits), scale, bias]
        return Chunk(keys.shape[0], start, keys.shape[2], tuple(arrays))

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own; `positions` [B, H, T] of a chunk that has those of all tokens."""
        new = self.encode(keys, values, next_start(chunk, positions))
        arrays = tuple(self.xp.concat([a, b], axis=2) for a, b in zip(chunk.arrays, new.arrays))
        return extended(self.xp, chunk, new.tokens, arrays, positions)

    def keep(self, chunks: list[Chunk], blocks, size: int) -> list[Chunk]:
        """`chunks` of `size` tokens with the tokens `blocks` of all of them, int32 [B, H, m] ascending; nothing is decoded."""
        xp, total = self.xp, blocks.shape[2]
        arrays = []
        for parts in zip(*(chunk.arrays for chunk in chunks)):
            index = blocks.reshape(*blocks.shape, *(1,) * (len(parts[0].shape) - 3))
            arrays.append(xp.take_along_axis(xp.concat(list(parts), axis=2), index, axis=2))
        starts = kept_positions(xp, chunks, blocks, 1)
        return [
            Chunk(
                blocks.shape[0],
                xp.copy(starts[:, :, i : i + size]),
                min(size, total - i),
                tuple(xp.copy(a[:, :, i : i + size]) for a in arrays),
            )
            for i in range(0, total, size)
        ]

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`."""
        return replace(chunk, tokens=tokens, arrays=tuple(self.xp.copy(a[:, :, :tokens]) for a in chunk.arrays))

    def decode(self, chunk: Chunk):
        """Keys and values [B, H, T, D] float32 of a chunk."""
        xp, sides = self.xp, []
        for packed, scale, bias in (chunk.arrays[:3], chunk.arrays[3:]):
            codes = unpack(xp, packed, self.bits, scale.shape[-1] * self.group_size)
            sides.append(dequantize_affine(xp, codes, scale, bias))
        return tuple(sides)

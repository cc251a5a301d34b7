"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys per channel, values per token, asymmetric groups of 32.

Section 3.3 and algorithm 1. Departures: the exact residual is the cache's window, where the paper keeps 128 tokens, and
values are sealed together with keys, 32 tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..planning.methods import Method
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.packing import UNIT, pack, unpack
from ..quantization.quantizer import AFFINE_WIDTHS, dequantize_affine, quantize_affine
from .base import ArrayCodec, ArrayPlan, highest_within


class KiviCodec(ArrayCodec):
    """Codes, scale and bias of keys, then of values; shapes: `KiviPlan.chunk_arrays`."""

    def __init__(self, xp, plan: KiviPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self.bits, self.group_size, self.block = plan.code_bits, plan.method.group_size, plan.method.block

    def store(self, keys, values, start: int) -> tuple:
        xp, (batch, heads, tokens, dim) = self.xp, keys.shape
        keys = keys.reshape(batch, heads, tokens // self.block, self.block, dim)
        keys = xp.permute_dims(keys, (0, 1, 2, 4, 3))  # [B, H, T / 32, D, 32]
        arrays = []
        for x, group_size in ((keys, self.block), (values, self.group_size)):
            codes, scale, bias = quantize_affine(xp, x, self.bits, group_size)
            arrays += [pack(xp, codes, self.bits), scale, bias]
        return tuple(arrays)

    def decode(self, chunk) -> tuple:
        xp, sides = self.xp, []
        for (packed, scale, bias), n in ((chunk.arrays[:3], self.block), (chunk.arrays[3:], self.head_dim)):
            sides.append(dequantize_affine(xp, unpack(xp, packed, self.bits, n), scale, bias))
        keys = xp.permute_dims(sides[0], (0, 1, 2, 4, 3))
        return keys.reshape(chunk.batch, self.kv_heads, chunk.tokens, self.head_dim), sides[1]


@dataclass(frozen=True, eq=False)
class KiviPlan(ArrayPlan):
    """code_bits: width of every code; scale and bias of a group are float16, so that b bits take b + 32 / 32."""

    code_bits: int = 0
    CODEC = KiviCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return cls._options(method)[0][0]

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        options = cls._options(method)
        return options[0][0], options[-1][0]

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> KiviPlan:
        if shape.head_dim % method.group_size:
            raise UsageError(
                f"Expected a head_dim that is a multiple of the group of {method.group_size} channels, received head_dim "
                f"{shape.head_dim}. Use turboquant, which has no groups."
            )
        return cls(method, bits, shape, code_bits=highest_within(method, cls._options(method), bits))

    @staticmethod
    def _options(method: Method) -> list[tuple[float, int]]:
        return [(b + 16 / method.block + 16 / method.group_size, b) for b in AFFINE_WIDTHS]

    def decides(self) -> dict:
        return {"code_bits": self.code_bits}

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        dim, block, group = self.shape.head_dim, self.method.block, self.method.group_size
        lead = batch, self.shape.kv_heads
        by_channel, by_token = (*lead, tokens // block, dim, 1), (*lead, tokens, dim // group)
        return [
            ((*lead, tokens // block, dim, -(-block // UNIT), self.code_bits), "uint8"),
            *2 * [(by_channel, "float16")],
            ((*lead, tokens, -(-dim // UNIT), self.code_bits), "uint8"),
            *2 * [(by_token, "float16")],
        ]

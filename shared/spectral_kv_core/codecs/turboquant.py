"""TurboQuant (Zandieh et al. 2025, arXiv 2504.19874): random rotation, then one Gaussian codebook for all coordinates.

`turboquant` is Q_mse (algorithm 1) for keys and values, its norm corrected so that the decoded vector is as long as the
original, as in vLLM's `_nc` presets. `turboquant-qjl` is Q_prod (algorithm 2) for keys, whose inner products it leaves
unbiased, and Q_mse for values. Departures: the rotation is random signs and a Hadamard matrix, the sketch S of the residual
such a rotation with other signs in place of a Gaussian matrix, which lowers its variance; no channels with more bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..arrays.hadamard import random_rotation
from ..planning.methods import Method
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.quantizer import BIT_WIDTHS, CoefficientTables, flat_tables, gaussian_tables
from .base import ArrayPlan, LatentCodec, highest_within, pack_tokens, unpack_tokens


class TurboQuantCodec(LatentCodec):
    """Per side: codes [B, H, T / 8, D, bits] and norms [B, H, T] float16; shapes: `TurboQuantPlan.chunk_arrays`.

    A sketched side has the signs of its residual, [B, H, T / 8, D, 1], between them, and the residual's norms behind.
    """

    def __init__(self, xp, plan: TurboQuantPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self.set_bases(2 * [random_rotation(self.head_dim)[None]])
        self.sketch = self.table(random_rotation(self.head_dim, "sketch")) if plan.sketched else None
        self.bits = plan.side_bits
        flat = tuple(self.table(x, x.dtype) for x in _flat_tables())
        self.quantizers = [CoefficientTables(xp, flat, np.array([bits])) for bits in self.bits]
        self._tables += [q.slots for q in self.quantizers]

    def store(self, keys, values, start: int) -> tuple:
        xp, arrays = self.xp, []
        for side, y in enumerate(self.project(keys, values)):
            norm = xp.sqrt(xp.sum(xp.square(y), axis=-1, keepdims=True))
            z = y / xp.maximum(norm, 1e-30) * self.head_dim**0.5  # the floor guards a vector of zeros
            codes = self.quantizers[side].quantize(z)
            near = self.quantizers[side].dequantize(codes)
            if self.bits[side]:
                arrays.append(pack_tokens(xp, codes, self.bits[side]))
            if self._sketched(side):
                left = (z - near) * (norm * self.head_dim**-0.5)
                signs = xp.astype(xp.matmul(left, self.sketch) >= 0, xp.uint8)
                size = xp.sqrt(xp.sum(xp.square(left), axis=-1))
                arrays += [pack_tokens(xp, signs, 1), xp.astype(norm[..., 0], xp.float16), xp.astype(size, xp.float16)]
            else:
                norm = norm * self.head_dim**0.5 / xp.sqrt(xp.sum(xp.square(near), axis=-1, keepdims=True))
                arrays.append(xp.astype(norm[..., 0], xp.float16))
        return tuple(arrays)

    def latents(self, chunk) -> tuple:
        xp, arrays, sides = self.xp, iter(chunk.arrays), []
        for side, bits in enumerate(self.bits):
            near = self.quantizers[side].dequantize(unpack_tokens(xp, next(arrays), bits)) if bits else None
            signs = unpack_tokens(xp, next(arrays), 1) if self._sketched(side) else None
            norm = xp.astype(next(arrays), xp.float32)[..., None] * self.head_dim**-0.5
            y = None if near is None else near * norm
            if signs is not None:  # <q, e> ~ |e| sqrt(pi / 2) / sqrt(D) <S q, sign(S e)>
                size = xp.astype(next(arrays), xp.float32)[..., None] * (np.pi / 2 / self.head_dim) ** 0.5
                signs = xp.astype(signs, xp.float32) * 2 - 1
                back = xp.matmul(signs, xp.permute_dims(self.sketch, (1, 0))) * size
                y = back if y is None else y + back
            sides.append(y)
        return tuple(sides)

    def _sketched(self, side: int) -> bool:
        return side == 0 and self.sketch is not None


@lru_cache(maxsize=1)
def _flat_tables() -> tuple[np.ndarray, np.ndarray]:
    levels = gaussian_tables()
    return flat_tables(levels, levels)


@dataclass(frozen=True, eq=False)
class TurboQuantPlan(ArrayPlan):
    """code_bits: bits per coordinate, of which a sketch has one; a norm of 16 bits goes with every vector."""

    code_bits: int = 0
    CODEC = TurboQuantCodec

    @property
    def sketched(self) -> bool:
        """Whether keys have a sketch of their residual."""
        return self.method.codec == "turboquant-qjl"

    @property
    def side_bits(self) -> tuple[int, int]:
        """Widths of the codes of keys and of values."""
        return self.code_bits - self.sketched, self.code_bits

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return {b: cost for cost, b in cls._options(shape, method)}[4]

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        options = cls._options(shape, method)
        return options[0][0], options[-1][0]

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> TurboQuantPlan:
        return cls(method, bits, shape, code_bits=highest_within(method, cls._options(shape, method), bits))

    @staticmethod
    def _options(shape: ModelShape, method: Method) -> list[tuple[float, int]]:
        sketched = method.codec == "turboquant-qjl"
        widths = [b for b in BIT_WIDTHS if b and b - sketched in BIT_WIDTHS]
        return [(b + (24 if sketched else 16) / shape.head_dim, b) for b in widths]

    def decides(self) -> dict:
        return {"code_bits": self.code_bits}

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        lead = batch, self.shape.kv_heads
        arrays: list[tuple] = []
        for side, bits in enumerate(self.side_bits):
            sketched = self.sketched and side == 0
            widths = [bits] * (bits > 0) + [1] * sketched
            arrays += [((*lead, tokens // 8, self.shape.head_dim, b), "uint8") for b in widths]
            arrays += (1 + sketched) * [((*lead, tokens), "float16")]
        return arrays

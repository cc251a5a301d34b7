"""A codec that loses nothing: with it a survey sees whether a model attends to sealed tokens as to its own cache's."""

from __future__ import annotations

from dataclasses import dataclass

from ..planning.methods import Method
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from .base import ArrayCodec, ArrayPlan
from .chunk import Chunk

BITS = 32.0
METHOD = Method("exact", "none", "sealed tokens as they are, for a survey of a model", "reference")


class ExactCodec(ArrayCodec):
    """Arrays are the keys and values themselves."""

    block = 1

    def store(self, keys, values, start: int) -> tuple:
        return keys, values

    def decode(self, chunk: Chunk) -> tuple:
        """Keys and values [B, H, T, D] float32 of a chunk."""
        keys, values = chunk.arrays
        return keys, values


@dataclass(frozen=True, eq=False)
class ExactPlan(ArrayPlan):
    """A plan that seals tokens and rounds nothing."""

    CODEC = ExactCodec

    @classmethod
    def of(cls, shape: ModelShape) -> ExactPlan:
        """The plan for a model of `shape`."""
        return cls.make(shape, None, METHOD, BITS)

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return BITS

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return BITS, BITS

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> ExactPlan:
        return cls(method, bits, shape)

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        return 2 * [((batch, self.shape.kv_heads, tokens, self.shape.head_dim), "float32")]

"""No codec: every token stays as the host has it. Methods that only drop tokens are of this family."""

from __future__ import annotations

from dataclasses import dataclass

from ..planning.methods import Method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile

PLAIN_BITS = 16.0


@dataclass(frozen=True, eq=False)
class PlainPlan(Plan):
    """Nothing is compressed."""

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return PLAIN_BITS

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return PLAIN_BITS, PLAIN_BITS

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> PlainPlan:
        cls.check_bits(shape, method, bits)
        return cls(method, bits, shape, profile)

    @property
    def bits_per_element(self) -> float:
        return PLAIN_BITS

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        """None: no token is ever sealed."""
        return []

"""`Kernels`: what an array library may have in `xp.kernels`, faster than by the operations of `ops`.

NumPy has no kernels: its `xp.kernels` is None. A backend's module `kernels` has every name of the protocol. A function that
returns None leaves the case at hand to the core's own operations. A parity test compares each with these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from .rope import Rope

Array = Any  # of the array library at hand


class Step(Protocol):
    """A decode step made for one codec."""

    def __call__(self, chunks: Sequence, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        """Attention [B, Hq, L, D] of `queries` over sealed `chunks` and exact `keys`, `values` [B, H, N, D].

        As `attention.decode_step`: the last L of the exact tokens are those of the queries, seen causally.
        """

    def tables(self) -> list[Array]:
        """Every array that it made of the codec's tables, and that all sequences share."""


class Decoder(Protocol):
    """What decodes several chunks of one codec at a time."""

    def __call__(self, chunks: Sequence, dtype: Any) -> Iterator[tuple[Array, Array]]:
        """Keys and values [B, H, T, D] in `dtype` of as many `chunks` at a time as it takes; keys as the model had them."""

    def tables(self) -> list[Array]:
        """As `Step.tables`."""


class Packer(Protocol):
    """What packs the codes of all widths of one codec at once."""

    def __call__(self, codes: Array, chunk: Any = None) -> tuple[Array, ...]:
        """Arrays of a chunk with `codes` uint8 [B, G, n, block, R], behind those of `chunk` where one is given."""

    def tables(self) -> list[Array]:
        """As `Step.tables`."""


class Kernels(Protocol):
    """The module `kernels` of a backend."""

    def rotate(self, x: Array, rope: Rope, start: Any, inverse: bool = False) -> Array | None:
        """`rope.rotate`: `x` [B, H, T, D], float32 result; None where the core's way is as good."""

    def round_in_time(self, z: Array, weights: Array, gain: Array, matrix: Array, tables: Any) -> Array | None:
        """`time_rounding.round_in_time`: codes uint8 [B, G, n, F, R]; None for the core's descent."""

    def decoder(self, codec: Any) -> Decoder | None:
        """What decodes chunks of `codec` together; None decodes them one by one."""

    def packer(self, codec: Any) -> Packer | None:
        """What packs codes of `codec`; None packs width by width."""

    def decode_step(self, codec: Any) -> Step | None:
        """The faster decode step for `codec`; None for `attention.decode_step`."""

    def supports_partial_attention(self, queries: Array) -> bool:
        """Whether `partial_attention` takes queries of this device, dtype and head_dim."""

    def partial_attention(
        self, queries: Array, keys: Array, values: Array, scale: float, causal: bool = False
    ) -> tuple[Array, Array, Array]:
        """Partial softmax (o, m, l) of `queries` [B, Hq, L, D] over `keys`, `values` [B, H, T, D] of their dtype.

        o [B, H, M, D], m and l [B, H, M, 1] float32, for the M query rows of a KV head. causal: the keys are those of
        the same L tokens.
        """

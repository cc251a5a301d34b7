"""Bytes that a plan stores of sealed tokens, and those of the tables that it makes, without a token or a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from ..cache.held_arrays import numpy_buffers
from ..codecs.spectral import STAGING_BITS
from ..hosts.protocol import Host
from ..planning.budget import CHUNK_TOKENS, SEAL
from ..planning.plan import Plan


def table_nbytes(host: Host, plan: Plan) -> tuple[int, int]:
    """Bytes of the tables of all layer groups of `plan`, and of those that groups share.

    On MLX a decode step adds a sixth or so when it first meets a length: not counted, where torch makes all at once.
    """
    device = host.device(None)
    own = 0
    codecs: list = []
    shared: dict[int, Any] = {}
    before: dict[int, Any] = {}

    def nbytes(x) -> int:
        return sum(host.buffers([x]).values())

    for layer_group in range(len(plan.layer_groups)):
        codec = plan.make_codec(host.xp, layer_group, device)
        codecs.append(codec)
        tables = {id(x): x for x in codec.tables()}
        quantizers = {id(x) for x in plan.shared_tables(host.xp, device)}
        shared |= {key: x for key, x in tables.items() if key in quantizers or key in before}
        own += sum(nbytes(x) for key, x in tables.items() if key not in shared)
        before = tables
    in_numpy = [numpy_buffers(codec) for codec in codecs]
    common = set.intersection(*map(set, in_numpy)) if len(codecs) > 1 else set()
    own += sum(size for buffers in in_numpy for key, size in buffers.items() if key not in common)
    return own, sum(nbytes(x) for x in shared.values()) + sum(in_numpy[0][key] for key in common)


class Stored:
    """What a plan stores of sealed tokens, in all layers; `tables` gives the bytes that all sequences share.

    layers: as many layers as the plan has layer groups, or how many layers one typical group stands for.
    """

    def __init__(self, plan: Plan, tables: Callable[[Plan], tuple[int, int]], layers: int | None = None):
        self.plan, self._tables = plan, tables
        self.copies = 1 if layers is None else layers
        self.bits_per_element = plan.bits_per_element
        self.seal = max(SEAL, plan.method.block)

    @cached_property
    def table_bytes(self) -> int:
        own, shared = self._tables(self.plan)
        return own * self.copies + shared

    @cached_property
    def staging(self) -> Stored | None:
        """What holds a prompt that comes in several calls until it ends."""
        plan = self.plan.staging
        return None if plan is None else Stored(plan, self._tables, None if self.copies == 1 else self.copies)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the codes of `tokens` sealed tokens, to the byte: chunks are padded one by one."""
        whole, rest = divmod(tokens, CHUNK_TOKENS)
        return self.copies * (whole * self._chunk(CHUNK_TOKENS) + self._chunk(rest))

    def _chunk(self, tokens: int) -> int:
        groups = range(len(self.plan.layer_groups)) if tokens else ()
        arrays = [array for layer_group in groups for array in self.plan.chunk_arrays(layer_group, 1, tokens)]
        return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in arrays)


class Ceiling:
    """As `Stored` for any number of bits, from the ceiling that they are; tables are those of a plan that is known."""

    def __init__(self, bits: float, elements: int, table_bytes: int, staged: bool, seal: int = SEAL):
        self.bits_per_element, self.elements, self.table_bytes, self.seal = bits, elements, table_bytes, seal
        self.staging = Ceiling(STAGING_BITS, elements, table_bytes, False) if staged and bits < STAGING_BITS else None

    def nbytes(self, tokens: int) -> int:
        return int(np.ceil(tokens * self.elements * self.bits_per_element / 8))

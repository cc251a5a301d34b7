"""What a codec is, and what the published methods share: plans that count arrays, and chunks that grow along time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..arrays import attention
from ..arrays.basis import rank_for_energy
from ..errors import UsageError
from ..planning.budget import CHUNK_TOKENS
from ..planning.methods import Method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.packing import UNIT, pack, unpack
from .chunk import Chunk, CutChunk, check_finite, split_by_chunk


class Reader(Protocol):
    """Chunks -> keys and values [B, H, T, D] of the H heads of some layers, and attention to them.

    decoder: decodes several chunks at a time where the array library has a way, else None.
    """

    xp: Any

    @property
    def decoder(self) -> Callable | None:
        return None

    def decode(self, chunk: Chunk) -> tuple:
        """Keys and values [B, H, T, D] float32 of a chunk; keys are rotated as the model had them."""
        ...

    def attend(self, chunk: Chunk, queries, scale: float) -> tuple:
        """Partial softmax (o, m, l) of grouped `queries` [B, H, M, D] float32 over a chunk, decoded for this call only."""
        keys, values = self.decode(chunk)
        return attention.dense_partial(self.xp, queries, keys, values, scale)

    def decode_step(self, chunks, queries, keys, values, scale: float):
        """`attention.decode_step`."""
        return attention.decode_step(self.xp, self, chunks, queries, keys, values, scale)

    def tables(self) -> list:
        """Every array that all sequences share."""
        return []


class Codec(Reader, Protocol):
    """Keys and values [B, H, T, D] of sealed tokens <-> chunks, for a layer group; H counts the heads of its layers.

    block: tokens that are coded together. layers: how many layers the group has. chunk_tokens: of a full chunk.
    """

    block: int = UNIT
    layers: int = 1
    chunk_tokens: int = CHUNK_TOKENS

    @property
    def of_layers(self) -> Sequence[Reader]:
        """For every layer of the group what decodes and attends to that layer's heads alone."""
        return [self]

    def reader(self, layer: int | None) -> Reader:
        """What decodes chunks and attends to them for layer number `layer` of the group, or for all layers (None)."""
        return self if layer is None or self.layers == 1 else self.of_layers[layer]

    def encode(self, keys, values, start) -> Chunk:
        """A new chunk from T tokens at `start` (see `Chunk`), T a multiple of `block`; raises UsageError on NaN, infinity."""
        ...

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own; `positions` [B, H, T] of a chunk that has those of all tokens."""
        ...

    def extend(self, chunks: list[Chunk], keys, values, position, adapts: bool = False) -> list[Chunk]:
        """`chunks` with T tokens at `position` (see `Chunk`) behind them, in a new list.

        adapts: tokens that lie outside what the profile knows may get chunks of other kinds than plain ones.
        """
        chunks, tokens, full = list(chunks), keys.shape[2], self.chunk_tokens
        growing = chunks[-1].tokens % full if chunks and chunks[-1].is_plain else 0
        for start, stop in split_by_chunk(0, tokens, growing, full):
            last = chunks.pop() if growing else None
            growing = 0
            here = position + start if isinstance(position, int) else self.xp.copy(position[:, :, start:stop])
            if last is None:
                chunks.append(self.encode(keys[:, :, start:stop], values[:, :, start:stop], here))
            else:
                told = None if isinstance(here, int) else here
                chunks.append(self.append(last, keys[:, :, start:stop], values[:, :, start:stop], told))
        return chunks

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`, a multiple of `block`; codes are copied, not decoded."""
        ...

    def cropped(self, chunk: Chunk, tokens: int) -> list[Chunk]:
        """Chunks of the first `tokens` tokens of `chunk`, any number: a block that is cut keeps its codes."""
        whole = -(-tokens // self.block) * self.block
        kept = chunk if whole == chunk.tokens else self.cut(chunk, whole)
        return [kept if whole == tokens else CutChunk.of(kept, tokens)]


@dataclass(frozen=True, eq=False)
class ArrayPlan(Plan):
    """Plan of a codec whose arrays have known shapes; a subclass adds what it decides and names its `CODEC`."""

    bits_by_shape = True


class ArrayCodec(Codec):
    """Tokens <-> arrays whose third axis is time; decoded for attention unless a subclass knows better.

    A subclass gives `store(keys, values, start)` -> arrays, and `decode`.
    """

    def __init__(self, xp, plan: ArrayPlan, layer_group: int, like=None):
        self.xp, self.like, self.method, self.rope = xp, like, plan.method, plan.rope(layer_group)
        self.kv_heads, self.head_dim = plan.shape.kv_heads * len(plan.layer_groups[layer_group]), plan.shape.head_dim
        self._tables: list = []

    def table(self, x, dtype=np.float32):
        """`x` as an array that all sequences share."""
        self._tables.append(self.xp.asarray(np.ascontiguousarray(x, dtype), like=self.like))
        return self._tables[-1]

    def store(self, keys, values, start: int) -> tuple:
        """Arrays [B, ., T / n, ...] of [B, H, T, D] float32 keys and values of tokens from position `start` on."""
        raise NotImplementedError

    def encode(self, keys, values, start) -> Chunk:
        xp = self.xp
        arrays = self.store(xp.astype(keys, xp.float32), xp.astype(values, xp.float32), start)
        return Chunk(keys.shape[0], start, keys.shape[2], self._checked(*arrays))

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own, whose codes stay; tokens of such chunks are not dropped."""
        new = self.encode(keys, values, chunk.start + chunk.tokens)
        arrays = tuple(self.xp.concat([a, b], axis=2) for a, b in zip(chunk.arrays, new.arrays))
        return replace(chunk, tokens=chunk.tokens + new.tokens, arrays=arrays)

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        arrays = tuple(self.xp.copy(a[:, :, : a.shape[2] * tokens // chunk.tokens]) for a in chunk.arrays)
        return replace(chunk, tokens=tokens, arrays=arrays)

    def tables(self) -> list:
        return self._tables

    def flatten(self, x):
        """Heads side by side: [B, H, T, D] -> [B, T, H D]."""
        batch, heads, tokens, dim = x.shape
        return self.xp.permute_dims(x, (0, 2, 1, 3)).reshape(batch, tokens, heads * dim)

    def unflatten(self, x):
        """Inverse of `flatten`: [B, T, H D] -> [B, H, T, D]."""
        return self.xp.permute_dims(x.reshape(*x.shape[:2], self.kv_heads, self.head_dim), (0, 2, 1, 3))

    def _checked(self, *arrays) -> tuple:
        for array in arrays:
            if array.dtype == self.xp.float16:  # scales and latents: NaN, infinity, and what float16 cannot hold
                check_finite(self.xp, array)
        return arrays


class FileCodec(ArrayCodec):
    """Tokens <-> arrays of a file: a chunk cannot grow."""

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        raise UsageError(
            f"Expected a cache for files, which is filled at once, received further tokens: method {self.method.name}."
        )


@dataclass(frozen=True, eq=False)
class PromptPlan(ArrayPlan):
    """Plan of a codec that holds a prompt in one chunk: what it stores follows from `bits` and the prompt's length."""

    @property
    def bits_per_element(self) -> float:
        """The bits asked for: what is stored stays below by less than one step of the method, or is its least."""
        return self.bits

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> PromptPlan:
        cls.check_bits(shape, method, bits)
        return cls(method, bits, shape)

    def decides(self) -> dict:
        return {"bits": np.float64(self.bits)}


class LatentCodec(ArrayCodec):
    """Vectors of a head as coefficients of an orthonormal basis after RoPE, which attention works on.

    A subclass calls `set_bases`, and gives `store` and `latents(chunk)` -> coefficients of keys and of values,
    [B, H, T, R] float32.
    """

    def set_bases(self, bases: Sequence[np.ndarray], means: Sequence[np.ndarray] | None = None) -> None:
        """`bases`: of keys and of values, [H or 1, D, R]; `means` [H, D] that go off before, if any."""
        self.bases = [self.table(basis) for basis in bases]
        self.means = None if means is None else [self.table(mean[:, None]) for mean in means]

    def project(self, keys, values) -> list:
        """Coefficients [B, H, T, R] of keys and of values [B, H, T, D]."""
        sides = (keys, values) if self.means is None else (x - mean for x, mean in zip((keys, values), self.means))
        return [self.xp.matmul(x, basis) for x, basis in zip(sides, self.bases)]

    def latents(self, chunk: Chunk) -> tuple:
        raise NotImplementedError

    def decode(self, chunk: Chunk) -> tuple:
        """Keys and values [B, H, T, D] float32 of a chunk."""
        xp = self.xp
        sides = [xp.matmul(z, _transposed(xp, basis)) for z, basis in zip(self.latents(chunk), self.bases)]
        return tuple(sides if self.means is None else (x + mean for x, mean in zip(sides, self.means)))

    def attend(self, chunk: Chunk, queries, scale: float) -> tuple:
        """Partial softmax of grouped `queries` [B, H, M, D] float32: neither keys nor values are rebuilt."""
        xp = self.xp
        keys, values = self.latents(chunk)
        scores = xp.matmul(xp.matmul(queries, self.bases[0]), _transposed(xp, keys))
        if self.means is not None:
            scores = scores + xp.matmul(queries, _transposed(xp, self.means[0]))
        p, m, l = attention.partial_from_scores(xp, scores * scale)
        output = xp.matmul(xp.matmul(p, values), _transposed(xp, self.bases[1]))
        return (output if self.means is None else output + l * self.means[1]), m, l


def _transposed(xp, x):
    axes = tuple(range(x.ndim))
    return xp.permute_dims(x, (*axes[:-2], axes[-1], axes[-2]))


def pack_tokens(xp, codes, bits: int):
    """Pack codes [B, H, T, R] along time, so that no rank wastes bytes -> [B, H, T / 8, R, bits]; T a multiple of 8."""
    batch, heads, tokens, rank = codes.shape
    codes = codes.reshape(batch, heads, tokens // UNIT, UNIT, rank)
    return pack(xp, xp.permute_dims(codes, (0, 1, 2, 4, 3)), bits)[..., 0, :]


def unpack_tokens(xp, packed, bits: int):
    """Inverse of `pack_tokens` -> [B, H, T, R] uint8."""
    batch, heads, units, rank, _ = packed.shape
    codes = unpack(xp, packed[..., None, :], bits, UNIT)
    return xp.permute_dims(codes, (0, 1, 2, 4, 3)).reshape(batch, heads, units * UNIT, rank)


def highest_within(method: Method, options: Sequence[tuple[float, object]], bits: float):
    """What goes with the most bits of `options` within `bits`; raises UsageError that names them all."""
    reachable = [choice for cost, choice in options if cost <= bits]
    if not reachable or bits > options[-1][0]:
        names = ", ".join(f"{cost:g}" for cost, _ in options)
        raise UsageError(f"Expected bits of {names} for {method.name}, received {bits:g}.")
    return reachable[-1]


def ranks_within(spectrum: np.ndarray, budget: float, steps: Sequence[int]) -> np.ndarray:
    """Ranks [L, 2] out of `steps`, for the largest share of `spectrum` [L, 2, H, D] at which their mean is in `budget`.

    The rank of a layer's keys or values is that of the head that needs most for the share; one share for the model.
    """
    allowed = np.array(steps)

    def ranks(share: float) -> np.ndarray:
        return allowed[np.searchsorted(allowed, rank_for_energy(spectrum, share).max(-1))]

    low, high = 0.0, 1.0
    if ranks(high).mean() <= budget:
        return ranks(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ranks(middle).mean() <= budget else (low, middle)
    return ranks(low)

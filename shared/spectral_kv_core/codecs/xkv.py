"""xKV (Chang et al. 2025, arXiv 2503.18893): one token factor for a group of adjacent layers.

Section 3.2: heads of four adjacent layers side by side, keys before RoPE, the prompt's own truncated SVD; what is stored
is the token factor [T, rank] and the layers' factor [rank, channels], in float16, ranks of keys and values as 2 : 3 (512
and 768 in the paper). The released code multiplies back and keeps decoded tokens in full; here both factors are what is
held, in files. Departure: of a given size, so ranks follow from the bits and the length of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codec import Chunk
from ..methods import Method
from ..plan import check_bits
from ..profile import ModelShape, Profile
from ..rope import rotate, unrotate
from .base import ArrayCodec, ArrayPlan

KEY_SHARE = 0.4


class XkvCodec(ArrayCodec):
    """Per side: token factor [B, T, R] and layer factor [B, R, H D] float16. A prompt is one chunk, which cannot grow."""

    chunk_tokens = 2**31

    def __init__(self, xp, plan: XkvPlan, row: int, like=None):
        super().__init__(xp, plan, row, like)
        self._ranks = plan.bits, self.kv_heads * self.head_dim

    def store(self, keys, values, start: int) -> tuple:
        xp, (batch, heads, tokens, dim) = self.xp, keys.shape
        keys = unrotate(xp, keys, self.rope, start) if self.rope else keys
        arrays = []
        for x, rank in zip((keys, values), ranks(*self._ranks, tokens)):
            x = xp.to_numpy(xp.permute_dims(x, (0, 2, 1, 3)).reshape(batch, tokens, heads * dim))
            axes = np.stack([leading_axes(row, rank) for row in x])  # [B, p, R]
            arrays += [x @ axes, np.swapaxes(axes, -1, -2)]
        return tuple(xp.astype(xp.asarray(np.ascontiguousarray(a, np.float32), like=keys), xp.float16) for a in arrays)

    def append(self, chunk: Chunk, keys, values) -> Chunk:
        raise ValueError("Expected a cache for files, which is filled at once, received further tokens: method xkv.")

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`: rows of the token factors."""
        xp, (a_k, b_k, a_v, b_v) = self.xp, chunk.arrays
        arrays = xp.copy(a_k[:, :tokens]), b_k, xp.copy(a_v[:, :tokens]), b_v
        return Chunk(chunk.batch, chunk.start, tokens, arrays)

    def decode(self, chunk: Chunk) -> tuple:
        xp, sides = self.xp, []
        for a, b in (chunk.arrays[:2], chunk.arrays[2:]):
            x = xp.matmul(xp.astype(a, xp.float32), xp.astype(b, xp.float32))
            x = x.reshape(chunk.batch, chunk.tokens, self.kv_heads, self.head_dim)
            sides.append(xp.permute_dims(x, (0, 2, 1, 3)))
        keys, values = sides
        return rotate(xp, keys, self.rope, chunk.start) if self.rope else keys, values


def leading_axes(x: np.ndarray, rank: int) -> np.ndarray:
    """Right singular vectors [p, rank] of `x` [T, p], by the eigenvectors of the smaller Gram matrix, float64."""
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():  # no eigenvectors then; the arrays are refused for it
        return np.full((x.shape[1], rank), np.nan)
    if x.shape[0] >= x.shape[1]:
        return np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :rank]
    value, left = np.linalg.eigh(x @ x.T)
    axes = x.T @ left[:, ::-1][:, :rank]
    return axes / np.sqrt(np.maximum(value[::-1][:rank], np.finfo(np.float64).tiny))


def ranks(bits: float, channels: int, tokens: int) -> tuple[int, int]:
    """Ranks of keys and of values whose factors take `bits` per element of `tokens` tokens; 1 at least."""
    most = min(tokens, channels)
    total = int(bits * 2 * tokens * channels / (16 * (tokens + channels)))
    keys = min(max(round(total * KEY_SHARE), total - most, 1), most)
    return keys, min(max(total - keys, 1), most)


@dataclass(frozen=True)
class XkvPlan(ArrayPlan):
    """Ranks follow from `bits` when the length of the prompt is known."""

    CODEC = XkvCodec

    @property
    def bits_per_element(self) -> float:
        """The bits asked for: what is stored stays below by less than one rank, or takes rank 1."""
        return self.bits

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 4.0

    @classmethod
    def range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return 0.1, 32.0  # both factors of a square matrix at full rank

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> XkvPlan:
        check_bits(method, shape, bits)
        return cls(method, bits, shape)

    def decides(self) -> list:
        return [np.float64(self.bits)]

    def chunk_arrays(self, row: int, batch: int, tokens: int) -> list[tuple]:
        channels = len(self.layer_groups[row]) * self.shape.kv_heads * self.shape.head_dim
        sizes = [(batch, *size) for r in ranks(self.bits, channels, tokens) for size in ((tokens, r), (r, channels))]
        return [(size, "float16") for size in sizes]

"""xKV (Chang et al. 2025, arXiv 2503.18893): one token factor for a group of adjacent layers.

Section 3.2: heads of four adjacent layers side by side, keys before RoPE, the prompt's own truncated SVD; what is stored
is the token factor [T, rank] and the layers' factor [rank, channels], in float16, ranks of keys and values as 2 : 3 (512
and 768 in the paper). The released code multiplies back and keeps decoded tokens in full; here both factors are what is
held, in files. Departure: of a given size, so ranks follow from the bits and the length of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays.rope import rotate, unrotate
from ..planning.methods import Method
from ..profile.model_shape import ModelShape
from .base import FileCodec, PromptPlan
from .chunk import Chunk

KEY_SHARE = 0.4


class XkvCodec(FileCodec):
    """Per side: token factor [B, T, R] and layer factor [B, R, H D] float16. A prompt is one chunk, which cannot grow."""

    chunk_tokens = 2**31

    def __init__(self, xp, plan: XkvPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self._ranks = plan.bits, self.kv_heads * self.head_dim

    def store(self, keys, values, start: int) -> tuple:
        xp = self.xp
        keys = unrotate(xp, keys, self.rope, start) if self.rope else keys
        arrays = []
        for x, rank in zip((keys, values), ranks(*self._ranks, keys.shape[2])):
            x = xp.to_numpy(self.flatten(x))
            axes = np.stack([leading_axes(row, rank) for row in x])  # [B, p, R]
            arrays += [x @ axes, np.swapaxes(axes, -1, -2)]
        return tuple(xp.astype(xp.asarray(np.ascontiguousarray(a, np.float32), like=keys), xp.float16) for a in arrays)

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`: rows of the token factors."""
        xp, (a_k, b_k, a_v, b_v) = self.xp, chunk.arrays
        arrays = xp.copy(a_k[:, :tokens]), b_k, xp.copy(a_v[:, :tokens]), b_v
        return Chunk(chunk.batch, chunk.start, tokens, arrays)

    def decode(self, chunk: Chunk) -> tuple:
        xp = self.xp
        a_k, b_k, a_v, b_v = (xp.astype(x, xp.float32) for x in chunk.arrays)
        keys, values = (self.unflatten(xp.matmul(a, b)) for a, b in ((a_k, b_k), (a_v, b_v)))
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


@dataclass(frozen=True, eq=False)
class XkvPlan(PromptPlan):
    """Ranks follow from `bits` when the length of the prompt is known."""

    CODEC = XkvCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 4.0

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return 0.1, 32.0  # both factors of a square matrix at full rank

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        channels = len(self.layer_groups[layer_group]) * self.shape.kv_heads * self.shape.head_dim
        sizes = [(batch, *size) for r in ranks(self.bits, channels, tokens) for size in ((tokens, r), (r, channels))]
        return [(size, "float16") for size in sizes]

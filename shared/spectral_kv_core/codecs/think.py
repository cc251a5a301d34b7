"""ThinK (Xu et al. 2024, arXiv 2407.21018): keys without the channels that queries and keys use least.

Section 3.2, equation 6: per KV head a channel scores mean of q^2 times mean of k^2, the lowest are removed from the stored
keys and from the queries that attend to them, values are kept. Departures: the query energy is the profile's, averaged over
positions, not that of the prompt's last 32 queries, which a cache that is filled from another one never sees; every chunk
of up to 1,024 tokens has its own channels, by the tokens that it starts with; kept numbers are float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..arrays import attention
from ..planning.budget import CHUNK_TOKENS
from ..planning.methods import Method
from ..planning.plan import needed
from ..profile.derived import query_moment, rotated_energy
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.packing import UNIT, pack, unpack
from .base import ArrayCodec, ArrayPlan


class ThinkCodec(ArrayCodec):
    """Kept channels of keys [B, H, T, C] and values [B, H, T, D] float16, and which they are, a bit each [B, H, D / 8, 1]."""

    def __init__(self, xp, plan: ThinkPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self.kept = plan.channels
        profile = needed(plan.profile)
        positions = profile.calibration.get("positions", 2048)
        energy = rotated_energy(query_moment(profile, layer_group), self.rope, positions)
        self.energy = self.table(energy / energy.mean(-1, keepdims=True))  # [H, D]
        self.order = self.table(np.arange(self.head_dim), np.int32)

    def store(self, keys, values, start: int) -> tuple:
        xp = self.xp
        score = xp.mean(xp.square(keys), axis=2) * self.energy  # [B, H, D]
        best = xp.argsort(-score, axis=-1)[..., : self.kept]
        mask = xp.sum(xp.astype(best[..., None] == self.order, xp.int32), axis=2)
        mask = xp.astype(mask, xp.uint8)
        kept = self._take(keys, self._channels(mask))
        return xp.astype(kept, xp.float16), xp.astype(values, xp.float16), pack(xp, mask, 1)

    def append(self, chunk, keys, values, positions=None):
        """`chunk` with T more tokens behind its own, of the same channels."""
        xp = self.xp
        keys = self._take(xp.astype(keys, xp.float32), self._channels(self._mask(chunk)))
        new = self._checked(xp.astype(keys, xp.float16), xp.astype(values, xp.float16))
        arrays = tuple(xp.concat([a, b], axis=2) for a, b in zip(chunk.arrays, new))
        return replace(chunk, tokens=chunk.tokens + keys.shape[2], arrays=(*arrays, chunk.arrays[2]))

    def cut(self, chunk, tokens: int):
        """The first `tokens` tokens of `chunk`."""
        arrays = tuple(self.xp.copy(a[:, :, :tokens]) for a in chunk.arrays[:2])
        return replace(chunk, tokens=tokens, arrays=(*arrays, chunk.arrays[2]))

    def decode(self, chunk) -> tuple:
        """Keys and values [B, H, T, D] float32 of a chunk; removed channels are zero."""
        xp, (keys, values, _) = self.xp, chunk.arrays
        mask = xp.astype(self._mask(chunk), xp.int32)
        place = xp.where(mask > 0, xp.cumulative_sum(mask, axis=-1) - 1, self.kept)  # behind the kept ones is a zero
        blank = xp.zeros((*keys.shape[:3], 1), dtype=xp.float32, like=keys)
        return self._take(xp.concat([xp.astype(keys, xp.float32), blank], axis=-1), place), xp.astype(
            values, xp.float32
        )

    def attend(self, chunk, queries, scale: float) -> tuple:
        """Partial softmax of grouped `queries` [B, H, M, D] float32 over a chunk, on the channels that it kept."""
        xp, (keys, values, _) = self.xp, chunk.arrays
        queries = self._take(queries, self._channels(self._mask(chunk)))
        return attention.dense_partial(xp, queries, xp.astype(keys, xp.float32), xp.astype(values, xp.float32), scale)

    def _mask(self, chunk):
        return unpack(self.xp, chunk.arrays[2], 1, self.head_dim)

    def _channels(self, mask):
        """Kept channels [B, H, C], ascending, of a mask [B, H, D]."""
        return self.xp.argsort(1 - self.xp.astype(mask, self.xp.int32), axis=-1)[..., : self.kept]

    def _take(self, x, channels):
        """Channels [B, H, C] of `x` [B, H, T, D]."""
        xp = self.xp
        index = xp.astype(channels, xp.int32)[:, :, None] + xp.zeros((1, 1, x.shape[2], 1), dtype=xp.int32, like=x)
        return xp.take_along_axis(x, index, axis=-1)


@dataclass(frozen=True, eq=False)
class ThinkPlan(ArrayPlan):
    """channels: of every head that are kept."""

    channels: int = 0
    CODEC = ThinkCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 12.8  # 40 % of the channels of keys go

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return _bits(1, shape), _bits(shape.head_dim, shape)

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> ThinkPlan:
        cls.check_bits(shape, method, bits)
        query_moment(needed(profile), 0)  # raises for a profile without it
        channels = max(c for c in range(1, shape.head_dim + 1) if _bits(c, shape) <= bits)
        return cls(method, bits, shape, profile=profile, channels=channels)

    def decides(self) -> dict:
        return {"channels": self.channels}

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        lead, dim = (batch, self.shape.kv_heads), self.shape.head_dim
        kept = [((*lead, tokens, n), "float16") for n in (self.channels, dim)]
        return [*kept, ((*lead, -(-dim // UNIT), 1), "uint8")]


def _bits(channels: int, shape: ModelShape) -> float:
    """Stored bits per element with so many channels of keys, in full chunks."""
    mask = 8 * -(-shape.head_dim // UNIT) / (2 * shape.head_dim * CHUNK_TOKENS)
    return 8 + 8 * channels / shape.head_dim + mask

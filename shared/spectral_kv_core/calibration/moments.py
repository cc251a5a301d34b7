"""Streaming second-order statistics in float64: cached vectors, and queries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..arrays import ops
from ..arrays.rope import Rope, pair_slices, unrotate
from ..errors import UsageError


@dataclass
class Moments:
    """Running mean and scatter of vectors [..., n, D], merged batch by batch (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def update(self, x: np.ndarray) -> None:
        """Take in `x` [..., n, D]; raises UsageError on NaN or infinity."""
        x = np.asarray(x, np.float64)
        if not np.isfinite(x).all():
            raise UsageError("Expected finite activations, received NaN or infinity: check the weights and the dtype.")
        n = x.shape[-2]
        mean = x.mean(-2)
        centered = x - mean[..., None, :]
        scatter = np.swapaxes(centered, -1, -2) @ centered
        if self.count == 0:
            self.count, self.mean, self.scatter = n, mean, scatter
            return
        delta = mean - self.mean
        total = self.count + n
        self.scatter = self.scatter + scatter + (delta[..., :, None] * delta[..., None, :] * (self.count * n / total))
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """[..., D, D], normalized by the number of vectors."""
        return self.scatter / max(self.count, 1)


class QueryMoments:
    """Mean, covariance and rotary amplitudes of the queries [Hq, T, D] of one layer, before RoPE."""

    def __init__(self, kv_heads: int, rope: Rope | None, pairs: int | None = None):
        """pairs: room for so many amplitudes, those of the layer that rotates most; None for those of `rope`."""
        self.kv_heads, self.rope, self.moments = kv_heads, rope, Moments()
        own = rope.rotary_dim // 2 if rope else 0
        self.room = 0 if pairs is None else pairs - own
        self.length = np.zeros(())  # summed over the tokens: [Hq, pairs] from the first document on

    def update(self, queries: np.ndarray) -> None:
        """Take in the queries of a document from position 0 on, as RoPE left them."""
        if self.rope is None:
            self.moments.update(queries)
            return
        # keys and queries both carry the factor `scaling`: with it twice here, plain keys give the model's scores
        queries = unrotate(ops, queries, self.rope, 0) * self.rope.scaling**2
        self.moments.update(queries)
        first, second = pair_slices(self.rope)
        lengths = np.hypot(queries[..., first], queries[..., second])
        self.length = self.length + lengths.sum(1, dtype=np.float64)

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fields of `QueryStatistics` for this layer: mean [Hq, D], root [H, D, D], amplitude [Hq, pairs]."""
        covariance = self.moments.covariance
        heads, dim = covariance.shape[:2]
        value, vectors = np.linalg.eigh(covariance.reshape(self.kv_heads, -1, dim, dim).mean(1))
        root = (vectors * np.sqrt(np.maximum(value, 0))[:, None, :]) @ np.swapaxes(vectors, -1, -2)
        amplitude = self.length / self.moments.count if self.rope else np.zeros((heads, 0))
        return self.moments.mean, root, np.pad(amplitude, ((0, 0), (0, self.room)))

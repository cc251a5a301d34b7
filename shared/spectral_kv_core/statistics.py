"""Streaming second-order statistics in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Moments:
    """Running mean and scatter of vectors [..., n, D], merged batch by batch (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def update(self, x: np.ndarray) -> None:
        """Take in `x` [..., n, D]; raises ValueError on NaN or infinity."""
        x = np.asarray(x, np.float64)
        if not np.isfinite(x).all():
            raise ValueError("Expected finite activations, received NaN or infinity: check the weights and the dtype.")
        n = x.shape[-2]
        mean = x.mean(-2)
        centred = x - mean[..., None, :]
        scatter = np.swapaxes(centred, -1, -2) @ centred
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
        """[..., D, D], normalised by the number of vectors."""
        return self.scatter / max(self.count, 1)

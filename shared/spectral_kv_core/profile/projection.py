"""The components of one head of a profile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal components of the keys (after RoPE) or values of one head; its mean is kept apart.

    mean [D]; basis [D, R] with orthonormal columns; variance [R], descending; levels: quantizer tables by width, in
    standard deviations.
    """

    model: str
    layer: int
    head: int
    side: str
    mean: np.ndarray
    basis: np.ndarray
    variance: np.ndarray
    levels: dict[int, np.ndarray]

    @property
    def head_dim(self) -> int:
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

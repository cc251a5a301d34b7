"""The components of one head of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..arrays.basis import orthonormalize, rank_for_energy
from ..errors import UsageError

if TYPE_CHECKING:
    from .profile import Profile

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


def get_projection(
    profile: Profile, layer: int, head: int, side: str = "keys", rank: int | None = None, energy: float | None = None
) -> Projection:
    """`Profile.get_projection`."""
    shape = profile.shape
    if layer not in shape.layers:
        known = ", ".join(map(str, shape.layers))
        raise UsageError(f"Expected a compressible layer of {profile.model}, one of {known}, received {layer!r}.")
    if head not in range(shape.kv_heads):
        raise UsageError(f"Expected a KV head between 0 and {shape.kv_heads - 1}, received {head!r}.")
    if side not in SIDES:
        raise UsageError(f"Expected a side of {SIDES}, received {side!r}.")
    basis_set = profile.basis_set("head.post")
    row, group = shape.layers.index(layer), head + shape.kv_heads * SIDES.index(side)
    variance = basis_set.channel_variance()[row, group].astype(np.float64)
    if rank is None:
        energy = energy or profile.calibration.get("target_energy", 0.95)
        if not 0 < energy <= 1:
            raise UsageError(f"Expected an energy in (0, 1], received {energy}.")
        rank = int(rank_for_energy(variance, energy))
    elif energy is not None:
        raise UsageError("Expected rank or energy, received both.")
    if rank not in range(1, basis_set.rank + 1):
        raise UsageError(f"Expected a rank between 1 and {basis_set.rank}, received {rank!r}.")
    basis = orthonormalize(basis_set.basis[row, group])[:, :rank]
    mean = basis_set.mean[row, group].astype(np.float64)
    return Projection(profile.model, layer, head, side, mean, basis, variance[:rank], basis_set.levels)

"""Keys whose constant part outweighs what changes in them, told where a method codes both together."""

from __future__ import annotations

import numpy as np

from ..arrays import ops
from ..arrays.rope import unrotate
from ..planning.budget import SINKS
from ..planning.cache_plan import CachePlan
from ..profile.store import warn_once

LOUD = (
    32.0  # energy of the mean to that about it: some 15 in the loudest head of SmolLM2, far more where keys have a bias
)
FEWEST, MOST = 64, 256  # tokens of one call that are looked at


def loudness(keys: np.ndarray) -> float:
    """Energy of the mean of `keys` [B, H, T, D] before RoPE to the energy about it, in the head where it is largest."""
    mean = keys.mean(2, keepdims=True, dtype=np.float64)
    about = np.square(keys - mean).sum((0, 2, 3))
    return float((np.square(mean).sum((0, 3))[:, 0] * keys.shape[2] / np.maximum(about, 1e-30)).max())


class KeyMeans:
    """Looks at the first prompt that a layer of `plan` is given, and warns once of a model."""

    def __init__(self, plan: CachePlan):
        self.method, self.shape = plan.method.name, plan.shape

    def saw(self, xp, keys, start: int) -> bool:
        """Whether `keys` [B, H, L, D] after RoPE, the first of them at `start`, were enough to tell."""
        if keys.shape[2] < FEWEST:
            return False
        first = SINKS if start == 0 else 0
        x = xp.to_numpy(keys[:, :, first : first + MOST])
        if self.shape.rope is not None:
            x = unrotate(ops, x, self.shape.rope, start + first)
        if loudness(x) > LOUD:
            warn_once(
                f"The keys of this model have a constant part that outweighs what changes in them, and {self.method} codes "
                "both together: expect large errors. Take a method that does not suffer from that, such as spectral.",
                str(self.shape),
            )
        return True

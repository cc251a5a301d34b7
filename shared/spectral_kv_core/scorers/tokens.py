"""What scorers are given: the stored tokens of one layer, and what the profile knows about its queries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..arrays.namespace import ArrayNamespace
from ..arrays.rope import Rope, unrotate_at


@dataclass(frozen=True)
class Tokens:
    """Stored tokens of one layer in the order of the text; what a scorer does not need may stay None.

    post_rope, values [B, H, T, D]; positions: NumPy integers [T] or [B, H, T], None for 0, 1, ...; now: position of the
    last token seen, None for the last of `positions`. rope: None for a model without. query_mean [Hq, D], query_root
    [H, D, D], query_amplitude [Hq, pairs]: this layer's row of `QueryStatistics`. recent [B, Hq, L, D]: queries of the
    last L tokens after RoPE, times the attention scale.
    """

    xp: ArrayNamespace
    post_rope: Any
    values: Any = None
    positions: np.ndarray | None = None
    now: int | None = None
    rope: Rope | None = None
    query_mean: np.ndarray | None = None
    query_root: np.ndarray | None = None
    query_amplitude: np.ndarray | None = None
    recent: Any = None

    def __post_init__(self):
        tokens = self.post_rope.shape[2]
        places = np.arange(tokens) if self.positions is None else np.asarray(self.positions)
        if places.shape not in ((tokens,), tuple(self.post_rope.shape[:3])):
            raise ValueError(
                f"Expected positions [T] or [B, H, T] of keys {tuple(self.post_rope.shape)}, received {places.shape}."
            )
        object.__setattr__(self, "positions", places)
        if self.now is None and tokens:
            object.__setattr__(self, "now", int(places.max()))

    @property
    def count(self) -> int:
        return self.post_rope.shape[2]

    @cached_property
    def pre_rope(self):
        """Keys before RoPE, float32: turned back from their true positions."""
        keys = self.xp.astype(self.post_rope, self.xp.float32)
        if self.rope is None:
            return keys
        assert self.positions is not None, "__post_init__ fills them in"
        return unrotate_at(self.xp, keys, self.rope, self.positions)

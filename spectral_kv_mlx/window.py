"""Layers with a sliding window whose tokens are codes, as mlx-lm sees them."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_causal_mask

from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.errors import UsageError

from . import ops


class SpectralWindowCache(WindowLayer, _BaseCache):
    """A `WindowLayer` in mlx-lm's list of caches, in place of a `RotatingKVCache`.

    `update_and_fetch` gives decoded keys and values: the host attends to them with its own mask.
    """

    xp = ops

    def __init__(self, plan, layer_group: int, sliding_window: int, tail: int):
        super().__init__(plan, layer_group, sliding_window, tail)
        self.open()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in [B, H, L, D] post-RoPE keys and values; returns those that they attend to."""
        fetched = self.take(keys, values)
        if keys.shape[2] > 1:
            mx.eval(fetched, self.arrays())  # else what is out of sight lives until the last layer
        return fetched

    @property
    def offset(self) -> int:
        """Next RoPE position."""
        return self.seen

    def size(self) -> int:
        return self.store.visible

    def empty(self) -> bool:
        return not self.seen

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        window, visible = window_size or self.sliding_window, self.store.visible
        if visible + N > window or (return_array and N > 1):
            return create_causal_mask(N, visible, window_size=window)
        return "causal" if N > 1 else None

    def is_trimmable(self) -> bool:
        """Whether nothing is out of sight yet."""
        return self.seen == self.store.held

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens; returns how many there were to forget."""
        n = min(n, self.seen)
        self.store.crop(n)
        return n

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays())

    @property
    def state(self) -> list[mx.array]:
        """Every array, which mlx-lm evaluates. It cannot be stored: save_prompt_cache of spectral_kv_mlx stores it decoded."""
        return self.arrays()

    @state.setter
    def state(self, state) -> None:
        raise UsageError(
            "Expected save_prompt_cache and load_prompt_cache of spectral_kv_mlx, received a state to restore."
        )

    @classmethod
    def merge(cls, caches):
        """Refused: a batch of mlx-lm needs caches that know left padding."""
        raise UsageError("Expected caches without windows= in a batch, received packed windows. Leave windows out.")

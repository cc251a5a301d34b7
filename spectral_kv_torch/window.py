"""Layers with a sliding window whose tokens are codes, as transformers sees them."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.errors import UsageError

from . import ops
from .cache import CodedLayer


class SpectralWindowLayer(CodedLayer, WindowLayer, CacheLayerMixin):
    """A `WindowLayer` in a transformers `Cache`, in place of a `DynamicSlidingWindowLayer`.

    `update` gives decoded keys and values: the host attends to them with its own mask.
    """

    is_sliding = True
    is_croppable = False  # what is out of sight is gone
    xp = ops

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True
        self.open(key_states.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take in [B, H, L, D] post-RoPE keys and values; returns those that they attend to."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        return self.take(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        visible = 0 if self.store is None else self.store.visible
        return visible + query_length, self.seen - visible

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; raises UsageError once some are out of sight."""
        if tokens_to_remove > 0:
            raise UsageError(f"Expected a negative number of tokens to remove, received {tokens_to_remove}.")
        if self.store is not None and tokens_to_remove:
            self.store.crop(-tokens_to_remove)

    def fill(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """`WindowLayer.fill`."""
        self.lazy_initialization(keys, values)
        super().fill(keys, values, seen)

    def reset(self) -> None:
        self.store, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.store.select([row for row in range(self.store.exact_keys.shape[0]) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.seen:
            chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.store.select(chosen.tolist())

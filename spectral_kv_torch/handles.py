"""Handles: what a cache layer returns in place of keys and values.

transformers calls `update` before attention and gives the attention function no cache, so the way to the codes leads
through the returned tensors. Any operation of torch on a handle decodes the cache and goes on with a plain tensor.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map


class Pending:
    """Tokens [B, H, L, D] that `layer` took in for layer number `number` of its group and that nobody has attended to yet."""

    def __init__(self, layer, keys: torch.Tensor, values: torch.Tensor, number: int = 0):
        self.layer, self.keys, self.values, self.number = layer, keys, values, number
        self._dense = None

    def __iter__(self):
        return iter((self.keys, self.values))

    def handles(self, slots: int) -> tuple[Handle, Handle]:
        """Handles for keys and values [B, H, slots, D], shaped as the dense tensors would be."""
        return Handle.make(self, 0, self.keys, slots), Handle.make(self, 1, self.values, slots)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded keys and values of everything up to these tokens."""
        if self._dense is None:
            self._dense = self.layer.dense(self)
        return self._dense


class Handle(torch.Tensor):
    """Stands for the dense keys (side 0) or values (side 1) of a layer."""

    pending: Pending
    side: int

    @staticmethod
    def make(pending: Pending, side: int, new: torch.Tensor, slots: int) -> Handle:
        shape = (*new.shape[:2], slots, new.shape[3])
        handle = torch.Tensor._make_wrapper_subclass(Handle, shape, dtype=new.dtype, device=new.device)
        handle.pending, handle.side = pending, side
        return handle

    def __repr__(self) -> str:
        return f"Handle({'keys' if self.side == 0 else 'values'}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def decode(x):
            return x.pending.dense()[x.side] if isinstance(x, Handle) else x

        return func(*tree_map(decode, args), **tree_map(decode, kwargs or {}))

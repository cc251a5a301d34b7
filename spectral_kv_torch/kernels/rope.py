"""RoPE on a card without asking the host for every angle."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from spectral_kv_core.arrays.rope import Rope, rotate_at

from .. import arrays
from .checked import Checked
from .device import runs_kernels

MAX_POSITION = 4 * 2**20


def rotate(x, rope: Rope, start, inverse: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """`rope.rotate` as one launch, in `dtype`; None where the kernel cannot run."""
    if x.device.type != "cuda" or x.ndim != 4 or not x.numel() or not runs_kernels(x.device):
        return None
    if not getattr(start, "ndim", 0):
        start = int(start)
        if start + x.shape[2] > MAX_POSITION:
            return None
    return _checked()(x, x.shape[3], x, rope, start, inverse, dtype)


@cache
def _checked() -> Checked:
    from .triton_rope import rotate as kernel

    return Checked("rotation", kernel, _stock)


def _stock(x, rope: Rope, start, inverse: bool, dtype: torch.dtype) -> torch.Tensor:
    positions = np.arange(start, start + x.shape[2]) if isinstance(start, int) else arrays.to_numpy(start)
    return rotate_at(arrays, x, rope, positions, inverse).to(dtype)

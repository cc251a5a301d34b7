"""The operations of `spectral_kv_core.arrays.ops` on PyTorch; `ops` adds the kernels."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import clip, cos, exp, float16, float32, int32, log, matmul, permute, round, sin, sqrt, square, uint8

from spectral_kv_core.arrays.ops import __all__ as every_name

__all__ = [name for name in every_name if name != "kernels"]

permute_dims = permute


def asarray(x, like=None):
    """`x` (a NumPy array) as a tensor on the device of `like` (a tensor or a device)."""
    device = like.device if isinstance(like, torch.Tensor) else like
    return torch.from_numpy(np.array(x)).to(device or "cpu")


def to_numpy(x) -> np.ndarray:
    """`x` as a NumPy array; floating types become float32 (NumPy has no bfloat16)."""
    x = x.detach()
    return (x.float() if x.is_floating_point() else x).cpu().numpy()


def to_file(x) -> tuple[np.ndarray, str]:
    """`x` bit by bit as a NumPy array, and the name of its dtype; bfloat16 goes as uint16."""
    x = x.detach().cpu().contiguous()
    array = x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()
    return array, str(x.dtype).removeprefix("torch.")


def from_file(x: np.ndarray, dtype: str, like=None):
    """Inverse of `to_file`, on the device of `like` (a tensor or a device)."""
    if dtype == "bfloat16":
        return asarray(x.view(np.int16), like).view(torch.bfloat16)
    return asarray(x, like)


def astype(x, dtype):
    return x.to(dtype)


def concat(arrays, axis=0):
    return torch.cat(list(arrays), dim=axis)


def stack(arrays, axis=0):
    return torch.stack(list(arrays), dim=axis)


def copy(x):
    """A compact copy that shares no memory with `x`: a slice that stays must not keep its parent alive."""
    return x.clone(memory_format=torch.contiguous_format)


def take(x, indices, axis=0):
    return torch.index_select(x, axis, indices)


def where(condition, x, y):
    return torch.where(condition, x, y)


def maximum(x, y):
    return torch.maximum(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, min=y)


def max(x, axis, keepdims=False):
    return torch.amax(x, dim=axis, keepdim=keepdims)


def min(x, axis, keepdims=False):
    return torch.amin(x, dim=axis, keepdim=keepdims)


def mean(x, axis, keepdims=False):
    return torch.mean(x, dim=axis, keepdim=keepdims)


def sum(x, axis, keepdims=False):
    return torch.sum(x, dim=axis, keepdim=keepdims)


def sort(x, axis=-1):
    return torch.sort(x, dim=axis).values


def argsort(x, axis=-1):
    """Indices that sort `x`; equal entries stay in their order."""
    return torch.argsort(x, dim=axis, stable=True)


def cumulative_sum(x, axis=-1):
    return torch.cumsum(x, dim=axis)


def take_along_axis(x, indices, axis=-1):
    return torch.take_along_dim(x, indices.long(), dim=axis)


def rfft(x, n=None, axis=-1):
    return torch.fft.rfft(x, n=n, dim=axis)


def irfft(x, n=None, axis=-1):
    return torch.fft.irfft(x, n=n, dim=axis)


def evaluate(*arrays) -> None:
    """Compute `arrays` now: torch puts nothing off that takes memory."""


def zeros(shape, dtype=float32, like=None):
    return torch.zeros(tuple(shape), dtype=dtype, device=like.device if like is not None else None)


@cache
def _byte_table(width: int, device: torch.device) -> torch.Tensor:
    """The fields of each of the 256 bytes, side by side in one integer."""
    fields = (np.arange(256)[:, None] >> np.arange(0, 8, width)) & (2**width - 1)
    return torch.from_numpy(fields.astype(np.uint8).view(f"<i{8 // width}")[:, 0].copy()).to(device)


def split_bytes(x, width: int):
    """Fields of `width` bits of every byte, low bits first: [...] uint8 -> [..., 8 / width] uint8."""
    # one look-up per byte: two to four times faster than shifts, which torch does not vectorize over short rows
    fields = torch.index_select(_byte_table(width, x.device), 0, x.reshape(-1).int())
    return fields.view(torch.uint8).view(*x.shape, 8 // width)


def all_finite(x) -> bool:
    """Whether no entry of `x` is NaN or infinite."""
    return bool(torch.isfinite(x).all())

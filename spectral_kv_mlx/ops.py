"""The names of `spectral_kv_core.ops` on MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.core import (
    argsort,
    clip,
    cos,
    exp,
    float16,
    float32,
    int32,
    matmul,
    max,
    maximum,
    mean,
    min,
    permute_dims,
    round,
    sin,
    sort,
    sqrt,
    square,
    stack,
    sum,
    take,
    take_along_axis,
    uint8,
    where,
)
from mlx.core import cumsum as cumulative_sum
from mlx.core.fft import irfft, rfft

__all__ = [
    "all_finite", "argsort", "asarray", "astype", "clip", "concat", "copy", "cos", "cumulative_sum", "exp", "float16",
    "float32", "from_file", "int32", "irfft", "kernels", "matmul", "max", "maximum", "mean", "min", "permute_dims", "rfft",
    "round", "sin", "sort", "split_bytes", "sqrt", "square", "stack", "sum", "take", "take_along_axis", "to_file", "to_numpy",
    "uint8", "where", "zeros",
]  # fmt: skip

kernels = None


def asarray(x, like=None):
    """`x` (a NumPy array) as an MLX array; memory is unified, `like` has nothing to say."""
    return mx.array(x)


def to_numpy(x) -> np.ndarray:
    """`x` as a NumPy array; floating types become float32 (NumPy has no bfloat16)."""
    return np.array(x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)


def to_file(x) -> tuple[np.ndarray, str]:
    """`x` bit by bit as a NumPy array, and the name of its dtype; bfloat16 goes as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x), str(x.dtype).removeprefix("mlx.core.")


def from_file(x: np.ndarray, dtype: str, like=None):
    """Inverse of `to_file`."""
    return mx.array(x).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(x)


def astype(x, dtype):
    return x.astype(dtype)


def concat(arrays, axis=0):
    return mx.concatenate(list(arrays), axis=axis)


def copy(x):
    """A compact copy that shares no memory with `x`: a slice that stays must not keep its parent alive."""
    return take(x, mx.arange(x.shape[0]), axis=0)


def zeros(shape, dtype=float32, like=None):
    return mx.zeros(tuple(shape), dtype=dtype)


def split_bytes(x, width: int):
    """Fields of `width` bits of every byte, low bits first: [...] uint8 -> [..., 8 / width] uint8."""
    return stack([(x >> shift) & (2**width - 1) for shift in range(0, 8, width)], axis=-1)


def all_finite(x) -> bool:
    """Whether no entry of `x` is NaN or infinite; evaluates `x`."""
    return bool(mx.isfinite(x).all())

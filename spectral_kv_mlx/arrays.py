"""The operations of `spectral_kv_core.arrays.ops` on MLX; `ops` adds the kernels."""

from __future__ import annotations

import builtins
from functools import reduce
from operator import or_

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
    log,
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
    take_along_axis,
    uint8,
    where,
)
from mlx.core import cumsum as cumulative_sum
from mlx.core.fft import irfft, rfft

from spectral_kv_core.arrays.ops import __all__ as every_name

__all__ = [name for name in every_name if name != "kernels"]


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
    return mx.take(x, mx.arange(x.shape[0]), axis=0)


def take(x, indices, axis=0):
    # a look-up in a table, which `take_along_axis` does ten times faster than `take` on the CPU
    return mx.take_along_axis(x, indices, axis=axis) if x.ndim == 1 else mx.take(x, indices, axis=axis)


def evaluate(*arrays) -> None:
    """Compute `arrays` now: MLX puts all work off, and keeps what it needs for it."""
    mx.eval(*arrays)


def zeros(shape, dtype=float32, like=None):
    return mx.zeros(tuple(shape), dtype=dtype)


def split_bytes(x, width: int):
    """Fields of `width` bits of every byte, low bits first: [...] uint8 -> [..., 8 / width] uint8."""
    return _split_bytes(x, width).view(mx.uint8).reshape(*x.shape, 8 // width)


@mx.compile  # into one operation
def _split_bytes(x, width: int):
    """The fields of every byte as the bytes of one integer: [...] uint8 -> [...] of 8 / width bytes."""
    fields, wide = 8 // width, {8: mx.uint8, 4: mx.uint16, 2: mx.uint32, 1: mx.uint64}[width]
    x = x.astype(wide)
    # field i moves from bit i * width to bit i * 8
    spread = reduce(or_, (x << mx.array(i * (8 - width), wide) for i in range(fields)))
    return spread & mx.array(builtins.sum((2**width - 1) << (8 * i) for i in range(fields)), wide)


def all_finite(x) -> bool:
    """Whether no entry of `x` is NaN or infinite; evaluates `x`."""
    return bool(mx.isfinite(x).all())

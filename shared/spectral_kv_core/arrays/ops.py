"""The array operations that the core's runtime math uses, on NumPy; each backend has the same names in its `ops.py`.

Array-API names and argument order; `like` gives the device of a new array where the library has devices.
"""

from __future__ import annotations

import numpy as np
from numpy import (
    astype,
    clip,
    concat,
    cos,
    cumulative_sum,
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
    take,
    take_along_axis,
    uint8,
    where,
)
from numpy.fft import irfft, rfft

kernels = None  # or a backend's module of that name: see `kernels.Kernels`

__all__ = [
    "all_finite", "argsort", "asarray", "astype", "clip", "concat", "copy", "cos", "cumulative_sum", "evaluate", "exp",
    "float16", "float32", "from_file", "int32", "irfft", "kernels", "log", "matmul", "max", "maximum", "mean", "min",
    "permute_dims", "rfft", "round", "sin", "sort", "split_bytes", "sqrt", "square", "stack", "sum", "take", "take_along_axis",
    "to_file", "to_numpy", "uint8", "where", "zeros",
]  # fmt: skip


def asarray(x, like=None):
    """`x` (a NumPy array) as an array of this library, on the device of `like`."""
    return np.asarray(x)


def to_numpy(x) -> np.ndarray:
    """`x` as a NumPy array; floating types become float32 (NumPy has no bfloat16)."""
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.kind == "f" else x


def to_file(x) -> tuple[np.ndarray, str]:
    """`x` bit by bit as a NumPy array, and the name of its dtype; bfloat16 goes as uint16."""
    x = np.ascontiguousarray(x)
    return x, x.dtype.name


def from_file(x: np.ndarray, dtype: str, like=None):
    """Inverse of `to_file`; bfloat16 becomes float32 here, exactly (NumPy has no bfloat16)."""
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x


def copy(x):
    """A compact copy that shares no memory with `x`: a slice that stays must not keep its parent alive."""
    return np.array(x)


def evaluate(*arrays) -> None:
    """Compute `arrays` now, where the library puts work off."""


def zeros(shape, dtype=float32, like=None):
    return np.zeros(shape, dtype)


def argsort(x, axis=-1):
    """Indices that sort `x`; equal entries stay in their order."""
    return np.argsort(x, axis=axis, kind="stable")


def split_bytes(x, width: int):
    """Fields of `width` bits of every byte, low bits first: [...] uint8 -> [..., 8 / width] uint8."""
    return (x[..., None] >> np.arange(0, 8, width, dtype=np.uint8)) & np.uint8(2**width - 1)


def all_finite(x) -> bool:
    """Whether no entry of `x` is NaN or infinite."""
    return bool(np.isfinite(x).all())

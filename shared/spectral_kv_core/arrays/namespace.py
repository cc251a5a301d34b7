"""What the core asks of an array library, which it calls `xp`: `ops` on NumPy, a backend's `ops.py` on its own."""

from __future__ import annotations

from typing import Any, Protocol


class ArrayNamespace(Protocol):
    """The names of `ops.__all__`. Arrays, dtypes and signatures are the library's own, hence `Any`."""

    all_finite: Any
    argsort: Any
    asarray: Any
    astype: Any
    clip: Any
    concat: Any
    copy: Any
    cos: Any
    cumulative_sum: Any
    evaluate: Any
    exp: Any
    float16: Any
    float32: Any
    from_file: Any
    int32: Any
    irfft: Any
    kernels: Any
    log: Any
    matmul: Any
    max: Any
    maximum: Any
    mean: Any
    min: Any
    permute_dims: Any
    rfft: Any
    round: Any
    sin: Any
    sort: Any
    split_bytes: Any
    sqrt: Any
    square: Any
    stack: Any
    sum: Any
    take: Any
    take_along_axis: Any
    to_file: Any
    to_numpy: Any
    uint8: Any
    where: Any
    zeros: Any

"""The C kernels of this backend, built by `spectral_kv_core.native`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from spectral_kv_core.native import compiled, disabled

__all__ = ["VARIANTS", "disabled", "library"]
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler, or where they are `disabled`."""
    return compiled(Path(__file__).parent, VARIANTS, "stock operations of torch take over, which are slower")

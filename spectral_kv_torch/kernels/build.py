"""The C kernels of this backend, loaded or built by `spectral_kv_core.native`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from spectral_kv_core import native
from spectral_kv_core.native import disabled

__all__ = ["disabled", "library", "prepare"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where there is neither a library for this machine nor a compiler, or they are `disabled`."""
    return native.load(Path(__file__).parent, "stock operations of torch take over, which are slower")


def prepare(device: torch.device) -> None:
    """Load what a cache on `device` calls: what must be built on this machine is built before anything is timed."""
    native.library()
    if device.type == "cpu":
        library()

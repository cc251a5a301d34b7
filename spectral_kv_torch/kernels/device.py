"""Which cards run our kernels in Triton."""

from __future__ import annotations

import torch

from .build import disabled


def runs_kernels(device: torch.device) -> bool:
    """Whether `device` is an NVIDIA card from Ampere on, whose tensor cores and shared memory they count on, with Triton."""
    if device.type != "cuda" or disabled() or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        import triton  # noqa: F401
    except ImportError:  # torch's wheels for Windows come without Triton
        return False
    return True

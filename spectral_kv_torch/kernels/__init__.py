"""Kernels of the PyTorch backend; each has stock operations that take over where it cannot run."""

from .attention import decode_step
from .rounding import round_in_time

__all__ = ["decode_step", "round_in_time"]

"""Kernels of the PyTorch backend; each has stock operations that take over where it cannot run."""

from .attention import decode_step
from .flash import partial_attention, supports_partial_attention
from .rounding import round_in_time

__all__ = ["decode_step", "partial_attention", "round_in_time", "supports_partial_attention"]

"""Kernels of the PyTorch backend; each has stock operations that take over where it cannot run."""

from .attention import decode_step

__all__ = ["decode_step"]

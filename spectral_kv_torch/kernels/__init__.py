"""Kernels of the PyTorch backend; each has stock operations that take over where it cannot run."""

from .attention import decode_step
from .decoding import decoder
from .flash import partial_attention, supports_partial_attention
from .packing import packer
from .rope import rotate
from .rounding import round_in_time

__all__ = [  # the names of `spectral_kv_core.arrays.kernels.Kernels`
    "decode_step", "decoder", "packer", "partial_attention", "rotate", "round_in_time", "supports_partial_attention",
]  # fmt: skip

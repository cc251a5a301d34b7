"""Faster ways on MLX, out of stock operations; none is a kernel of our own, which could not be tried without a GPU."""

from .attention import decode_step
from .blocks import partial_attention, supports_partial_attention

__all__ = [  # the names of `spectral_kv_core.arrays.kernels.Kernels`
    "decode_step", "decoder", "packer", "partial_attention", "rotate", "round_in_time", "supports_partial_attention",
]  # fmt: skip


def decoder(codec) -> None:
    """No faster way than chunk by chunk."""


def packer(codec) -> None:
    """No faster way than width by width."""


def rotate(x, rope, start, inverse: bool = False) -> None:
    """No faster way than the core's."""


def round_in_time(z, weights, gain, matrix, tables) -> None:
    """No faster way than the core's."""

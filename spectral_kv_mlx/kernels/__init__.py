"""Faster ways on MLX, out of stock operations; none is a kernel of our own, which could not be tried without a GPU."""

from .attention import decode_step

__all__ = ["decode_step", "round_in_time", "supports_partial_attention"]


def round_in_time(z, weights, gain, matrix, tables) -> None:
    """No faster way than the core's."""


def supports_partial_attention(queries) -> bool:
    """MLX's fused attention does not give the sum of the weights, without which partials cannot be merged."""
    return False

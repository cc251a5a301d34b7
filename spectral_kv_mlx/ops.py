"""The names of `spectral_kv_core.arrays.ops` on MLX: the operations, and kernels that are faster."""

from . import arrays
from . import kernels as kernels
from .arrays import *  # noqa: F403

__all__ = sorted([*arrays.__all__, "kernels"])

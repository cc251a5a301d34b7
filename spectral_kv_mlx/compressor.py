"""Codes of one head's keys or values on MLX."""

from __future__ import annotations

from spectral_kv_core.compat.compressor import Compressor

from . import ops


class SpectralKVCompressor(Compressor):
    __doc__ = Compressor.__doc__

    xp = ops

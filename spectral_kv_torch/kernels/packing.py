"""Bit packing of chunks that grow."""

from __future__ import annotations

from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral import SpectralCodec

from .checked import Checked
from .device import runs_kernels


def packer(codec) -> CheckedPacker | None:
    """What packs the codes of all widths of `codec` at once; None where each width is packed on its own."""
    if not isinstance(codec, SpectralCodec) or not runs_kernels(codec.time.device):
        return None
    from .triton_packing import Packer

    return CheckedPacker(codec, Packer(codec))


class CheckedPacker:
    """`packer`, checked."""

    def __init__(self, codec: SpectralCodec, packer):
        self._packer, self._checked = packer, Checked("packing", packer, codec.pack)

    def __call__(self, codes, chunk: Chunk | None = None) -> tuple:
        """As `SpectralCodec.pack`."""
        return self._checked(codes, 0, codes, chunk)

    def tables(self) -> list:
        """Every tensor that all sequences share."""
        return self._packer.tables()

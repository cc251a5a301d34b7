"""The time rounding of `rounding.c` and of `triton_rounding` on torch tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int32, c_void_p
from functools import cache

import torch

from spectral_kv_core.arrays.transform import FREQUENCIES
from spectral_kv_core.quantization.time_rounding import descend

from .. import arrays
from .build import library
from .checked import Checked
from .device import runs_kernels


class _Rounding(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "groups", "blocks", "rank", "threads")),
        *((name, c_void_p) for name in ("z", "weights", "gain", "slots", "time", "codes", "levels", "output")),
    ]


def round_in_time(z, weights, gain, matrix, tables) -> torch.Tensor | None:
    """`rounding.round_in_time` as one call of the kernel; None where it cannot run."""
    if z.dtype != torch.float32 or matrix.shape[0] != FREQUENCIES or not hasattr(tables, "slots"):
        return None
    if runs_kernels(z.device):
        return _on_card()(z, 0, z, weights, gain, matrix, tables)
    lib = library() if z.device.type == "cpu" else None
    if lib is None:
        return None
    batch, groups, blocks, _, rank = z.shape
    held = [x.contiguous() for x in (z, weights, gain, tables.slots, matrix, tables.codes, tables.levels)]
    output = torch.empty(z.shape, dtype=torch.uint8)
    call = _Rounding(batch, groups, blocks, rank, torch.get_num_threads(), *(x.data_ptr() for x in (*held, output)))
    lib.spectralkv_round.argtypes, lib.spectralkv_round.restype = (POINTER(_Rounding),), None
    lib.spectralkv_round(byref(call))
    return output


@cache
def _on_card() -> Checked:
    from .triton_rounding import round_in_time as kernel

    return Checked("time rounding", kernel, _stock)


def _stock(*args) -> torch.Tensor:
    return descend(arrays, *args)

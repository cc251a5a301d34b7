"""The time rounding of `rounding.c` on torch tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int32, c_void_p

import torch

from .build import library

FREQUENCIES = 16


class _Rounding(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "groups", "blocks", "rank", "threads")),
        *((name, c_void_p) for name in ("z", "weights", "gain", "slots", "time", "codes", "levels", "output")),
    ]


def round_in_time(z, weights, gain, matrix, tables) -> torch.Tensor | None:
    """`rounding.round_in_time` as one call of the kernel; None where it cannot run."""
    fits = z.device.type == "cpu" and z.dtype == torch.float32 and matrix.shape[0] == FREQUENCIES
    lib = library() if fits and hasattr(tables, "slots") else None
    if lib is None:
        return None
    batch, groups, blocks, _, rank = z.shape
    held = [x.contiguous() for x in (z, weights, gain, tables.slots, matrix, tables.codes, tables.levels)]
    output = torch.empty(z.shape, dtype=torch.uint8)
    call = _Rounding(batch, groups, blocks, rank, torch.get_num_threads(), *(x.data_ptr() for x in (*held, output)))
    lib.spectralkv_round.argtypes, lib.spectralkv_round.restype = (POINTER(_Rounding),), None
    lib.spectralkv_round(byref(call))
    return output

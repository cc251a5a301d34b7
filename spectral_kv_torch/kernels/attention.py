"""The decode step of `latent.c` on torch tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int32, c_void_p
from weakref import WeakKeyDictionary

import numpy as np
import torch

from spectral_kv_core.arrays.transform import FREQUENCIES
from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader
from spectral_kv_core.planning.budget import CHUNK_TOKENS
from spectral_kv_core.quantization.trellis import DISTANCES

from .build import library
from .checked import CheckedStep
from .decoding import dense_step
from .device import runs_kernels
from .eager import EagerStep

MAX_WIDTHS, LEVELS = 8, 256


class _Codec(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kv_heads", "dim", "rank", "widths")),
        ("bits", c_int32 * MAX_WIDTHS),
        *((name, c_void_p * MAX_WIDTHS) for name in ("first", "component", "scale", "levels")),
        *((name, c_void_p) for name in ("time", "basis", "mean")),
        *((name, c_int32) for name in ("coupled", "paths")),
        ("path", c_int32 * MAX_WIDTHS),
        ("before", c_void_p * len(DISTANCES)),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, c_int32) for n in ("batch", "query_rows", "length", "chunks", "exact", "exact_is_bfloat16", "threads")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("blocks", "codes", "queries", "exact_keys", "exact_values", "output")),
    ]


class LatentStep:
    """`attention.decode_step` for one layer's codec, as one call of the kernel."""

    def __init__(self, codec: SpectralReader):
        lib = library()
        self._run = lib.spectralkv_attend
        self._run.argtypes, self._run.restype = (POINTER(_Codec), POINTER(_Call)), ctypes.c_int
        self._addresses: WeakKeyDictionary[Chunk, np.ndarray] = WeakKeyDictionary()
        self._tables = [codec.time.contiguous(), codec.basis.contiguous(), codec.mean.contiguous()]
        self._widths = len(codec.bits)
        c = self._codec = _Codec(codec.kv_heads, codec.head_dim, codec.rank, self._widths)
        c.time, c.basis, c.mean = (x.data_ptr() for x in self._tables)
        for i, (bits, rows, scale, levels) in enumerate(zip(codec.bits, codec.numbers, codec.scale, codec.levels)):
            rows = rows.numpy()
            starts = np.searchsorted(rows, np.arange(codec.groups * FREQUENCIES + 1) * codec.rank)
            held = (
                torch.from_numpy(starts.astype(np.int32)),
                torch.from_numpy((rows % codec.rank).astype(np.int16)),
                scale.contiguous(),
                torch.nn.functional.pad(levels, (0, LEVELS - len(levels))),
            )
            c.bits[i] = bits
            c.first[i], c.component[i], c.scale[i], c.levels[i] = (x.data_ptr() for x in held)
            self._tables += held
        if codec.coupled:
            before = [rows.contiguous() for rows in codec.paths.before]
            c.coupled, c.paths = codec.coupled, len(before[0])
            c.path[: codec.coupled] = np.cumsum([0, *map(len, codec.numbers[: codec.coupled - 1])]).tolist()
            c.before[:] = [x.data_ptr() for x in before]
            self._tables += before

    def __call__(self, chunks: list[Chunk], queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        batch, heads, length, _ = queries.shape
        kv_heads = keys.shape[1]
        rows = queries.float().contiguous()
        if keys.dtype not in (torch.float32, torch.bfloat16):
            keys, values = keys.float(), values.float()
        keys, values = keys.contiguous(), values.contiguous()
        out = torch.empty_like(rows)
        addresses = np.concatenate([self._address(chunk) for chunk in chunks])
        blocks = np.array([chunk.tokens // FREQUENCIES for chunk in chunks], np.int32)
        call = _Call(
            batch, heads // kv_heads * length, length, len(chunks), keys.shape[2], keys.dtype == torch.bfloat16,
            torch.get_num_threads(), scale, blocks.ctypes.data, addresses.ctypes.data, rows.data_ptr(), keys.data_ptr(),
            values.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        if self._run(byref(self._codec), byref(call)):
            raise MemoryError("Expected memory for one decode step of attention, the system has none left.")
        return out.to(queries.dtype)

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return self._tables

    def _address(self, chunk: Chunk) -> np.ndarray:
        """Where the codes of a chunk lie, found once."""
        found = self._addresses.get(chunk)
        if found is None:
            assert chunk.tokens <= CHUNK_TOKENS and all(x.is_contiguous() for x in chunk.arrays)
            found = self._addresses[chunk] = np.array([x.data_ptr() for x in chunk.arrays], np.uint64)
        return found


def decode_step(codec):
    """The faster step for `codec`: a kernel, or stock operations that serve several chunks at a time; None for others."""
    if not isinstance(codec, SpectralReader):
        return None
    if not codec.method.latent:
        return dense_step(codec)
    return _kernel(codec) or EagerStep(codec)


def _kernel(codec):
    if codec.block != FREQUENCIES:
        return None
    if codec.time.device.type == "cuda":
        return _triton_step(codec)
    return LatentStep(codec) if codec.time.device.type == "cpu" and library() else None


def _triton_step(codec):
    if not runs_kernels(codec.time.device):
        return None
    from .triton_attention import MAX_DIM, TritonStep

    return CheckedStep(codec.xp, codec, TritonStep(codec)) if codec.head_dim <= MAX_DIM else None

"""Bit packing of chunks that grow, in one launch: `packing.pack_rows` and `append_rows` for all widths of a codec.

A chunk that was packed here is one buffer, of which its arrays are views.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral import SpectralCodec
from spectral_kv_core.planning.budget import CHUNK_TOKENS
from spectral_kv_core.quantization.packing import UNIT
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS

ROWS = tl.constexpr(32)  # of a program, all of one width


@triton.jit
def _load_plane(unit, at, held, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of WIDTH bits has for codes number `at`, whose units begin at `unit`."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    START: tl.constexpr = BITS & 7 & (8 - 2 * WIDTH)  # packing.planes: wider ones come first, and lower in the code
    byte = tl.load(unit + START + at % 8 // PER_BYTE, mask=held, other=0).to(tl.int32)
    return ((byte >> (at % PER_BYTE * WIDTH)) & ((1 << WIDTH) - 1)) << START


@triton.jit
def _store_plane(units, codes, held, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """The plane of WIDTH bits of codes [ROWS, 8], which fill a unit each."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    START: tl.constexpr = BITS & 7 & (8 - 2 * WIDTH)
    fields = tl.reshape((codes >> START) & ((1 << WIDTH) - 1), [ROWS, WIDTH, PER_BYTE])
    byte = tl.sum(fields << (tl.arange(0, PER_BYTE) * WIDTH)[None, None, :], 2).to(tl.uint8)
    tl.store(units[:, None] + START + tl.arange(0, WIDTH)[None, :], byte, mask=held[:, None])


@triton.jit
def _pack_tile(
    sequence, first, rows, sources, codes, before, after, old, new, at_old, at_new, stride, size, groups,
    BITS: tl.constexpr,
):  # fmt: skip
    """A unit of ROWS rows from `first` on, of `rows` of a width, or what they have besides."""
    unit = tl.program_id(1)
    whole_old, left_old, whole, left = before // 8, before % 8, after // 8, after % 8
    i, j = tl.arange(0, ROWS), tl.arange(0, 8)
    rest_old, rest = (rows * left_old + 7) // 8 * BITS, (rows * left + 7) // 8 * BITS
    units_old = old + tl.load(at_old) + sequence * rows * whole_old * BITS
    others_old = old + tl.load(at_old + 1) + sequence * rest_old
    if unit < whole:
        row, column = first + i[:, None] + j[None, :] * 0, unit * 8 + j[None, :] + i[:, None] * 0
        target = new + tl.load(at_new) + ((sequence * rows + first + i) * whole + unit) * BITS
        stored = first + i < rows
    else:  # side by side for all rows
        number = i[:, None] * 8 + j[None, :]
        row, column = first + number // tl.maximum(left, 1), whole * 8 + number % tl.maximum(left, 1)
        row = tl.where(number < ROWS * left, row, rows)
        target = new + tl.load(at_new + 1) + sequence * rest + (first * left // 8 + i) * BITS
        stored = (i * 8 < ROWS * left) & (first * left + i * 8 < rows * left)
    present = row < rows
    fresh = column >= before
    source = tl.load(sources + row, mask=present & fresh, other=0)
    here = (sequence * groups + source // size).to(tl.int64) * stride + (column - before) * size + source % size
    y = tl.load(codes + here, mask=present & fresh, other=0).to(tl.int32)
    held, sealed = present & (column < before), column < whole_old * 8
    at = tl.where(sealed, row * whole_old * 8 + column, row * left_old + column - whole_old * 8)
    at_unit = tl.where(sealed, units_old, others_old) + at // 8 * BITS
    for k in tl.static_range(4):
        if BITS & (1 << k):
            y |= _load_plane(at_unit, at, held, BITS, 1 << k)
    for k in tl.static_range(4):
        if BITS & (1 << k):
            _store_plane(target, y, stored, BITS, 1 << k)


@triton.jit(do_not_specialize=["before", "after", "stride"])
def _pack(before, after, stride, size, groups, slots, tiles, sources, layout, codes, old, new):
    """Units of ROWS rows, tile by tile: `tiles` [n, 4]: width, first row, rows of the width, first row of the width."""
    tile, sequence = tiles + tl.program_id(0) * 4, tl.program_id(2)
    slot, first, rows, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    at_old, at_new = layout + (before * slots + slot) * 2, layout + (after * slots + slot) * 2
    for k in tl.static_range(1, 8):
        if slot == k:
            _pack_tile(
                sequence, first, rows, sources + start, codes, before, after, old, new, at_old, at_new, stride, size, groups,
                k + k // 7,
            )  # fmt: skip


class Packer:
    """Chunks of one layer's codec."""

    def __init__(self, codec: SpectralCodec):
        self._codec = codec
        self._rows = [len(rows) for rows in codec.numbers]
        self._layouts: dict[int, tuple] = {}  # by sequences

    def __call__(self, codes: torch.Tensor, chunk: Chunk | None = None) -> tuple:
        """Arrays of a chunk with `codes` [B, G, n, F, R], of which a part along n may be given, behind those of `chunk`."""
        codec = self._codec
        batch, groups, n, frequencies, rank = codes.shape
        before = chunk.tokens // codec.block if chunk else 0
        after = before + n
        layout, shapes = self._layout(batch)
        old = self._joined(chunk) if before and self._rows else codes
        new = torch.empty(shapes[after][1], dtype=torch.uint8, device=codes.device)
        if self._rows:
            tiles, sources = self._tables
            with torch.cuda.device_of(codes):
                _pack[len(tiles), triton.cdiv(after, UNIT), batch](
                    before, after, codes.stride(1), frequencies * rank, groups, len(BIT_WIDTHS), tiles, sources, layout,
                    codes, old, new,
                )  # fmt: skip
        sizes, _, shapes = shapes[after]
        return tuple(x.view(shape) for x, shape in zip(new.split(sizes), shapes))

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return [*self._tables, *(layout for layout, _ in self._layouts.values())]

    @cached_property
    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`tiles` and `sources` of the kernel."""
        starts = np.cumsum([0, *self._rows])
        tiles = [
            (BIT_WIDTHS.index(bits), first, rows, start)
            for bits, rows, start in zip(self._codec.bits, self._rows, starts)
            for first in range(0, rows, ROWS.value)
        ]
        return torch.tensor(tiles, dtype=torch.int32, device=self._codec.time.device), torch.cat(self._codec.numbers)

    def _layout(self, batch: int) -> tuple:
        """Where units and rests of every width begin in a buffer [blocks, widths, 2], on the card; their sizes, the whole
        size and their shapes, by the number of blocks."""
        if batch not in self._layouts:
            blocks = CHUNK_TOKENS // self._codec.block
            starts, by_blocks = np.zeros((blocks + 1, len(BIT_WIDTHS), 2), np.int32), []
            for n in range(blocks + 1):
                shapes = []
                for bits, rows in zip(self._codec.bits, self._rows):
                    shapes += [(batch, rows, n // UNIT, bits), (batch, -(-rows * (n % UNIT) // UNIT), bits)]
                sizes = [int(np.prod(shape)) for shape in shapes]
                ends = np.cumsum([0, *sizes], dtype=np.int64)
                starts[n, [BIT_WIDTHS.index(bits) for bits in self._codec.bits]] = ends[:-1].reshape(-1, 2)
                by_blocks.append((sizes, int(ends[-1]), shapes))
            layout = torch.from_numpy(starts).to(self._codec.time.device)
            self._layouts[batch] = layout, by_blocks
        return self._layouts[batch]

    def _joined(self, chunk: Chunk) -> torch.Tensor:
        """The buffer of a chunk; of one that was made elsewhere, a copy."""
        first, size = chunk.arrays[0], sum(x.numel() for x in chunk.arrays)
        storages = {x.untyped_storage().data_ptr() for x in chunk.arrays}
        if len(storages) == 1 and first.storage_offset() == 0 and first.untyped_storage().nbytes() == size:
            return first.as_strided((size,), (1,), 0)
        return torch.cat([x.reshape(-1) for x in chunk.arrays])

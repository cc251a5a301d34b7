"""Packed codes on a GPU, for kernels in Triton: where they lie, and how they become coefficients.

Chunks are cut into *spans*, up to so many time blocks of one chunk, or its codes that wait for their unit. A kernel reads
one frequency of one group of a span at a time, as a tile of blocks by components in which every component has its own width:
widths are data, so that one compilation serves every plan of a model.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv_core.codec import Chunk, SpectralCodec
from spectral_kv_core.quantizer import BIT_WIDTHS, UNIT

FREQUENCIES = tl.constexpr(16)
WAITING = tl.constexpr(16)  # columns for up to 7 codes that wait for their unit; a product wants no fewer

# A span is 3 x 8 numbers: by index in BIT_WIDTHS where its codes lie, and how far apart sequences do; then these.
SLOTS = len(BIT_WIDTHS)
BLOCKS_AT, UNITS_AT, LEFT_AT, FIRST_AT = (tl.constexpr(2 * SLOTS + i) for i in range(4))


@triton.jit
def plane(address, bits, n, blocks, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, REST: tl.constexpr):
    """What the planes of WIDTH bits add to codes [BLOCKS, rows]; 0 in rows whose codes have no such plane.

    `address` [rows]: of unit 0; `n`: numbers of the codes. A row's own units are read byte by byte.
    """
    PER_BYTE: tl.constexpr = 8 // WIDTH
    start = bits & 7 & (8 - 2 * WIDTH)  # quantizer.planes: wider ones come first, and lower in the code
    address += start
    present = (bits & WIDTH) != 0
    if REST:  # code by code, since neighbours share units
        byte = address[None, :] + n // 8 * bits[None, :] + n % 8 // PER_BYTE
        held = present[None, :] & (tl.arange(0, BLOCKS)[:, None] < blocks)
        shift = n % PER_BYTE * WIDTH
    else:
        i = tl.arange(0, BLOCKS // PER_BYTE)[:, None]
        byte = address[None, :] + i // WIDTH * bits[None, :] + i % WIDTH
        held = present[None, :] & (i // WIDTH * 8 < blocks)
        shift = tl.arange(0, PER_BYTE)[None, :, None] * WIDTH
    fields = tl.load(byte.to(tl.pointer_type(tl.uint8)), mask=held, other=0).to(tl.int32) << start[None, :]
    fields = fields >> shift if REST else tl.reshape(fields[:, None, :] >> shift, [BLOCKS, bits.shape[0]])
    return fields & (((1 << WIDTH) - 1) << start)[None, :]


@triton.jit
def coefficients(
    span, sequence, at, tile, tiles, rank, planes, places, normalize, levels, RANK_TILE: tl.constexpr,
    BLOCKS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Coefficients [BLOCKS, RANK_TILE] of one of `tiles` tiles of components of a span, at group and frequency `at`; 0 where
    nothing is stored. `planes`: which ones these components have."""
    i = tl.arange(0, RANK_TILE)
    r = tile * RANK_TILE + i
    place = tl.load(places + (at * tiles + tile) * RANK_TILE + i)
    sigma = 1 / tl.load(normalize + at * rank + r, mask=r < rank, other=1.0)
    slot, row = place % 8, place // 8
    bits = slot + slot // 7  # quantizer.BIT_WIDTHS
    address = tl.load(span + slot) + sequence * tl.load(span + 8 + slot)
    n = tl.arange(0, BLOCKS)[:, None]
    if REST:  # rows lie side by side
        n += row[None, :] * tl.load(span + LEFT_AT).to(tl.int32)
    else:
        address += row * tl.load(span + UNITS_AT).to(tl.int32) * bits
    blocks = tl.load(span + BLOCKS_AT).to(tl.int32)
    codes = tl.zeros([BLOCKS, RANK_TILE], tl.int32)
    for i in tl.static_range(4):
        if planes & (1 << i):
            codes |= plane(address, bits, n, blocks, 1 << i, BLOCKS, REST)
    return tl.load(levels + slot[None, :] * 256 + codes) * sigma[None, :]  # index 0 has levels of 0: flat_tables


class CodeTables:
    """Where a codec keeps its coefficients, by tiles of components, of which the last one may hold more than there are.

    places [G, F, tiles, tile]: 8 times the row of a coefficient among those of its width, plus the index of the width.
    planes [G, F, tiles]: which planes the components of a tile have, a bit each.
    """

    def __init__(self, codec: SpectralCodec, tile: int):
        slots, order = (x.cpu().numpy().reshape(-1) for x in (codec.quantizers.slots, codec.order))
        counts = np.bincount(slots, minlength=SLOTS)
        first = np.cumsum(counts) - counts - counts[0]  # row that a width begins with; width 0 has none
        places = np.where(slots > 0, (order - first[slots]) * 8 + slots, 0)

        def tiled(x):
            return np.pad(x.reshape(-1, codec.rank), ((0, 0), (0, -codec.rank % tile))).reshape(-1, self.tiles, tile)

        self.tiles = -(-codec.rank // tile)
        places, planes = tiled(places), np.bitwise_or.reduce(tiled(np.array(BIT_WIDTHS)[slots]), axis=-1)
        self.places, self.planes = (
            torch.from_numpy(x.astype(np.int32)).to(codec.basis.device) for x in (places, planes)
        )

    def arrays(self) -> list[torch.Tensor]:
        return [self.places, self.planes]


class Spans:
    """The spans of chunks on the device of `like`, moved there once per sealing; each is up to `blocks` time blocks."""

    def __init__(self, codec: SpectralCodec, blocks: int, like: torch.Tensor):
        self._codec, self._blocks, self._device = codec, blocks, like.device
        self._spans: WeakKeyDictionary[Chunk, np.ndarray] = WeakKeyDictionary()
        self._tables: WeakKeyDictionary[Chunk, tuple[ref[Chunk], torch.Tensor]] = WeakKeyDictionary()

    def of(self, chunks: list[Chunk]) -> torch.Tensor:
        """Spans [n, 3, 8] of all `chunks`.

        Chunks are never changed, only followed by others: the first and the last stand for all between.
        """
        last, table = self._tables.get(chunks[0], (None, None))
        if last is None or last() is not chunks[-1]:
            spans = np.concatenate([self._of_chunk(chunk) for chunk in chunks])
            counts = spans[:, 2, 0]
            spans[:, 2, FIRST_AT.value - 2 * SLOTS] = np.cumsum(counts) - counts
            table = torch.from_numpy(spans).to(self._device)
            self._tables[chunks[0]] = ref(chunks[-1]), table
        return table

    def arrays(self) -> list[torch.Tensor]:
        return [table for _, table in self._tables.values()]

    def _of_chunk(self, chunk: Chunk) -> np.ndarray:
        """The spans of one chunk, found once."""
        found = self._spans.get(chunk)
        if found is None:
            assert all(x.is_contiguous() for x in chunk.arrays)
            units, left = divmod(chunk.tokens // self._codec.block, UNIT)
            at_once = self._blocks // UNIT
            starts = range(0, units, at_once)
            found = np.zeros((len(starts) + bool(left), 3, SLOTS), np.int64)
            for bits, whole, rest in zip(self._codec.bits, chunk.arrays[0::2], chunk.arrays[1::2]):
                slot = BIT_WIDTHS.index(bits)
                for span, start in zip(found, starts):
                    span[:2, slot] = whole.data_ptr() + start * bits, whole.stride(0)
                if left:
                    found[-1, :2, slot] = rest.data_ptr(), rest.stride(0)
            for span, start in zip(found, starts):
                span[2, :2] = min(units - start, at_once) * UNIT, units
            if left:
                found[-1, 2, :3] = left, 0, left
            self._spans[chunk] = found
        return found

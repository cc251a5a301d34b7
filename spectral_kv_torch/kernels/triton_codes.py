"""Packed codes on a GPU, for kernels in Triton: where they lie, and how they become coefficients.

Chunks are cut into *spans*, up to so many time blocks of one chunk, or its codes that wait for their unit. A kernel reads
one frequency of one group of a span at a time, as a tile of blocks by components in which every component has its own width:
widths are data, so that one compilation serves every plan of a model.

Codes of a trellis (`quantization.trellis`) say their level together with the path bits of three other rows, which may be
of any group. Gathered from packed codes these would be more loads than the codes themselves, so `lay_paths` first lays the
path bits of all rows of a span out, 32 blocks to a word, for the launch that follows: 1 bit per code, written and read once.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv_core.arrays import transform
from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader
from spectral_kv_core.quantization.packing import UNIT
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS
from spectral_kv_core.quantization.trellis import WIDTHS, curve

FREQUENCIES = tl.constexpr(transform.FREQUENCIES)
WAITING = tl.constexpr(16)  # columns for up to 7 codes that wait for their unit; a product wants no fewer
TRELLIS = tl.constexpr(
    len(WIDTHS)
)  # codes of a trellis have the indices 1 to 4 in BIT_WIDTHS, which are their bits too
SCALAR = tl.constexpr(16)  # of `planes`: some components have codes that say their level alone
PATH_ROWS = 128  # of a program that lays out path bits

# A span is 3 x 8 numbers: by index in BIT_WIDTHS where its codes lie, and how far apart sequences do; then these.
SLOTS = len(BIT_WIDTHS)
BLOCKS_AT, UNITS_AT, LEFT_AT, FIRST_AT = (tl.constexpr(2 * SLOTS + i) for i in range(4))


@triton.jit
def plane(address, bits, n, blocks, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, REST: tl.constexpr):
    """What the planes of WIDTH bits add to codes [BLOCKS, rows]; 0 in rows whose codes have no such plane.

    `address` [rows]: of unit 0; `n`: numbers of the codes. A row's own units are read byte by byte.
    """
    PER_BYTE: tl.constexpr = 8 // WIDTH
    start = bits & 7 & (8 - 2 * WIDTH)  # packing.planes: wider ones come first, and lower in the code
    address += start
    present = (bits & WIDTH) != 0
    if REST:  # code by code, since neighbors share units
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
    span, sequence, at, tile, tiles, rank, planes, places, normalize, levels, paths, path_rows, starts, second, third, fifth,
    curves, COUPLED: tl.constexpr, RANK_TILE: tl.constexpr, BLOCKS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Coefficients [BLOCKS, RANK_TILE] of one of `tiles` tiles of components of a span, at group and frequency `at`; 0 where
    nothing is stored. `planes`: which ones these components have; `paths`: of this span, where codes are COUPLED."""
    r = tile * RANK_TILE + tl.arange(0, RANK_TILE)
    place = tl.load(places + at * tiles * RANK_TILE + r)
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
    table = levels + slot[None, :] * 256 + codes  # index 0 has levels of 0: flat_tables
    if COUPLED:
        coupled = (slot > 0) & (slot <= TRELLIS)
        number = row + tl.load(starts + slot)
        low = _path_words(paths, path_rows, second, number, coupled, BLOCKS)
        high = _path_words(paths, path_rows, third, number, coupled, BLOCKS)
        high ^= _path_words(paths, path_rows, fifth, number, coupled, BLOCKS)
        high, low = (codes ^ _path_bits(high, RANK_TILE, BLOCKS)) & 1, _path_bits(low, RANK_TILE, BLOCKS) & 1
        t = (codes >> 1 << 2 | high << 1 | low).to(tl.float32) - ((1 << slot).to(tl.float32) - 0.5)[None, :]
        a, b, c = (
            tl.load(curves + slot) * sigma,
            tl.load(curves + 8 + slot) * sigma,
            tl.load(curves + 16 + slot) * sigma,
        )
        y = t * (a[None, :] + t * t * (b[None, :] + t * t * c[None, :]))  # trellis.on_curve; index 0 has a curve of 0
        if planes & SCALAR:
            alone = tl.load(table, mask=~coupled[None, :], other=0.0)
            y = tl.where(coupled[None, :], y, alone * sigma[None, :])
    else:
        y = tl.load(table) * sigma[None, :]
    return y


@triton.jit
def _path_words(paths, path_rows, before, number, coupled, BLOCKS: tl.constexpr):
    """Path bits of the rows `before` those with a `number`: int32 [words, rows]."""
    WORDS: tl.constexpr = (BLOCKS + 31) // 32
    row = tl.load(before + number, mask=coupled, other=0)
    return tl.load(paths + tl.arange(0, WORDS)[:, None] * path_rows + row[None, :])


@triton.jit
def _path_bits(words, RANK_TILE: tl.constexpr, BLOCKS: tl.constexpr):
    """Numbers [BLOCKS, RANK_TILE] whose lowest bits are those of `words`."""
    EACH: tl.constexpr = BLOCKS // words.shape[0]
    return tl.reshape(words[:, None, :] >> tl.arange(0, EACH)[None, :, None], [BLOCKS, RANK_TILE])


@triton.jit(do_not_specialize=["path_rows"])
def lay_paths(path_rows, spans, starts, paths, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Path bits [B, spans, words, path_rows] of ROWS rows of every span of up to BLOCKS blocks; the last row has none."""
    WORDS: tl.constexpr = (BLOCKS + 31) // 32
    number, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    span = spans + number * 24
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.full([ROWS], 1, tl.int32)
    for k in tl.static_range(2, 5):  # widths lie behind one another
        slot += (row >= tl.load(starts + k)).to(tl.int32)
    held = (row < path_rows - 1)[:, None]
    width = tl.where(slot == 3, 2, slot)[:, None]  # of the plane that comes first and has the lowest bits
    address = (tl.load(span + slot) + sequence * tl.load(span + 8 + slot))[:, None]
    own = (row - tl.load(starts + slot))[:, None]
    left, blocks = tl.load(span + LEFT_AT).to(tl.int32), tl.load(span + BLOCKS_AT).to(tl.int32)
    paths += (sequence * tl.num_programs(1) + number) * WORDS * path_rows
    if left > 0:
        n = tl.arange(0, 8)[None, :]
        code = own * left + n
        at = (address + code // 8 * slot[:, None] + code % 8 * width // 8).to(tl.pointer_type(tl.uint8))
        bit = tl.load(at, mask=held & (n < left), other=0).to(tl.int32) >> (code * width % 8) & 1
        tl.store(paths + row, tl.sum(bit << n, 1), mask=row < path_rows)
    else:
        address += own * tl.load(span + UNITS_AT).to(tl.int32) * slot[:, None]
        i = tl.arange(0, 16)[None, :]  # up to 4 bytes of 4 units
        for word in tl.static_range(WORDS):
            unit = word * 4 + i // 4
            byte = (address + unit * slot[:, None] + i % 4).to(tl.pointer_type(tl.uint8))
            x = tl.load(byte, mask=held & (i % 4 < width) & (unit * 8 < blocks), other=0).to(tl.int32)
            two, four = x & 1 | x >> 1 & 2 | x >> 2 & 4 | x >> 3 & 8, x & 1 | x >> 3 & 2
            x = tl.where(width == 1, x, tl.where(width == 2, two, four))
            bits = tl.sum(x << (i // 4 * 8 + i % 4 * 8 // width), 1)
            tl.store(paths + word * path_rows + row, bits, mask=row < path_rows)


class CodeTables:
    """Where a codec keeps its coefficients, by tiles of components, of which the last one may hold more than there are.

    places [G, F, tiles, tile]: 8 times the row of a coefficient among those of its width, plus the index of the width.
    planes [G, F, tiles]: which planes the components of a tile have, a bit each, and SCALAR.
    starts [8]: numbers of the first rows of every width among those of the trellis; curves [3, 8]: their levels.
    """

    def __init__(self, codec: SpectralReader, tile: int):
        slots, order = (x.cpu().numpy().reshape(-1) for x in (codec.quantizers.slots, codec.order))
        counts = np.bincount(slots, minlength=SLOTS)
        first = np.cumsum(counts) - counts - counts[0]  # row that a width begins with; width 0 has none
        places = np.where(slots > 0, (order - first[slots]) * 8 + slots, 0)

        def tiled(x):
            return np.pad(x.reshape(-1, codec.rank), ((0, 0), (0, -codec.rank % tile))).reshape(-1, self.tiles, tile)

        self.tiles = -(-codec.rank // tile)
        flags = np.array(BIT_WIDTHS)[slots] | (SCALAR.value * (slots > TRELLIS.value) if codec.coupled else 0)
        places, planes = tiled(places), np.bitwise_or.reduce(tiled(flags), axis=-1)
        self.places, self.planes = (
            torch.from_numpy(x.astype(np.int32)).to(codec.time.device) for x in (places, planes)
        )
        self.coupled = codec.coupled > 0
        if self.coupled:
            curves = np.zeros((3, SLOTS), np.float32)
            for bits, levels in zip(codec.bits[: codec.coupled], codec.levels):
                curves[:, bits] = curve(levels.cpu().numpy())
            tables = np.minimum(first, counts[1 : TRELLIS.value + 1].sum()).astype(np.int32), curves
            self._starts, self._curves = (torch.from_numpy(x).to(codec.time.device) for x in tables)
            self._path_rows, self._before = len(codec.paths.before[0]) + 1, codec.paths.before

    def paths(self, spans: torch.Tensor, batch: int, blocks: int) -> tuple:
        """What `coefficients` takes for codes of a trellis, laid out for `spans` of up to `blocks` blocks; for other codes
        tensors that are not read. Launches a kernel, on the current device."""
        if not self.coupled:
            return self.places, 0, self.places, self.places, self.places, self.places, self.places
        paths = torch.empty(
            (batch, len(spans), -(-blocks // 32), self._path_rows), dtype=torch.int32, device=spans.device
        )
        lay_paths[triton.cdiv(self._path_rows, PATH_ROWS), len(spans), batch](
            self._path_rows, spans, self._starts, paths, blocks, PATH_ROWS
        )
        return paths, self._path_rows, self._starts, *self._before, self._curves

    def arrays(self) -> list[torch.Tensor]:
        return [self.places, self.planes, *((self._starts, self._curves) if self.coupled else ())]


class Spans:
    """The spans of chunks on the device of `like`, moved there once per sealing; each is up to `blocks` time blocks."""

    def __init__(self, codec: SpectralReader, blocks: int, like: torch.Tensor):
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

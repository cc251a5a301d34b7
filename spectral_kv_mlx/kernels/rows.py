"""Products with packed rows of coefficients: all rows of one width, of keys or of values, with one or two operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from operator import or_

import mlx.core as mx
import numpy as np

from spectral_kv_core.quantization.packing import UNIT, lowest_bits, planes, unpack
from spectral_kv_core.quantization.quantizer import dequantize
from spectral_kv_core.quantization.trellis import curve

MULTIPLIED = (1, 2, 4, 8)  # widths that are packed as `mx.quantized_matmul` has them
SELECTED = (3, 4)  # widths with few enough levels to choose among them by comparisons
GROUP = 64  # codes that share a scale there; ours are all the same


class Rows:
    """Rows of `bits` bits that lie segment behind segment, a segment being one KV head and frequency.

    `segment` [rows]: of each row, ascending; `codes`: which rows of the width these are. Queries and sums have `slots`
    rows, of which `places` [rows] are in use. The codes of n blocks come as `pack_rows` has them; those of a trellis
    with the bits of their labels, higher and lower, first packed as units of one bit and then those of the rest.
    """

    def __init__(self, xp, bits: int, levels: mx.array, segment: np.ndarray, segments: int, codes: slice):
        self.xp, self.bits, self.segments, self.codes = xp, bits, segments, codes
        self.slots, self.places = len(segment), np.arange(len(segment))
        self.coupled = len(levels) > 2**bits
        self.levels, self.even = levels, not self.coupled and has_even_levels(levels)
        self.step, self.first = levels[1] - levels[0], levels[0]
        if self.coupled:
            middle = (len(levels) - 1) / 2
            self._curve = [mx.array(x, mx.float32) for x in (middle, *curve(np.array(levels)))]
        self._selected = on_gpu() and not self.even and not self.coupled and bits in SELECTED
        self._made: dict = {}

    def decode(self, packed: tuple, n: int, dtype: mx.Dtype) -> mx.array:
        """Coefficients [B, rows, n] in standard deviations."""
        if self.coupled:
            return self._on_curve(packed, n).astype(dtype)
        (units, rest), left, parts = packed, n % UNIT, []
        if self._selected and not left:
            levels = self._once(dtype, lambda: [mx.array(x, dtype) for x in self.levels.tolist()])
            return _select(self.bits)(units[:, self.codes], *levels).reshape(len(units), -1, n)
        if n >= UNIT:
            parts.append(_unpack(self.xp, self.bits)(units[:, self.codes]))
        if left:
            parts.append(unpack_rest(self.xp, rest, self.bits, units.shape[1], left)[:, self.codes])
        codes = mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
        if self.even:
            return _spread(codes, self.step, self.first).astype(dtype)
        return dequantize(self.xp, codes, self.levels.astype(dtype))

    def _on_curve(self, packed: tuple, n: int) -> mx.array:
        """`decode` for codes of a trellis."""
        (units, rest, *labels), left, parts = packed, n % UNIT, []
        if on_gpu() and not left:
            of_rows = (x[:, self.codes] for x in (units, *labels))
            return _curve_of_units(self.bits)(*of_rows, *self._curve).reshape(len(units), -1, n)
        if n >= UNIT:
            codes = _unpack(self.xp, self.bits)(units[:, self.codes])
            bits = (_unpack(self.xp, 1)(x[:, self.codes, :, None]) for x in labels[:2])
            parts.append(_indices(*(x.view(mx.uint64) for x in (codes, *bits))).view(mx.uint8))
        if left:
            codes = unpack_rest(self.xp, rest, self.bits, units.shape[1], left)[:, self.codes]
            high, low = (x[:, self.codes] for x in labels[2:])
            parts.append(codes >> 1 << 2 | high << 1 | low)
        return _evaluate(mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0], *self._curve)

    def dtype(self, n: int, decoded: mx.Dtype) -> mx.Dtype:
        """What queries and weights of n blocks come in: `decoded`, or float32 where nothing is decoded."""
        return decoded

    def tables(self) -> list[mx.array]:
        """Every array that all sequences share."""
        own = [self.step, self.first, *(self._curve if self.coupled else ())]
        return [*own, *(x for made in self._made.values() for x in made)]

    def _once(self, key, make: Callable) -> Sequence[mx.array]:
        """What `make` gives, made at the first call with `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class RaggedRows(Rows):
    """Any number of rows in every segment, decoded."""

    def __init__(self, xp, bits, levels, segment, segments, codes):
        super().__init__(xp, bits, levels, segment, segments, codes)
        self._segment = segment

    def scores(self, packed: tuple, n: int, queries):
        """Sums over the key rows of every segment [B, segments, M, n]; `queries` [B, slots, M], whose dtype they have."""
        batch, slots, m = queries.shape
        y = self.decode(packed, n, queries.dtype).reshape(batch * slots, n)
        bounds, _, _ = self._once(batch, lambda: self._indices(batch))
        sums = mx.segmented_mm(queries.reshape(batch * slots, m).T, y, bounds)
        return sums.reshape(batch, self.segments, m, n)

    def pooled(self, packed: tuple, n: int, weights):
        """Sums over time of every value row [B, slots, M]; `weights` [B, segments, M, n], whose dtype they have."""
        batch, _, m, _ = weights.shape
        y = self.decode(packed, n, weights.dtype).reshape(-1, n, 1)
        _, segment, row = self._once(batch, lambda: self._indices(batch))
        return mx.gather_mm(weights.reshape(-1, m, n), y, segment, row).reshape(batch, -1, m)

    def _indices(self, batch: int) -> tuple:
        """First and last row of every segment, [B * segments, 2]; the segment of every row, and all rows, [B * rows]."""
        first = np.arange(batch)[:, None]
        bounds = np.searchsorted(self._segment, np.arange(self.segments + 1)) + first * self.slots
        bounds = np.stack([bounds[:, :-1], bounds[:, 1:]], axis=-1).reshape(-1, 2)
        segment = (self._segment + first * self.segments).reshape(-1)
        return tuple(mx.array(x.astype(np.uint32)) for x in (bounds, segment, np.arange(len(segment))))


class PaddedRows(Rows):
    """As many slots in every segment; those without a row have other codes and do not count.

    `multiplied`: codes go into the product as they are, without being decoded.
    """

    def __init__(self, xp, bits, levels, segment, segments, codes, multiplied: bool):
        super().__init__(xp, bits, levels, segment, segments, codes)
        counts = np.bincount(segment, minlength=segments)
        most, self._multiplied = int(counts.max()), multiplied
        self.places = segment * most + np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment]
        self._row = None
        if self.slots != most * segments:
            self.slots, row = most * segments, np.zeros(most * segments, np.int32)
            row[self.places] = np.arange(len(segment))
            self._row = mx.array(row)

    def scores(self, packed: tuple, n: int, queries):
        """As `RaggedRows.scores`."""
        batch, _, m = queries.shape
        return self._product(queries.reshape(batch, self.segments, -1, m).swapaxes(2, 3), packed, n, False)

    def pooled(self, packed: tuple, n: int, weights):
        """As `RaggedRows.pooled`."""
        batch, _, m, _ = weights.shape
        return self._product(weights, packed, n, True).swapaxes(2, 3).reshape(batch, -1, m)

    def _product(self, x, packed: tuple, n: int, transpose: bool):
        """`x` [B, segments, M, ...] times the rows [B, segments, slots / segments, n], or times these transposed."""
        lead = (*x.shape[:2], self.slots // self.segments)
        if not self._multiplies(n):
            y = self._padded(self.decode(packed, n, x.dtype)).reshape(*lead, n)
            return x @ (y.swapaxes(2, 3) if transpose else y)
        codes = self._padded(packed[0][:, self.codes]).reshape(*lead, -1).view(mx.uint32)
        shape = lead[2], n // GROUP  # the same for all segments, as the kernels want the last two dimensions contiguous
        scales = self._once(n, lambda: [mx.full(shape, self.step), mx.full(shape, self.first)])
        scales = (mx.broadcast_to(s, (*lead[:2], *shape)) for s in scales)
        return mx.quantized_matmul(x, codes, *scales, transpose, GROUP, self.bits)

    def dtype(self, n: int, decoded: mx.Dtype) -> mx.Dtype:
        return mx.float32 if self._multiplies(n) else decoded

    def _multiplies(self, n: int) -> bool:
        return self._multiplied and n % GROUP == 0

    def _padded(self, rows):
        return rows if self._row is None else mx.take(rows, self._row, axis=1)


def unpack_rest(xp, rest, bits: int, rows: int, left: int) -> mx.array:
    """Codes [B, rows, left] that wait for their unit."""
    return unpack(xp, rest, bits, rows * left).reshape(len(rest), rows, left)


def make_rows(xp, bits: int, levels: mx.array, segment: np.ndarray, segments: int, codes: slice) -> Rows:
    """The kind of rows that is fastest where MLX runs."""
    arguments = xp, bits, levels, segment, segments, codes
    # in the CPU build products with codes are slower than decoding; on Metal they move a fraction of the bytes
    multiplied = on_gpu() and bits in MULTIPLIED and len(levels) == 2**bits and has_even_levels(levels)
    if multiplied or len(set(np.bincount(segment, minlength=segments))) == 1:
        return PaddedRows(*arguments, multiplied)
    return RaggedRows(*arguments)


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return mx.default_device() != mx.Device(mx.cpu)


def has_even_levels(levels: mx.array) -> bool:
    """Whether a level is its code times a step, but for an offset."""
    steps = np.diff(np.array(levels))
    return bool(np.ptp(steps) <= 1e-6 * steps[0])


@cache
def path_bits(bits: int):
    """Makes the function `packing.lowest_bits` of units of `bits` bits, in one operation."""
    return mx.compile(partial(lowest_bits, bits=bits))


@cache
def _unpack(xp, bits: int):
    return mx.compile(lambda units: unpack(xp, units, bits, units.shape[2] * UNIT))


@mx.compile  # into one operation
def _indices(codes, high, low):
    """Indices of levels from codes and their label bits, eight bytes at a time."""
    one = mx.array(1, mx.uint64)
    return (codes & mx.array(np.uint64(0xFEFEFEFEFEFEFEFE))) << one | high << one | low


@mx.compile
def _evaluate(index, middle, a, b, c):
    t = index.astype(mx.float32) - middle
    u = t * t
    return t * (a + u * (b + u * c))


@mx.compile
def _spread(codes, step, first):
    return codes.astype(mx.float32) * step + first


@cache
def _select(bits: int):
    """Makes a function of whole units [..., bits] and all levels: [..., 2, 2, 2], one operation on a GPU."""

    def chosen(codes, levels: list):
        if len(levels) == 1:
            return levels[0]
        half = len(levels) // 2
        return mx.where((codes & half) > 0, chosen(codes, levels[half:]), chosen(codes, levels[:half]))

    return mx.compile(lambda units, *levels: chosen(_fields(units, bits), levels))


@cache
def _curve_of_units(bits: int):
    """Makes a function of whole units [..., bits], their label bits and a curve: [..., 2, 2, 2], one operation on a GPU."""

    def evaluate(units, high, low, *curve):
        high, low = (_fields(x[..., None], 1) for x in (high, low))
        return _evaluate(_fields(units, bits) >> 1 << 2 | high << 1 | low, *curve)

    return mx.compile(evaluate)


def _fields(units, bits: int) -> mx.array:
    """Codes [..., 2, 2, 2] of units [..., bits], out of operations that `mx.compile` makes one."""
    parts, start = [], 0
    for width, shift in planes(bits):
        # the first dimensions count the bytes of the plane, the others the fields of a byte
        dims = width.bit_length() - 1
        plane = units[..., start : start + width].reshape(*units.shape[:-1], *dims * [2], *(3 - dims) * [1])
        fields = mx.array(np.arange(0, 8, width, dtype=np.uint8).reshape((3 - dims) * [2]))
        parts.append(((plane >> fields) & (2**width - 1)) << shift)
        start += width
    return reduce(or_, parts)

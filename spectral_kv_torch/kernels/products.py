"""Products of packed rows of coefficients with queries and with weights of tokens, by stock operations on a CPU.

Codes of one and two bits, whose levels are evenly spaced, are multiplied as integers of 8 bits: a masked byte holds its
field i as `code * 2**(bits * i)`, and the factor is taken out of the sums. Queries and weights are split into digits of 8
bits, which makes the sums as good as those of float32. Other codes are looked up and multiplied in float32.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import torch

from spectral_kv_core.codecs.spectral_reader import SpectralReader
from spectral_kv_core.quantization.packing import planes

from .tiles import Tile

QUERY_DIGITS, WEIGHT_DIGITS = 3, 4
HALF_DIGITS = 2  # of a query in bfloat16: the third stands for less than its rounding
WEIGHT_RANGE = 2**28  # of a weight of 1; a coefficient of a block of them is at most 4
FIELDS = {1: (2, 4), 2: (4,)}  # by width: the fields of a byte, as the order of blocks has them
PER_LOOK_UP = {1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 8: 1}  # codes of a width; a table has at most 4,096 entries
ELEMENT = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}  # of as many float32, which is what a copy takes


class Rows:
    """Rows of one width, of keys or of values; `number`: of the width in a chunk, `first`: the codec's first row of the side.

    `component` [rows]: KV head and component of a row as one number; `scale` [rows]: its deviation. `heads`: the rows of
    every KV head as a slice, and in it (frequency, first, last) for every frequency that has any.
    """

    def __init__(self, codec: SpectralReader, number: int, first: int):
        heads, block, rank = codec.kv_heads, codec.block, codec.rank
        places = codec.numbers[number].numpy() - first
        start, stop = np.searchsorted(places, (0, heads * block * rank)).tolist()
        places = places[start:stop]
        self.xp, self.number, self.bits, self.levels = codec.xp, number, codec.bits[number], codec.levels[number]
        self.codes, self.block, self.count = slice(start, stop), block, stop - start
        self.scale = codec.scale[number][start:stop, 0]
        self.component = torch.from_numpy(places // (block * rank) * rank + places % rank)
        bounds = np.searchsorted(places // rank, np.arange(heads * block + 1)).tolist()
        self.heads = []
        for edges in (bounds[h * block : (h + 1) * block + 1] for h in range(heads)):
            parts = [(f, a - edges[0], b - edges[0]) for f, (a, b) in enumerate(pairwise(edges)) if a < b]
            self.heads.append((slice(edges[0], edges[-1]), parts))
        self.sizes = [[b - a for _, a, b in parts] for _, parts in self.heads]
        slots = np.full(
            heads * block * rank, self.count, np.int32
        )  # the last is that of rows of other widths, and zero
        slots[places] = np.arange(self.count)
        self.slots = None if self.count == len(slots) else torch.from_numpy(slots)
        self.dense = torch.zeros(heads * block * rank)  # deviations, zero where a coefficient has another width
        self.dense[torch.from_numpy(places)] = self.scale
        self.dense = self.dense.reshape(heads, block, rank)

    def units(self, tile: Tile, sequence: int, head: int) -> torch.Tensor:
        """Packed codes [rows, units, bits] of one KV head."""
        return tile.units[self.number][sequence, self.codes][self.heads[head][0]]

    def is_empty(self, head: int) -> bool:
        """Whether a KV head has no such row."""
        return not self.sizes[head]

    def of_rows(self, latent) -> torch.Tensor:
        """`latent` [B, H, M, R] as every row has it, in standard deviations: [B, M, rows]."""
        latent = latent.transpose(1, 2).reshape(latent.shape[0], latent.shape[2], -1)
        rows = torch.empty(*latent.shape[:2], self.count)
        for x, out in zip(latent.flatten(0, 1), rows.flatten(0, 1)):  # fast in one dimension only
            torch.index_select(x, 0, self.component, out=out)
        return rows.mul_(self.scale)

    def parts(self, x) -> list[list]:
        """`x` [B, ..., rows]: by sequence and KV head, the parts of every frequency."""
        flat = [n for sizes in self.sizes for n in sizes]
        made = []
        for of_sequence in x:
            parts = iter(divided(of_sequence, flat, -1))
            made.append([[next(parts) for _ in sizes] for sizes in self.sizes])
        return made

    def sum_of_blocks(self, sums) -> torch.Tensor:
        """`sums` [B, rows, M] in deviations, over all frequencies of a component: [B, H, M, R]."""
        batch, _, m = sums.shape
        sums = sums * self.scale[:, None]
        if self.slots is not None:
            sums = torch.cat([sums, sums.new_zeros(batch, 1, m)], dim=1).index_select(1, self.slots)
        heads, block, rank = self.dense.shape
        return sums.reshape(batch, heads, block, rank, m).sum(2).transpose(2, 3)

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return [self.component, self.scale, self.dense, *([] if self.slots is None else [self.slots])]


class IntegerRows(Rows):
    """Codes that are multiplied as they are."""

    def __init__(self, codec: SpectralReader, number: int, first: int):
        super().__init__(codec, number, first)
        self.fields, self.time = FIELDS[self.bits], codec.time.T.contiguous()
        step, lowest = float(self.levels[1] - self.levels[0]), float(self.levels[0])
        powers = 2.0 ** -(self.bits * torch.arange(8 // self.bits))
        # a level is step * code + lowest; the highest field of a byte is a signed number, half its range too low
        offsets = torch.full_like(powers, lowest)
        offsets[-1] += step * 2 ** (self.bits - 1)
        self.step, self.powers, self.offsets = step, powers.view(*self.fields, 1), offsets.view(*self.fields, 1)
        self.highest = self.dense.amax(1)[:, None]  # [H, 1, R]
        self.weight_digits = torch.tensor([256.0**i for i in range(WEIGHT_DIGITS)]) * (step / WEIGHT_RANGE)
        self.in_time = self.dense.transpose(1, 2) @ codec.time  # [H, R, block]

    def queries(self, latent, digits: int) -> tuple:
        """What `add_scores` needs of the latent queries [B, H, M, R]: their digits, and what is done to the sums."""
        batch, _, m, _ = latent.shape
        bound = (latent.abs() * self.highest).amax(-1, keepdim=True).clamp_(min=1e-30)  # guards a query of zero
        span = 127 * 256 ** (digits - 1)  # the highest digit takes a carry
        rows = with_carry(self.of_rows(latent * (span / bound)).round_().int(), digits)
        split = torch.empty(batch, m, digits, self.count, dtype=torch.int8)
        for i in range(digits):
            split[:, :, i] = rows >> (8 * i)
        one = (1,) * (len(self.fields) + 1)
        factors = (bound * (self.step / span)).view(*bound.shape, *one) * self.powers
        constants = latent @ self.in_time
        return self.parts(split.flatten(1, 2)), factors, constants.view(*constants.shape, *one) * self.offsets

    def add_scores(self, out, tile: Tile, sequence: int, head: int, queries: tuple, fresh: bool) -> None:
        """Scores of one KV head, into or onto `out` [M, block, N]."""
        (m, block, n), (queries, factors, constants) = out.shape, queries
        digits = len(queries[sequence][head][0]) // m
        parts = self.heads[head][1]
        codes = divided(self.masked(self.units(tile, sequence, head)), self.sizes[head])
        sums = torch.empty(block, m * digits, n, dtype=torch.int32)
        if len(parts) < block:
            sums.zero_()
        by_frequency = sums.unbind()
        for (f, _, _), q, y in zip(parts, queries[sequence][head], codes):
            torch._int_mm(q, y, out=by_frequency[f])
        low, middle, *high = sums.view(block, m, digits, n).unbind(2)
        x = torch.add(low, middle, alpha=256).float()  # of two digits: no overflow
        if high:
            x.add_(high[0], alpha=65536)
        x = torch.mm(self.time, x.view(block, -1)).view(block, m, *self.fields, -1).transpose(0, 1)
        x.mul_(factors[sequence, head])
        if fresh:
            torch.add(x, constants[sequence, head], out=in_order(out, self.fields))
        else:
            in_order(out, self.fields).add_(x.add_(constants[sequence, head]))

    def sums(self, batch: int, m: int) -> tuple:
        """What `add_pooled` writes to: sums of codes, and the weights of every frequency times the offsets of levels."""
        columns = (
            m if m < 3 else -(-m // 4) * 4
        ) * WEIGHT_DIGITS  # of which the product likes 4, 8 and multiples of 16
        heads, block, _ = self.dense.shape
        return torch.empty(batch, self.count, columns, dtype=torch.int32), torch.zeros(batch, heads, m, block)

    def add_pooled(self, sums: tuple, tile: Tile, sequence: int, head: int, weights) -> None:
        """Sums over the tokens of one KV head; `weights` [M, block, N] by frequency, times `WEIGHT_RANGE`."""
        (of_codes, of_weights), (m, block, n) = sums, weights.shape
        rows, parts = self.heads[head]
        weights = in_order(weights, self.fields)
        of_weights[sequence, head] = (weights.sum(-1, keepdim=True) * self.offsets).flatten(2).sum(-1)
        columns = of_codes.shape[-1] // WEIGHT_DIGITS  # more than query rows: what the others hold is not looked at
        wide = torch.empty(block, *self.fields, n * self.bits // 8, columns, dtype=torch.int32)
        wide[..., :m] = (weights * self.powers).movedim(0, -1)
        digits = with_carry(wide, WEIGHT_DIGITS).view(torch.int8).view(block, n, -1).unbind()
        codes = divided(self.masked(self.units(tile, sequence, head)), self.sizes[head])
        for (f, _, _), y, out in zip(parts, codes, divided(of_codes[sequence, rows], self.sizes[head])):
            torch._int_mm(y, digits[f], out=out)

    def pooled(self, sums: tuple) -> torch.Tensor:
        """Latents [B, H, M, R] of the sums over all tokens."""
        of_codes, of_weights = sums
        m = of_weights.shape[2]
        in_steps = of_codes.view(*of_codes.shape[:2], -1, WEIGHT_DIGITS)[:, :, :m].float() @ self.weight_digits
        return self.sum_of_blocks(in_steps) + (of_weights / WEIGHT_RANGE) @ self.dense

    def masked(self, units) -> torch.Tensor:
        """The fields of packed codes [rows, units, bits], one behind the other: [rows, N] int8."""
        packed = units.reshape(len(units), -1)
        wide = next(
            d for d in (torch.int64, torch.int32, torch.int16, torch.uint8) if packed.shape[1] % d.itemsize == 0
        )
        packed = packed.view(wide)
        fields = 8 // self.bits
        out = torch.empty(len(packed), fields, packed.shape[1], dtype=wide)
        for i in range(fields):
            if i == fields - 1:
                packed = packed ^ _bytes_of(0x80, wide)
            torch.bitwise_and(packed, _bytes_of((2**self.bits - 1) << (self.bits * i), wide), out=out[:, i])
        return out.view(torch.int8).view(len(packed), -1)

    def tables(self) -> list[torch.Tensor]:
        own = [self.time, self.powers, self.offsets, self.highest, self.weight_digits, self.in_time]
        return super().tables() + own


class DecodedRows:
    """Codes of all other widths, which are looked up."""

    def __init__(self, codec: SpectralReader, numbers: list[int], first: int):
        self.widths = [LookedUpRows(codec, number, first) for number in numbers]
        self.time = codec.time.T.contiguous()

    def is_empty(self, head: int) -> bool:
        """Whether a KV head has no such row."""
        return all(rows.is_empty(head) for rows in self.widths)

    def queries(self, latent, digits: int) -> list:
        """What `add_scores` needs of the latent queries [B, H, M, R]."""
        return [rows.parts(rows.of_rows(latent)) for rows in self.widths]

    def add_scores(self, out, tile: Tile, sequence: int, head: int, queries: list, fresh: bool) -> None:
        """As `IntegerRows.add_scores`."""
        m, block, n = out.shape
        sums = torch.zeros(block, m, n)
        by_frequency = sums.unbind()
        for rows, of_rows in zip(self.widths, queries):
            for (f, _, _), q, y in zip(
                rows.heads[head][1], of_rows[sequence][head], rows.decoded(tile, sequence, head)
            ):
                by_frequency[f].addmm_(q, y)
        x = torch.mm(self.time, sums.view(block, -1)).view(block, m, n // 4, 4).transpose(0, 1)
        target = in_order(out, ())
        (target.copy_ if fresh else target.add_)(x)

    def sums(self, batch: int, m: int) -> list[torch.Tensor]:
        """What `add_pooled` writes to."""
        return [torch.empty(batch, rows.count, m) for rows in self.widths]

    def add_pooled(self, sums: list, tile: Tile, sequence: int, head: int, weights) -> None:
        """As `IntegerRows.add_pooled`."""
        m, block, n = weights.shape
        weights = in_order(weights, ()).movedim(0, -1).reshape(block, n, m).unbind()
        for rows, of_rows in zip(self.widths, sums):
            part, parts = rows.heads[head]
            outputs = of_rows[sequence, part].split(rows.sizes[head])
            for (f, _, _), y, out in zip(parts, rows.decoded(tile, sequence, head), outputs):
                torch.mm(y, weights[f], out=out)

    def pooled(self, sums: list) -> torch.Tensor:
        """Latents [B, H, M, R] of the sums over all tokens."""
        return sum(rows.sum_of_blocks(of_rows) for rows, of_rows in zip(self.widths, sums)) / WEIGHT_RANGE

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return [self.time, *(x for rows in self.widths for x in rows.tables())]


class LookedUpRows(Rows):
    """Codes of one width, several of which are looked up at once."""

    def __init__(self, codec: SpectralReader, number: int, first: int):
        super().__init__(codec, number, first)
        self.several = PER_LOOK_UP[self.bits]
        index, codes = np.arange(2 ** (self.bits * self.several)), []
        for i in range(self.several):
            code, low = 0, 0
            for width, shift in planes(self.bits):
                code = code | (index >> (low + i * width) & (2**width - 1)) << shift
                low += width * self.several
            codes.append(code)
        table = self.levels[torch.from_numpy(np.stack(codes, axis=-1))]
        self.table = table.view(ELEMENT[self.several]).view(-1)

    def decoded(self, tile: Tile, sequence: int, head: int) -> tuple[torch.Tensor, ...]:
        """Coefficients [rows, N] of every frequency, in standard deviations and in the order of tokens."""
        if self.is_empty(head):
            return ()
        units = self.units(tile, sequence, head)
        index, start, low = None, 0, 0
        for width, _ in planes(self.bits):
            fields = units[..., start : start + width]
            if width * self.several < 8:
                fields = self.xp.split_bytes(fields, width * self.several)
            fields = fields.reshape(len(units), -1).int()
            index = fields if index is None else index.add_(fields, alpha=2**low)
            start, low = start + width, low + width * self.several
        found = self.table.index_select(0, index.view(-1))
        found = torch.view_as_real(found) if found.is_complex() else found
        return found.view(torch.float32).view(len(units), -1).split(self.sizes[head])

    def tables(self) -> list[torch.Tensor]:
        return [*super().tables(), self.table]


def make_rows(codec: SpectralReader, first: int) -> list[IntegerRows | DecodedRows]:
    """All rows of the side that begins with row `first`; those that are in order already come first."""
    integer, others = [], []
    for number, (bits, levels) in enumerate(zip(codec.bits, codec.levels)):
        steps = levels[1:] - levels[:-1]
        even = bits in FIELDS and bool((steps - steps[0]).abs().max() <= 1e-6 * steps[0])
        (integer if even and has_integer_products() else others).append(number)
    made = [IntegerRows(codec, number, first) for number in reversed(integer)]
    decoded = DecodedRows(codec, others, first)
    return [rows for rows in (*made, decoded) if not all(map(rows.is_empty, range(codec.kv_heads)))]


@cache
def has_integer_products() -> bool:
    """Whether torch multiplies 8-bit integers here, without the saturation that older processors have."""
    try:
        a, b = (torch.full(shape, x, dtype=torch.int8) for shape, x in (((3, 64), 127), ((64, 8), -128)))
        return bool((torch._int_mm(a, b) == -64 * 127 * 128).all())
    except (AttributeError, RuntimeError):  # not part of torch's public interface
        return False


def divided(x, sizes: list[int], dim: int = 0) -> tuple[torch.Tensor, ...]:
    """`x` in parts of `sizes` along `dim`."""
    if len(set(sizes)) == 1:  # a fraction of what `split` takes
        return x.unflatten(dim, (len(sizes), sizes[0])).unbind(dim if dim >= 0 else dim - 1)
    return x.split(sizes, dim=dim)


def in_order(x, fields: tuple):
    """View of `x` [..., N] with blocks as the `fields` of bytes, [..., *fields, bytes], or as they came, [..., N / 4, 4]."""
    if fields == (4,):
        return x.unflatten(-1, (4, -1))
    if fields == (2, 4):
        return x.unflatten(-1, (4, -1, 2)).movedim(-1, -3)
    return x.unflatten(-1, (4, -1)).transpose(-1, -2)


def with_carry(x, digits: int) -> torch.Tensor:
    """Integers, changed in place, so that each of their `digits` low bytes is a signed digit to the base 256."""
    carry = sum(0x80 << (8 * i) for i in range(digits - 1))
    return x.add_(carry).bitwise_xor_(carry)


@cache
def _bytes_of(value: int, dtype: torch.dtype) -> torch.Tensor:
    """A number of `dtype` with `value` in every byte."""
    return torch.full((dtype.itemsize,), value, dtype=torch.uint8).view(dtype)[0]

"""The decode step over latents with one set of operations for several chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, reduce
from operator import add
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from spectral_kv_core.attention import causal_rows, group_queries
from spectral_kv_core.cache import CHUNK_TOKENS
from spectral_kv_core.codec import Chunk, SpectralCodec
from spectral_kv_core.quantizer import UNIT, dequantize, unpack, unpack_rows

TILE_CHUNKS = 8  # one width of one side of so many chunks is decoded at a time


class Rows:
    """The rows of one side, keys or values, that have the same number of bits.

    `segment` [rows]: KV head and frequency of each, ascending; `codes`: which of the width's rows these are.
    """

    def __init__(self, xp, bits: int, levels, segment: np.ndarray, segments: int, codes: slice):
        self.xp, self.bits, self.levels, self.codes = xp, bits, levels, codes
        self.count, self._segment, self._segments = len(segment), segment, segments
        steps = np.diff(np.array(levels))
        self._even = np.ptp(steps) <= 1e-6 * steps[0]
        self._step, self._first = mx.array(steps[0]), levels[0]
        self._indices = cache(self._make_indices)

    def scores(self, packed: tuple, n: int, queries):
        """Sums over the key rows of every segment [B * segments, M, n]; `queries` [B, rows, M]."""
        batch, _, m = queries.shape
        sums, _ = self._indices(batch)
        return mx.segmented_mm(queries.reshape(-1, m).T, self._decoded(packed, n), sums)

    def pooled(self, packed: tuple, n: int, weights):
        """Sums over time of every value row [B, rows, M]; `weights` [B, segments, M, n]."""
        batch, _, m, _ = weights.shape
        _, rows = self._indices(batch)
        sums = mx.gather_mm(weights.reshape(-1, m, n), self._decoded(packed, n)[:, :, None], lhs_indices=rows)
        return sums.reshape(batch, -1, m)

    def _decoded(self, packed: tuple, n: int):
        """Coefficients [B * rows, n] in standard deviations."""
        if n % UNIT:
            codes = unpack_rows(self.xp, packed, self.bits, n)[:, self.codes]
        else:
            codes = _unpack(self.xp, self.bits)(packed[0][:, self.codes])
        y = _spread(codes, self._step, self._first) if self._even else dequantize(self.xp, codes, self.levels)
        return y.reshape(-1, n)

    def _make_indices(self, batch: int) -> tuple:
        starts = np.searchsorted(self._segment, np.arange(self._segments + 1))
        starts = starts + np.arange(batch)[:, None] * self.count
        segment = self._segment + np.arange(batch)[:, None] * self._segments
        sums = np.stack([starts[:, :-1], starts[:, 1:]], axis=-1).reshape(-1, 2)
        return mx.array(sums.astype(np.uint32)), mx.array(segment.reshape(-1).astype(np.uint32))


class LatentStep:
    """`attention.decode_step` for one layer's codec.

    The scores of all tiles of the history come before one softmax over them and the exact tokens: no partials are merged.
    In a tile the rows of one width are decoded and multiplied as ragged as they are.
    """

    def __init__(self, codec: SpectralCodec):
        self.codec, self._tiles = codec, WeakKeyDictionary()
        h, rank = codec.kv_heads, codec.rank
        segments = h * codec.block
        self.keys, self.values, components, scales, value_rows = [], [], [], ([], []), []
        for bits, levels, rows, scale in zip(codec.bits, codec.levels, map(np.array, codec.rows), codec.scale):
            segment, split = rows // rank, int(np.searchsorted(rows, segments * rank))
            self.keys.append(Rows(codec.xp, bits, levels, segment[:split], segments, slice(split)))
            self.values.append(Rows(codec.xp, bits, levels, segment[split:] - segments, segments, slice(split, None)))
            components.append(segment[:split] // codec.block * rank + rows[:split] % rank)
            value_rows.append(rows[split:] - segments * rank)
            scales[0].append(scale[:split])
            scales[1].append(scale[split:])
        # of a key row its component of the latent query, of a coefficient of values its row
        self._component = mx.array(np.concatenate(components or [[]]).astype(np.int32))
        value_rows = np.concatenate(value_rows or [[]]).astype(np.int32)
        row = np.full(segments * rank, len(value_rows), np.int32)
        row[value_rows] = np.arange(len(value_rows))
        self._row = mx.array(row)
        self._key_scale, self._value_scale = (mx.concatenate([*x, mx.zeros((1, 1))]) for x in scales)

    def __call__(self, chunks: list[Chunk], queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        codec, h = self.codec, self.codec.kv_heads
        rows = group_queries(queries, h).astype(mx.float32) * scale  # [B, H, M, D]
        keys, values = keys.astype(mx.float32), values.astype(mx.float32)
        tiles = self._joined(chunks)
        # q . mu, which all scores of latents lack, is taken from those of exact tokens: only differences matter
        exact = rows @ keys.swapaxes(2, 3) - rows @ codec.mean[:h].swapaxes(1, 2)
        mask = causal_rows(codec.xp, queries.shape[1] // h, queries.shape[2], keys.shape[2], like=queries)
        if mask is not None:
            exact = mx.where(mask, exact, -mx.inf)
        scores = [*self._scores(tiles, rows @ codec.basis[:h]), exact]
        p = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1)
        *parts, p_exact = mx.split(p, np.cumsum([tile.tokens for tile in tiles]).tolist(), axis=-1)
        share = 1 - p_exact.sum(-1, keepdims=True)
        out = self._pooled(tiles, parts) @ codec.basis[h:].swapaxes(1, 2) + share * codec.mean[h:] + p_exact @ values
        return out.reshape(queries.shape).astype(queries.dtype)

    def tables(self) -> list[mx.array]:
        """Every array that all sequences share."""
        return [self._component, self._row, self._key_scale, self._value_scale]

    def _scores(self, tiles: list[Chunk], latent) -> list:
        """Scores [B, H, M, T] of every tile but for q . mu, from latent queries [B, H, M, R]."""
        codec, (batch, h, m, rank) = self.codec, latent.shape
        latent = latent.swapaxes(2, 3).reshape(batch, h * rank, m)
        latent = mx.take(latent, self._component, axis=1) * self._key_scale[:-1]
        by_width = mx.split(latent, np.cumsum([rows.count for rows in self.keys])[:-1].tolist(), axis=1)
        scores = []
        for tile in tiles:
            n = tile.tokens // codec.block
            found = [r.scores(x, n, q) for r, x, q in zip(self.keys, _pairs(tile), by_width) if r.count]
            by_frequency = reduce(add, found, *([] if found else [mx.zeros((batch, h, codec.block, m, n))]))
            by_frequency = by_frequency.reshape(batch, h, codec.block, m, n).swapaxes(2, 3)
            scores.append((codec.time.T @ by_frequency).reshape(batch, h, m, -1))
        return scores

    def _pooled(self, tiles: list[Chunk], parts: list):
        """Latent values [B, H, M, R] summed with weights `parts` [B, H, M, T] of every tile."""
        codec, (batch, h, m, _) = self.codec, parts[0].shape
        sums = [mx.zeros((batch, rows.count, m)) for rows in self.values]
        for tile, p in zip(tiles, parts):
            n = tile.tokens // codec.block
            p = (codec.time @ p.reshape(batch, h, m, codec.block, n)).swapaxes(2, 3).reshape(batch, -1, m, n)
            sums = [s + r.pooled(x, n, p) if r.count else s for r, x, s in zip(self.values, _pairs(tile), sums)]
        sums = mx.concatenate([*sums, mx.zeros((batch, 1, m))], axis=1) * self._value_scale
        return mx.take(sums, self._row, axis=1).reshape(batch, h, codec.block, -1, m).sum(2).swapaxes(2, 3)

    def _joined(self, chunks: list[Chunk]) -> list[Chunk]:
        """`chunks` with full ones joined, `TILE_CHUNKS` at a time."""
        tiles = []
        for start in range(0, len(chunks), TILE_CHUNKS):
            group = chunks[start : start + TILE_CHUNKS]
            full = [chunk for chunk in group if chunk.tokens == CHUNK_TOKENS]
            tiles += [*self._joined_once(full), *group[len(full) :]]
        return tiles

    def _joined_once(self, chunks: list[Chunk]) -> list[Chunk]:
        """One chunk with the codes of full `chunks`, which become views of it: codes are held once."""
        if len(chunks) < 2:
            return chunks
        tile = self._tiles.get(chunks[-1])
        if tile is None:
            self._tiles.pop(chunks[-2], None)  # what was joined before the last chunk was full
            units = [mx.concatenate(parts, axis=2) for parts in zip(*(chunk.arrays[0::2] for chunk in chunks))]
            tile = replace(chunks[0], tokens=CHUNK_TOKENS * len(chunks), arrays=_flat(units, chunks[0].arrays[1::2]))
            self._tiles[chunks[-1]] = tile
            for chunk, *parts in zip(chunks, *(mx.split(x, len(chunks), axis=2) for x in units)):
                object.__setattr__(chunk, "arrays", _flat(parts, chunk.arrays[1::2]))  # the same codes, held elsewhere
        return [tile]


def decode_step(codec) -> LatentStep | None:
    """The faster step for `codec`; None where there is none, and the core's takes over."""
    fits = isinstance(codec, SpectralCodec) and codec.method.latent and codec.bits
    return LatentStep(codec) if fits else None


def _pairs(chunk: Chunk) -> list[tuple]:
    return list(zip(chunk.arrays[0::2], chunk.arrays[1::2]))


def _flat(units, rest) -> tuple:
    return tuple(array for pair in zip(units, rest) for array in pair)


@cache
def _unpack(xp, bits: int):
    return mx.compile(lambda units: unpack(xp, units, bits, units.shape[2] * UNIT))


@mx.compile
def _spread(codes, step, first):
    return codes.astype(mx.float32) * step + first

"""The decode step over latents with one set of operations for several chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from itertools import takewhile
from operator import add
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from spectral_kv_core.arrays.attention import causal_mask, group_queries
from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader
from spectral_kv_core.planning.budget import CHUNK_TOKENS
from spectral_kv_core.quantization.packing import UNIT, interleave

from .rows import Rows, make_rows, on_gpu, path_bits, unpack_rest

# chunks of which one width and side is decoded at a time: the processor's caches hold what few of them need, while every
# tile costs dispatches on a GPU
TILE_CHUNKS = {"cpu": 2, "gpu": 8}

WEIGHT = 2**10  # times the weights of tokens, which alone may be too small for float16; exact


class Side:
    """The coefficients of keys or of values, width by width, with `slots` in all; `first`: the codec's first of the side.

    `coefficient` [slots]: KV head, frequency and component of a slot as one number, -1 for an empty one. It stays, with
    `scale`, until `forget`.
    """

    def __init__(self, codec: SpectralReader, first: int):
        segments = codec.kv_heads * codec.block
        self.widths: list[tuple[int, Rows]] = []  # with the place of the codes in a chunk
        coefficient, scale = [], []
        for i, (bits, levels, rows, deviation) in enumerate(zip(codec.bits, codec.levels, codec.numbers, codec.scale)):
            rows = np.array(rows) - first
            start, stop = np.searchsorted(rows, (0, segments * codec.rank)).tolist()
            if start == stop:
                continue
            codes, rows = slice(start, stop), rows[start:stop]
            made = make_rows(codec.xp, bits, levels, rows // codec.rank, segments, codes)
            self.widths.append((2 * i, made))
            coefficient.append(np.full(made.slots, -1, np.int32))
            scale.append(np.zeros((made.slots, 1), np.float32))
            coefficient[-1][made.places], scale[-1][made.places] = rows, np.array(deviation[codes])
        self.coefficient = np.concatenate([np.zeros(0, np.int32), *coefficient])
        self.scale = np.concatenate([np.zeros((0, 1), np.float32), *scale])
        self.slots = [rows.slots for _, rows in self.widths]

    def forget(self) -> None:
        """Let go what tables were made of."""
        del self.coefficient, self.scale

    def of(self, chunk: Chunk, labels: list[tuple]) -> Iterator[tuple]:
        """The rows of every width, and their codes; `labels`: those of a trellis, width by width."""
        for i, rows in self.widths:
            yield rows, (*chunk.arrays[i : i + 2], *(labels[i // 2] if rows.coupled else ()))


class LatentStep:
    """`attention.decode_step` for one layer's codec.

    The scores of all tiles of the history come before one softmax over them and the exact tokens, so that no partials
    have to be merged. Deviations are in the queries and in the sums: no coefficient is scaled or moved once decoded.
    """

    def __init__(self, codec: SpectralReader):
        self.codec, self._tile_chunks = codec, TILE_CHUNKS["gpu" if on_gpu() else "cpu"]
        self._tiles: WeakKeyDictionary[Chunk, Chunk] = WeakKeyDictionary()  # by the last chunk of each
        h, block, rank = codec.kv_heads, codec.block, codec.rank
        self.keys, self.values = Side(codec, 0), Side(codec, h * block * rank)
        coefficient = np.maximum(self.keys.coefficient, 0)
        self._component = mx.array(coefficient // (block * rank) * rank + coefficient % rank)
        coefficient = self.values.coefficient
        slot = np.full(h * block * rank, len(coefficient), np.int32)
        slot[coefficient[coefficient >= 0]] = np.flatnonzero(coefficient >= 0)
        self._slot = mx.array(slot)
        # the last slot is that of all coefficients without bits, and zero
        self._value_scale = mx.array(np.append(self.values.scale / WEIGHT, np.zeros((1, 1), np.float32), axis=0))
        self._key_scale = mx.array(self.keys.scale)
        for side in (self.keys, self.values):
            side.forget()

    def __call__(self, chunks: list[Chunk], queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        codec, h = self.codec, self.codec.kv_heads
        query_rows = group_queries(queries, h).astype(mx.float32) * scale  # [B, H, M, D]
        keys, values = keys.astype(mx.float32), values.astype(mx.float32)
        dtype = mx.float16 if on_gpu() and queries.dtype != mx.float32 else mx.float32
        tiles = [(tile, self._labels(tile)) for tile in self._joined(chunks)]
        # q . mu, which the scores of all latents lack, is taken off the others: only differences matter
        exact = query_rows @ keys.swapaxes(2, 3) - query_rows @ codec.mean[:h].swapaxes(1, 2)
        mask = causal_mask(codec.xp, queries.shape[1] // h, queries.shape[2], keys.shape[2], like=queries)
        if mask is not None:
            exact = mx.where(mask, exact, -mx.inf)
        scores = [*self._scores(tiles, query_rows @ codec.basis[:h], dtype), exact]
        p = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1)
        *parts, p_exact = mx.split(p, np.cumsum([tile.tokens for tile, _ in tiles]).tolist(), axis=-1)
        share = 1 - p_exact.sum(-1, keepdims=True)
        pooled = self._pooled(tiles, parts, dtype) @ codec.basis[h:].swapaxes(1, 2)
        out = pooled + share * codec.mean[h:] + p_exact @ values
        return out.reshape(queries.shape).astype(queries.dtype)

    def tables(self) -> list[mx.array]:
        """Every array that all sequences share."""
        rows = [x for side in (self.keys, self.values) for _, rows in side.widths for x in rows.tables()]
        return [self._component, self._slot, self._key_scale, self._value_scale, *rows]

    def _labels(self, tile: Chunk) -> list[tuple]:
        """Label bits of the codes of a trellis, width by width, as `Rows` takes them."""
        codec, coupled = self.codec, self.codec.coupled
        if not coupled:
            return []
        widths = list(zip(codec.bits[:coupled], tile.arrays[0::2], tile.arrays[1::2]))
        left = tile.tokens // codec.block % UNIT
        whole = mx.concatenate([path_bits(bits)(units) for bits, units, _ in widths], axis=1)
        labels = [*codec.paths.labels(whole)]
        if left:
            rest = [unpack_rest(codec.xp, rest, bits, units.shape[1], left) & 1 for bits, units, rest in widths]
            labels += codec.paths.labels(mx.concatenate(rest, axis=1))
        bounds = np.cumsum([units.shape[1] for _, units, _ in widths])[:-1].tolist()
        return list(zip(*(mx.split(x, bounds, axis=1) for x in labels)))

    def _scores(self, tiles: list[tuple], latent, dtype: mx.Dtype) -> list:
        """Scores [B, H, M, T] of every tile but for q . mu, from latent queries [B, H, M, R]."""
        codec, (batch, h, m, rank) = self.codec, latent.shape
        latent = latent.swapaxes(2, 3).reshape(batch, h * rank, m)
        latent = mx.take(latent, self._component, axis=1) * self._key_scale
        bounds = np.cumsum(self.keys.slots)[:-1].tolist()
        queries = {d: mx.split(latent.astype(d), bounds, axis=1) for d in {mx.float32, dtype}}
        scores = []
        for tile, labels in tiles:
            n = tile.tokens // codec.block
            sums = [
                rows.scores(codes, n, queries[rows.dtype(n, dtype)][i])
                for i, (rows, codes) in enumerate(self.keys.of(tile, labels))
            ]
            total = _sum(*sums) if sums else mx.zeros((batch, h * codec.block, m, n))
            by_frequency = total.reshape(batch, h, codec.block, m, n).swapaxes(2, 3)
            scores.append((codec.time.T @ by_frequency).reshape(batch, h, m, -1))
        return scores

    def _pooled(self, tiles: list[tuple], parts: list, dtype: mx.Dtype):
        """Latent values [B, H, M, R] summed with the weights `parts` [B, H, M, T] of every tile."""
        codec, (batch, h, m, _), by_tile = self.codec, parts[0].shape, []
        for (tile, labels), p in zip(tiles, parts):
            n = tile.tokens // codec.block
            p = (WEIGHT * codec.time) @ p.reshape(batch, h, m, codec.block, n)
            p = p.swapaxes(2, 3).reshape(batch, -1, m, n)
            weights = {d: p.astype(d) for d in (mx.float32, dtype)}
            by_tile.append(
                [r.pooled(codes, n, weights[r.dtype(n, dtype)]) for r, codes in self.values.of(tile, labels)]
            )
        sums = [_sum(*of_width) for of_width in zip(*by_tile)]
        sums = mx.concatenate([*sums, mx.zeros((batch, 1, m))], axis=1) * self._value_scale
        pooled = mx.take(sums, self._slot, axis=1).reshape(batch, h, codec.block, -1, m)
        return pooled.sum(2).swapaxes(2, 3)

    def _joined(self, chunks: list[Chunk]) -> list[Chunk]:
        """`chunks` with full ones joined, as many as make a tile."""
        tiles, step = [], self._tile_chunks
        for start in range(0, len(chunks), step):
            group = chunks[start : start + step]
            full = list(takewhile(lambda chunk: chunk.tokens == CHUNK_TOKENS, group))
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
            tile = replace(
                chunks[0], tokens=CHUNK_TOKENS * len(chunks), arrays=interleave(zip(units, chunks[0].arrays[1::2]))
            )
            self._tiles[chunks[-1]] = tile
            for chunk, *parts in zip(chunks, *(mx.split(x, len(chunks), axis=2) for x in units)):
                chunk.move(interleave(zip(parts, chunk.arrays[1::2])))
        return [tile]


def decode_step(codec) -> LatentStep | None:
    """The faster step for `codec`; None where there is none, and the core's takes over."""
    fits = isinstance(codec, SpectralReader) and codec.method.latent and codec.bits
    runs = not on_gpu() or mx.metal.is_available()  # CUDA does not have every operation
    return LatentStep(codec) if fits and runs else None


@partial(mx.compile, shapeless=True)  # into one operation
def _sum(*arrays):
    return reduce(add, arrays)

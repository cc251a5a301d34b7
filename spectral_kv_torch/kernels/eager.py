"""The decode step over latents by stock operations: several chunks at a time, codes multiplied as they are."""

from __future__ import annotations

from itertools import product

import torch

from spectral_kv_core.arrays import attention
from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader

from .products import HALF_DIGITS, QUERY_DIGITS, WEIGHT_RANGE, make_rows
from .tiles import Tile, Tiles

TILE_CHUNKS = 16


class EagerStep:
    """`attention.decode_step` for one layer's codec.

    On a CPU by the products of `products`; on a card, or where codes are those of a trellis, by the core's operations.
    """

    def __init__(self, codec: SpectralReader):
        self._codec, self._tiles = codec, Tiles(codec, TILE_CHUNKS)
        self._keys = self._values = ()
        if multiplies(codec.time.device) and not codec.coupled:
            self._keys, self._values = (make_rows(codec, i * codec.kv_heads * codec.block * codec.rank) for i in (0, 1))
            self._weight_time = codec.time * WEIGHT_RANGE

    @torch.no_grad()
    def __call__(self, chunks: list[Chunk], queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        codec, h = self._codec, self._codec.kv_heads
        if not self._keys or not self._values:
            return attention.decode_step(codec.xp, codec, self._tiles.full(chunks), queries, keys, values, scale)
        rows = attention.group_queries(queries, h).float()
        mask = attention.causal_mask(codec.xp, queries.shape[1] // h, queries.shape[2], keys.shape[2], like=queries)
        latent = rows @ codec.basis[:h] * scale
        offset = rows @ codec.mean[:h].transpose(1, 2) * scale  # q . mu
        digits = HALF_DIGITS if queries.dtype == torch.bfloat16 else QUERY_DIGITS
        prepared = [side.queries(latent, digits) for side in self._keys]
        partials = [self._attend(tile, prepared, offset) for tile in self._tiles.of(chunks)]
        partials.append(attention.dense_partial(codec.xp, rows, keys.float(), values.float(), scale, mask))
        return attention.merge_partials(codec.xp, partials).reshape(queries.shape).to(queries.dtype)

    def _attend(self, tile: Tile, prepared: list, offset):
        """Partial softmax over a tile."""
        codec, (batch, h, m, _) = self._codec, offset.shape
        top, total = torch.empty(batch, h, m, 1), torch.empty(batch, h, m, 1)
        sums = [rows.sums(batch, m) for rows in self._values]
        p = torch.empty(m, codec.block, tile.blocks)  # of one head: what stays in the processor's caches
        flat = p.view(m, -1)
        for sequence, head in product(range(batch), range(h)):
            fresh = True
            for rows, queries in zip(self._keys, prepared):
                if not rows.is_empty(head):
                    rows.add_scores(p, tile, sequence, head, queries, fresh)
                    fresh = False
            if fresh:
                p.zero_()
            if len(tile.unused):
                p.index_fill_(-1, tile.unused, -torch.inf)
            torch.amax(flat, -1, keepdim=True, out=top[sequence, head])
            flat.sub_(top[sequence, head]).exp_()
            torch.sum(flat, -1, keepdim=True, out=total[sequence, head])
            weights = torch.matmul(self._weight_time, p)  # [M, block, N]
            for rows, of_rows in zip(self._values, sums):
                if not rows.is_empty(head):
                    rows.add_pooled(of_rows, tile, sequence, head, weights)
        pooled = sum(rows.pooled(of_rows) for rows, of_rows in zip(self._values, sums))
        output = pooled @ codec.basis[h:].transpose(1, 2) + total * codec.mean[h:]
        return output, top + offset, total

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        rows = [x for rows in (*self._keys, *self._values) for x in rows.tables()]
        return [*rows, *([self._weight_time] if rows else []), *self._tiles.tables()]


def multiplies(device: torch.device) -> bool:
    """Whether row by row is the faster way on `device`: one by one, so many products take longer than a card needs."""
    return device.type == "cpu"

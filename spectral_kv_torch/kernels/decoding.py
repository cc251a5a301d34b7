"""Sealed tokens decoded several chunks at a time, and attention over them where scores need keys as the model had them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention

from spectral_kv_core.arrays import attention
from spectral_kv_core.arrays.rope import rotate as core_rotate
from spectral_kv_core.arrays.transform import FREQUENCIES
from spectral_kv_core.codecs.chunk import Chunk, positions_of
from spectral_kv_core.codecs.spectral_reader import SpectralReader

from .checked import Checked, CheckedStep
from .device import runs_kernels
from .flash import partial_attention, supports_partial_attention
from .rope import rotate

TILE_CHUNKS = 16


class Decoder:
    """Keys and values of one layer's codec, in the dtype that is asked for: products of half precision for half precision."""

    def __init__(self, codec: SpectralReader, latents):
        self._codec, self._latents = codec, latents
        self._axes: dict[torch.dtype, torch.Tensor] = {}
        self._checked = Checked("decoding", self._decode, self._stock)

    def __call__(self, chunks: list[Chunk], dtype: torch.dtype) -> Iterator[tuple]:
        """Keys and values [B, H, T, D] of up to `TILE_CHUNKS` of `chunks` at a time."""
        like = self._codec.basis.new_empty(0, dtype=dtype)
        for start in range(0, len(chunks), TILE_CHUNKS):
            yield self._checked(like, self._codec.head_dim, chunks[start : start + TILE_CHUNKS], dtype)

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return [*self._latents.tables(), *self._axes.values()]

    def _decode(self, chunks: list[Chunk], dtype: torch.dtype) -> tuple:
        codec, z = self._codec, self._latents(chunks, dtype)
        if dtype not in self._axes:
            basis = codec.basis if codec.weight is None else codec.basis / codec.weight.transpose(1, 2)
            self._axes[dtype] = basis.transpose(1, 2).to(dtype)
        x = torch.matmul(z, self._axes[dtype]).add_(codec.mean)  # [B, G, T, Dg]
        batch, groups, tokens, _ = x.shape
        x = x.view(batch, groups, tokens, -1, codec.head_dim).transpose(2, 3)
        # a view where a side has one group, or a group one head
        x = x.reshape(batch, 2 * codec.kv_heads, tokens, codec.head_dim)
        keys, values = x[:, : codec.kv_heads], x[:, codec.kv_heads :]
        if codec.rope and codec.method.rope == "pre":
            start = self._start(chunks)
            turned = rotate(keys, codec.rope, start, dtype=dtype)
            keys = core_rotate(codec.xp, keys, codec.rope, start).to(dtype) if turned is None else turned
        return keys, values

    def _stock(self, chunks: list[Chunk], dtype: torch.dtype) -> tuple:
        sides = zip(*(self._codec.decode(chunk) for chunk in chunks))
        return tuple(torch.cat(side, dim=2).to(dtype) for side in sides)

    def _start(self, chunks: list[Chunk]):
        """Where the tokens of all `chunks` stand: see `Chunk.start`."""
        first = chunks[0].start
        follow = accumulate((chunk.tokens for chunk in chunks), initial=first if isinstance(first, int) else 0)
        if all(isinstance(chunk.start, int) and chunk.start == start for chunk, start in zip(chunks, follow)):
            return first
        places = [positions_of(self._codec.xp, chunk, self._codec.time) for chunk in chunks]
        batch, heads = (max(x.shape[axis] for x in places) for axis in (0, 1))
        return torch.cat([x.expand(batch, heads, -1) for x in places], dim=2)


def decoder(codec) -> Decoder | None:
    """What decodes several chunks of `codec` at once; None where each is decoded on its own."""
    if not isinstance(codec, SpectralReader) or codec.block != FREQUENCIES or not runs_kernels(codec.time.device):
        return None
    from .triton_latents import Latents

    return Decoder(codec, Latents(codec))


class DenseStep:
    """`attention.decode_step` over decoded tiles, by torch's own fused kernel where it has one for the dtype."""

    def __init__(self, codec: SpectralReader, decode: Decoder):
        self._codec, self._decode = codec, decode

    def __call__(self, chunks: list[Chunk], queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        xp, (batch, q_heads, length, dim), heads = self._codec.xp, queries.shape, keys.shape[1]
        if length == 1 and len(chunks) <= TILE_CHUNKS:
            ((held_keys, held_values),) = self._decode(chunks, queries.dtype)
            keys, values = torch.cat([held_keys, keys], dim=2), torch.cat([held_values, values], dim=2)
            rows = queries.reshape(batch, heads, -1, dim)
            return scaled_dot_product_attention(rows, keys, values, scale=scale).reshape(queries.shape)
        rows = attention.group_queries(queries, heads).float()

        def partials():
            for tile in self._decode(chunks, queries.dtype):
                if supports_partial_attention(queries):
                    yield partial_attention(queries, *tile, scale)
                else:
                    yield attention.dense_partial(xp, rows, *(x.float() for x in tile), scale)
            mask = attention.causal_mask(xp, q_heads // heads, length, keys.shape[2], like=queries)
            yield attention.dense_partial(xp, rows, keys.float(), values.float(), scale, mask)

        return attention.merge_partials(xp, partials()).reshape(queries.shape).to(queries.dtype)

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return []  # those of the codec's decoder


def dense_step(codec) -> CheckedStep | None:
    """The faster step of a codec whose keys have to be rebuilt; None where each chunk is decoded on its own."""
    if not codec.decoder:
        return None
    return CheckedStep(codec.xp, codec, DenseStep(codec, codec.decoder))

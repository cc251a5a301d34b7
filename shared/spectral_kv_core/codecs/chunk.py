"""Chunks: packed codes of sealed tokens, and what every codec does with them.

A chunk grows by whole blocks until it is full and is never quantized again. `xp` is `spectral_kv_core.arrays.ops` or a
backend's module of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UsageError

TILE_CHUNKS = 8  # chunks that are coded at a time where small operations cost more than memory


@dataclass(eq=False)
class Chunk:
    """Packed codes of `tokens` tokens; arrays have the batch first. Codes never change, but may `move`.

    start: position of the first token, those of the others follow; or, where tokens in between were dropped, the
    positions of all, int32 [B, H, tokens], with one head for all where the codec keeps heads together.
    """

    batch: int
    start: Any
    tokens: int
    arrays: tuple

    @property
    def held(self) -> tuple:
        """Every array, positions included."""
        return self.arrays if isinstance(self.start, int) else (*self.arrays, self.start)

    def move(self, arrays: tuple) -> None:
        """Hold the same codes in other arrays, such as views of what several chunks were joined to."""
        assert [x.shape for x in arrays] == [x.shape for x in self.arrays]
        self.arrays = arrays


def decoded(xp, codec, chunks: list[Chunk], dtype):
    """Keys and values [B, H, T, D] in `dtype` of `chunks`, in their order: of as many at a time as the array library has a
    faster way for, else one by one."""
    if codec.decoder:
        yield from codec.decoder(chunks, dtype)
        return
    for chunk in chunks:
        yield tuple(xp.astype(x, dtype) for x in codec.decode(chunk))


def split_by_chunk(start: int, stop: int, growing: int, full: int) -> list[tuple[int, int]]:
    """Tokens `start` to `stop` by the chunks of `full` tokens that they fill, the first of which has `growing` already."""
    spans = []
    while start < stop:
        end = min(start + full - growing, stop)
        spans.append((start, end))
        start, growing = end, 0
    return spans


def join_layers(xp, layers: Sequence[tuple]) -> tuple:
    """Keys and values [B, H, T, D] of the layers of a group -> [B, layers * H, T, D], as its codec takes them."""
    if len(layers) == 1:
        return layers[0]
    return tuple(xp.concat(list(side), axis=1) for side in zip(*layers))


def split_layers(keys, values, layers: int) -> list[tuple]:
    """Inverse of `join_layers`."""
    heads = keys.shape[1] // layers
    return [tuple(x[:, i * heads : (i + 1) * heads] for x in (keys, values)) for i in range(layers)]


def select_sequences(xp, chunk: Chunk, sequences) -> Chunk:
    """The sequences `sequences` of the batch (int32 array) of a chunk."""
    start = chunk.start if isinstance(chunk.start, int) else xp.take(chunk.start, sequences, axis=0)
    arrays = tuple(xp.take(a, sequences, axis=0) for a in chunk.arrays)
    return replace(chunk, batch=sequences.shape[0], start=start, arrays=arrays)


def positions_of(xp, chunk: Chunk, like):
    """Positions int32 [B, H, tokens] of a chunk, [1, 1, tokens] where nothing was dropped."""
    if not isinstance(chunk.start, int):
        return chunk.start
    return xp.asarray(np.arange(chunk.start, chunk.start + chunk.tokens, dtype=np.int32)[None, None], like=like)


def next_start(chunk: Chunk, positions):
    """Where tokens behind those of `chunk` stand: see `Chunk.start`."""
    return chunk.start + chunk.tokens if positions is None else positions


def extended(xp, chunk: Chunk, tokens: int, arrays: tuple, positions) -> Chunk:
    """`chunk` with `tokens` more, and now these `arrays`."""
    start = chunk.start
    if positions is not None:
        blank = xp.zeros((*positions.shape[:2], 1), dtype=xp.int32, like=positions)
        start = xp.concat([positions_of(xp, chunk, positions) + blank, positions], axis=2)
    return replace(chunk, start=start, tokens=chunk.tokens + tokens, arrays=arrays)


def kept_positions(xp, chunks: list[Chunk], blocks, block: int):
    """Positions int32 [B, H, m * block] of the tokens of `blocks` [B, H, m] of all `chunks`."""
    held = [positions_of(xp, chunk, blocks) for chunk in chunks]
    shape = max(x.shape[:2] for x in held)
    places = xp.concat([x + xp.zeros((*shape, 1), dtype=xp.int32, like=blocks) for x in held], axis=2)
    offsets = xp.asarray(np.arange(block, dtype=np.int32), like=blocks)
    index = (blocks[..., None] * block + offsets).reshape(*blocks.shape[:2], -1)
    return xp.take_along_axis(places, index, axis=2)


def check_finite(xp, x) -> None:
    if not xp.all_finite(x):
        raise UsageError("Expected finite keys and values, received NaN or infinity: check the weights and the dtype.")

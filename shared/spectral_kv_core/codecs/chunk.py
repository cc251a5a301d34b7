"""Chunks: packed codes of sealed tokens, and what every codec does with them.

A chunk grows by whole blocks until it is full and is never quantized again. `xp` is `spectral_kv_core.arrays.ops` or a
backend's module of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import numpy as np

from ..errors import UsageError

TILE_CHUNKS = 8  # chunks that are coded at a time where small operations cost more than memory


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What tokens that a profile does not know are coded about, in place of its mean and deviations.

    keys, values: offsets from the profile's means, float32 [B, H, 1, D], of keys as the codec has them. gain: of the
    deviations, float16 [B, G, R].
    """

    keys: Any
    values: Any
    gain: Any

    @property
    def arrays(self) -> tuple:
        return self.keys, self.values, self.gain


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
    adaptation: ClassVar[Any] = None  # of an `AdaptedChunk` alone

    @property
    def held(self) -> tuple:
        """Every array, positions included."""
        return self.arrays if isinstance(self.start, int) else (*self.arrays, self.start)

    @property
    def is_plain(self) -> bool:
        """Whether the chunk is codes of the codec alone, which kernels attend to; else it is decoded for every step."""
        return True

    def of_sequences(self, xp, sequences) -> Chunk:
        """The chunk of the sequences `sequences` of the batch (int32 array)."""
        start = self.start if isinstance(self.start, int) else xp.take(self.start, sequences, axis=0)
        arrays = tuple(xp.take(a, sequences, axis=0) for a in self.arrays)
        return replace(self, batch=sequences.shape[0], start=start, arrays=arrays)

    def move(self, arrays: tuple) -> None:
        """Hold the same codes in other arrays, such as views of what several chunks were joined to."""
        assert [x.shape for x in arrays] == [x.shape for x in self.arrays]
        self.arrays = arrays


@dataclass(eq=False)
class AdaptedChunk(Chunk):
    """Packed codes of tokens that lie outside what the profile knows, about an offset and with a gain of their own."""

    adaptation: Adaptation = None  # type: ignore[assignment,misc]  # a field here, none of plain chunks

    @property
    def held(self) -> tuple:
        return *super().held, *self.adaptation.arrays

    @property
    def is_plain(self) -> bool:
        return False

    def of_sequences(self, xp, sequences) -> Chunk:
        keys, values, gain = (xp.take(x, sequences, axis=0) for x in self.adaptation.arrays)
        codes = super().of_sequences(xp, sequences)
        return AdaptedChunk(codes.batch, codes.start, codes.tokens, codes.arrays, Adaptation(keys, values, gain))


@dataclass(eq=False)
class ExactChunk(Chunk):
    """Tokens whose `arrays` are their keys and values [B, H, tokens, D] as they came."""

    @property
    def is_plain(self) -> bool:
        return False


@dataclass(eq=False)
class CutChunk(Chunk):
    """The first tokens of `whole`, a block whose others were forgotten: its codes stay, so that nothing is coded twice."""

    whole: Chunk = None  # type: ignore[assignment]  # a field behind those without defaults

    @classmethod
    def of(cls, whole: Chunk, tokens: int) -> CutChunk:
        return cls(whole.batch, whole.start, tokens, whole.arrays, whole)

    @property
    def held(self) -> tuple:
        return self.whole.held

    @property
    def is_plain(self) -> bool:
        return False

    def of_sequences(self, xp, sequences) -> Chunk:
        return CutChunk.of(self.whole.of_sequences(xp, sequences), self.tokens)


def decode(reader, chunk: Chunk, layer: int | None = None, layers: int = 1) -> tuple:
    """Keys and values [B, H, T, D] of a chunk of any kind, by the `reader` of `layer` of its `layers`, or of all (None)."""
    if isinstance(chunk, CutChunk):
        return tuple(x[:, :, : chunk.tokens] for x in decode(reader, chunk.whole, layer, layers))
    if isinstance(chunk, ExactChunk):
        keys, values = chunk.arrays
        return (keys, values) if layer is None or layers == 1 else split_layers(keys, values, layers)[layer]
    return reader.decode(chunk)


def decoded(xp, codec, chunks: list[Chunk], dtype, layer: int | None = None) -> Iterator[tuple]:
    """Keys and values [B, H, T, D] in `dtype` of `chunks`, in their order, of one layer or of all (None).

    Of as many plain chunks at a time as the array library has a faster way for, else one by one.
    """
    reader = codec.reader(layer)
    for plain, alike in groupby(chunks, lambda chunk: chunk.is_plain):
        if plain and reader.decoder:
            yield from reader.decoder(list(alike), dtype)
            continue
        for chunk in alike:
            yield tuple(xp.astype(x, dtype) for x in decode(reader, chunk, layer, codec.layers))


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

"""Chunks joined, so that one set of operations serves several of them; their codes are held once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch

from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader
from spectral_kv_core.planning.budget import CHUNK_TOKENS
from spectral_kv_core.quantization.packing import UNIT, interleave, pack, unpack

ALIGNED = 4  # units: rows of a tile are whole words, whatever the width


@dataclass(frozen=True)
class Tile:
    """Units [B, rows, n, bits] of every width of several chunks; `unused`: those of its N blocks that are no tokens'.

    Block 4j + i is number i * N / 4 + j, which is the order that masks of two bits leave blocks in.
    """

    units: list[torch.Tensor]
    unused: torch.Tensor

    @property
    def blocks(self) -> int:
        return UNIT * self.units[0].shape[2]


class Tiles:
    """Up to `size` chunks at a time, made one when they are first attended to; the chunks become views of it.

    A tile that ends with the last chunk is made again when that has grown, once per 16 tokens.
    """

    def __init__(self, codec: SpectralReader, size: int):
        self._codec, self._size = codec, size
        self._made: WeakKeyDictionary[Chunk, tuple] = WeakKeyDictionary()  # by the last chunk of each

    def of(self, chunks: list[Chunk]) -> list[Tile]:
        """All of `chunks`, codes that wait for their unit included."""
        groups = (chunks[i : i + self._size] for i in range(0, len(chunks), self._size))
        return [self._once(group, self._padded) for group in groups]

    def full(self, chunks: list[Chunk]) -> list[Chunk]:
        """`chunks` with full ones joined, each a chunk itself."""
        joined = []
        for start in range(0, len(chunks), self._size):
            group = chunks[start : start + self._size]
            whole = list(takewhile(lambda chunk: chunk.tokens == CHUNK_TOKENS, group))
            joined += [self._once(whole, self._concatenated)] if len(whole) > 1 else whole
            joined += group[len(whole) :]
        return joined

    def tables(self) -> list[torch.Tensor]:
        """What is held beside the codes."""
        return [tile.unused for _, tile in self._made.values() if isinstance(tile, Tile)]

    def _once(self, group: list[Chunk], make):
        of, tile = self._made.get(group[-1], ((), None))
        if [chunk() for chunk in of] != group:
            for chunk in group:
                self._made.pop(chunk, None)  # what was joined before others followed
            tile = make(group)
            self._made[group[-1]] = tuple(map(ref, group)), tile
        return tile

    def _padded(self, group: list[Chunk]) -> Tile:
        counts = [chunk.tokens // self._codec.block for chunk in group]
        held = [-(-n // UNIT) for n in counts]  # units, the last of them maybe in part
        padding = -sum(held) % ALIGNED
        parts = []
        for i, bits in enumerate(self._codec.bits):
            of_width = [
                x for chunk, n in zip(group, counts) for x in self._whole(chunk.arrays[2 * i : 2 * i + 2], bits, n)
            ]
            if padding:
                batch, rows = of_width[0].shape[:2]
                of_width.append(of_width[0].new_zeros(batch, rows, padding, bits))
            parts.append(torch.cat(of_width, dim=2))
        self._become_views(group, parts, np.cumsum([0, *held]))
        used = np.zeros(UNIT * (sum(held) + padding), bool)
        for start, n in zip(np.cumsum([0, *held]) * UNIT, counts):
            used[start : start + n] = True
        return Tile(parts, torch.from_numpy(np.flatnonzero(~used.reshape(-1, 4).T)))

    def _whole(self, packed: tuple, bits: int, n: int) -> list[torch.Tensor]:
        """Units of the first `n` blocks, the codes that wait for theirs being one more."""
        (units, rest), left = packed, n % UNIT
        if not left:
            return [units]
        batch, rows = units.shape[:2]
        codes = unpack(self._codec.xp, rest, bits, rows * left).reshape(batch, rows, left)
        return [units, pack(self._codec.xp, codes, bits)]

    def _concatenated(self, group: list[Chunk]) -> Chunk:
        parts = [torch.cat(x, dim=2) for x in zip(*(chunk.arrays[0::2] for chunk in group))]
        rests = group[0].arrays[1::2]
        tokens = [chunk.tokens for chunk in group]
        self._become_views(group, parts, np.cumsum([0, *tokens]) // (self._codec.block * UNIT))
        return replace(group[0], tokens=sum(tokens), arrays=interleave(zip(parts, rests)))

    @staticmethod
    def _become_views(group: list[Chunk], parts: list[torch.Tensor], starts) -> None:
        for chunk, start in zip(group, starts.tolist()):
            units = [part[:, :, start : start + x.shape[2]] for part, x in zip(parts, chunk.arrays[0::2])]
            chunk.move(interleave(zip(units, chunk.arrays[1::2])))

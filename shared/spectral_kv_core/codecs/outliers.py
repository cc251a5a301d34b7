"""Tokens that lie outside what a profile knows: coded about an offset and with a gain of their own, or kept exactly.

A profile's tables end where its calibration text ended. What lies far outside would be clipped to their last levels: runs
of one token at the start of a prompt reach 60 deviations. Such blocks are found before they are coded. Blocks in a row get
an offset and a gain (mean-removed gain-adaptive quantization: Gersho and Gray 1992, chapter 12.7), which costs two vectors
per head. A run of one token then takes codes of its small differences. A block that no gain helps is kept exactly, as long
as there is room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .chunk import Adaptation, AdaptedChunk, Chunk, ExactChunk

PEAK = 10.0  # deviations of a coefficient: of WikiText-2, some 5 blocks in 10,000 have one beyond
HIGH, OFTEN, MANY = (
    8.0,
    1 / 16,
    8,
)  # lower peaks count too where more than this share of a run of so many blocks has them
FLAT, FLAT_COUNT = 0.3, 32  # root mean square of what moves within a block; of fewer coefficients it is not looked at
LOST = 25.0  # energy of a block in what is not stored, to what the profile expects there
CREST = 4.0  # peak of a block in deviations that the tables code well
WIDEST = 1.5  # gain, root mean square, from which an exact block costs less than the error of its codes
STILL, LOUDEST = 2.0**-8, 6e4  # least gain, and largest: float16 ends a little later
EXACT_SHARE, EXACT_BLOCKS = 1 / 64, 1  # of the sealed tokens that may be kept exactly, and blocks beside


@dataclass
class Segment:
    """Blocks `first` to `stop` of a run, with what they are coded about.

    gain: root mean square over a group, of the group where it is largest. rate: bits that codes of the same error would
    take beyond those of ordinary blocks.
    """

    first: int
    stop: int
    adaptation: Adaptation
    gain: float
    rate: float


def unusual(codec, keys, values, position: int, z) -> np.ndarray:
    """Which blocks of `keys`, `values` at `position` lie outside what is known, bool [n].

    z: their coefficients [B, G, n, block, R]. They count by their peak, by the energy of what is not stored, or as their
    tokens are so alike that codes of their differences would be noise.
    """
    xp = codec.xp
    squares = z * z * codec.stored
    peaks = xp.max(xp.max(squares, axis=-1), axis=-1)
    moving = xp.sum(xp.sum(squares[..., 1:, :], axis=-1), axis=-1)
    lost = codec.lost_energy(keys, values, position, squares)
    peaks, moving, lost = (xp.to_numpy(x) for x in (peaks, moving, lost))
    counts = np.array(codec.moving_counts)[None, :, None]
    flat = (moving < FLAT * FLAT * counts) & (counts >= FLAT_COUNT)
    high = (peaks > HIGH * HIGH).any((0, 1))
    if len(high) < MANY or high.mean() <= OFTEN:
        high = (peaks > PEAK * PEAK).any((0, 1))
    return high | ((lost > LOST) | flat).any((0, 1))


class Run:
    """Keys and values [B, H, T, D] of a run of blocks at `position`, the first of its tokens."""

    def __init__(self, codec, keys, values, position: int):
        self.codec, self.keys, self.values, self.position = codec, keys, values, position

    def of(self, first: int, stop: int) -> tuple:
        """Keys, values and position of the blocks `first` to `stop`."""
        block = self.codec.block
        span = slice(first * block, stop * block)
        return self.keys[:, :, span], self.values[:, :, span], self.position + first * block

    def segments(self, first: int, stop: int) -> list[Segment]:
        """The blocks `first` to `stop` in parts: one more where it saves more bits than its offsets and gains take."""
        joined: list[Segment] = []
        for segment in self._split(self.adapted(first, stop)):
            joined.append(segment)
            while len(joined) > 1:  # splitting in halves may have parted what belongs together
                whole = self.adapted(joined[-2].first, segment.stop)
                if _parts_pay(whole, joined[-2:]):
                    break
                joined[-2:] = [whole]
        return joined

    def _split(self, whole: Segment) -> list[Segment]:
        if whole.stop - whole.first == 1:
            return [whole]
        middle = (whole.first + whole.stop) // 2
        halves = [self.adapted(whole.first, middle), self.adapted(middle, whole.stop)]
        if not _parts_pay(whole, halves):
            return [whole]
        return [*self._split(halves[0]), *self._split(halves[1])]

    def adapted(self, first: int, stop: int) -> Segment:
        """These blocks as one segment."""
        codec, blocks = self.codec, stop - first
        keys, values, position = self.of(first, stop)
        adaptation = codec.centered(keys, values, position)
        z = codec.xp.to_numpy(codec.coefficients(keys, values, position, adaptation)[0] * codec.stored)
        counts = codec.stored_counts()
        power = np.square(z).sum((2, 3)) / np.maximum(blocks * counts, 1)
        gain = np.maximum(np.sqrt(power), np.abs(z).max((2, 3)) / CREST)
        gain = np.clip(gain, STILL, LOUDEST).astype(np.float16).astype(np.float32)
        held = codec.xp.astype(codec.xp.asarray(gain, like=adaptation.gain), codec.xp.float16)
        adaptation = Adaptation(adaptation.keys, adaptation.values, held)
        spread = (np.square(gain) * counts).sum(-1) / np.maximum(counts.sum(-1), 1)
        rate = float((np.log2(gain) * counts).sum()) * blocks
        return Segment(first, stop, adaptation, float(np.sqrt(spread.max())), rate)

    def fitting(self, first: int, stop: int, adaptation: Adaptation) -> int:
        """How many of these blocks, from the first on, are coded well about what others before them are."""
        codec = self.codec
        keys, values, position = self.of(first, stop)
        z = codec.xp.to_numpy(codec.coefficients(keys, values, position, adaptation)[0] * codec.stored)
        close = np.abs(z).max((0, 1, 3, 4)) <= WIDEST * CREST
        return int(np.logical_and.accumulate(close).sum())


def _parts_pay(whole: Segment, parts: list[Segment]) -> bool:
    """Whether two `parts` save more bits than what the second one is coded about takes."""
    bits = 8 * sum(x.nbytes for x in whole.adaptation.arrays)
    return parts[0].rate + parts[1].rate + bits < whole.rate


def extend(codec, chunks: list[Chunk], keys, values, position: int, z, weights) -> None:
    """Put T tokens with the coefficients `z` and `weights` behind `chunks`, those outside the profile in other kinds."""
    marks = unusual(codec, keys, values, position, z)
    if not marks.any():
        codec.extend_plain(chunks, z, weights, position)
        return
    run, block = Run(codec, keys, values, position), codec.block
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.view(np.int8), [0]])))
    room = _room(chunks, len(marks) * block, block)
    done = 0
    for first, stop in (*edges.reshape(-1, 2).tolist(), (len(marks), len(marks))):
        if done < first:
            part = slice(done, first)
            codec.extend_plain(
                chunks, z[:, :, part], None if weights is None else weights[:, :, part], position + done * block
            )
        done = stop
        if first == stop:
            break
        last = chunks[-1] if chunks else None
        if isinstance(last, AdaptedChunk) and codec.grows:
            free = (codec.chunk_tokens - last.tokens) // block
            fits = run.fitting(first, min(stop, first + free), last.adaptation) if free else 0
            if fits:
                k, v, at = run.of(first, first + fits)
                chunks[-1] = codec.code(last, *codec.coefficients(k, v, at, last.adaptation), at)
                first += fits
        if first < stop:
            room -= _add(codec, chunks, run, run.segments(first, stop), room)


def _add(codec, chunks: list[Chunk], run: Run, segments: list[Segment], room: int) -> int:
    """Put `segments` behind `chunks`; returns how many of their blocks are exact, at most `room`, the worst first."""
    exact: set[int] = set()
    for number in sorted(range(len(segments)), key=lambda i: -segments[i].gain):
        size = segments[number].stop - segments[number].first
        # a block alone takes as much for what it is coded about as it saves, and is decoded in every step
        if (size == 1 or segments[number].gain > WIDEST) and size <= room:
            exact.add(number)
            room -= size
    for number, segment in enumerate(segments):
        keys, values, position = run.of(segment.first, segment.stop)
        if number in exact:
            arrays = codec.xp.copy(keys), codec.xp.copy(values)
            chunks.append(ExactChunk(keys.shape[0], position, keys.shape[2], arrays))
            continue
        full = codec.chunk_tokens // codec.block
        for first in range(segment.first, segment.stop, full):
            keys, values, position = run.of(first, min(first + full, segment.stop))
            chunks.append(_adapted_chunk(codec, keys, values, position, segment.adaptation))
    return sum(segments[number].stop - segments[number].first for number in exact)


def _adapted_chunk(codec, keys, values, position: int, adaptation: Adaptation) -> AdaptedChunk:
    """Codes about `adaptation`, whose offsets then take up the mean of their error: it would build up along a run."""
    coded = codec.code(None, *codec.coefficients(keys, values, position, adaptation), position)
    key_error, value_error = codec.mean_error(coded, keys, values, position, adaptation)
    offsets = adaptation.keys + key_error, adaptation.values + value_error
    return AdaptedChunk(coded.batch, coded.start, coded.tokens, coded.arrays, Adaptation(*offsets, adaptation.gain))


def _room(chunks: list[Chunk], new: int, block: int) -> int:
    """How many of `new` tokens' blocks may be exact."""
    sealed = sum(chunk.tokens for chunk in chunks) + new
    held = sum(chunk.tokens for chunk in chunks if isinstance(chunk, ExactChunk))
    return max(int(sealed * EXACT_SHARE) // block + EXACT_BLOCKS - held // block, 0)

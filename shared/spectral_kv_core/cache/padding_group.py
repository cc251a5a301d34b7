"""The life of a key tensor in a cache: exact sinks and an exact recent window, sealed chunks of packed codes in between.

Sequences of a batch that start at the same slot form a *padding group*. They are stored and attended together. New tokens
enter behind the exact ones (`append`). Those that left the window are coded once they fill blocks (`seal`), and are
attended to as codes (`attend`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..arrays import attention
from ..codecs.base import Codec
from ..codecs.chunk import Chunk, CutChunk, ExactChunk, decoded, positions_of, split_layers
from ..planning.budget import SEAL
from . import decoded_chunks

LATENT_QUERIES = 16  # up to so many new tokens attend to the codes; more are a prefill and use the host's fused kernel
DENSE_TOKENS = 32768  # sealed tokens that may be decoded at once for such a call, where that saves small operations


class Storage:
    """How tokens are held, which all padding groups of a layer share.

    codec: None keeps everything exact. sinks, window: first and last tokens kept exactly. layers: that the codec codes
    together. block: tokens are sealed in multiples of it. make_staging: see `LayerCache`. adapts: see `Codec.extend`.
    """

    def __init__(
        self, xp, codec, sinks: int, window: int, make_staging: Callable[[], Codec] | None = None, adapts: bool = True
    ):
        self.adapts = adapts
        self.xp, self.codec, self.sinks, self.window, self.make_staging = xp, codec, sinks, window, make_staging
        self.layers = 1 if codec is None else codec.layers
        self.block = SEAL if codec is None else max(SEAL, codec.block)
        self._staging: Codec | None = None

    @property
    def staging(self) -> Codec:
        """The codec that holds a prompt; made when the first prompt goes on after one call."""
        if self._staging is None:
            assert self.make_staging is not None, "nothing is staged without"
            self._staging = self.make_staging()
        return self._staging

    def tables(self) -> list:
        """Every array that all sequences share."""
        codecs = [codec for codec in (self.codec, self._staging) if codec is not None]
        return list({id(x): x for codec in codecs for x in codec.tables()}.values())


@dataclass
class PaddingGroup:
    """Tokens of the sequences of a batch, by their numbers, that share their left padding `pad` (slots).

    Arrays have these sequences alone: b of them. Heads H are those of all layers that are coded together, of one layer where
    a method takes its number `layer`.
    """

    storage: Storage
    sequences: list[int]
    pad: int
    exact_keys: Any = None  # [b, H, sinks + window, D], sinks first
    exact_values: Any = None
    chunks: list[Chunk] = field(default_factory=list)
    staged: list[Chunk] = field(default_factory=list)  # behind `chunks`: a prompt that may go on, at more bits
    positions: Any = (
        None  # int32 [b, H or 1, n] of the first n exact tokens once some were dropped; the last ones follow
    )
    dropped: int = 0  # tokens that are no longer there, in every head as many
    end: int | None = None  # slot behind the last token, where calls bring padding on the right too
    decoded: dict = field(default_factory=dict)  # keys and values of (chunk, layer) that stay; replaced, never changed

    @property
    def exact(self) -> int:
        return 0 if self.exact_keys is None else self.exact_keys.shape[2]

    @property
    def sealed(self) -> int:
        return sum(chunk.tokens for chunk in (*self.chunks, *self.staged))

    @property
    def stored(self) -> int:
        return self.exact + self.sealed

    @property
    def seen(self) -> int:
        """Tokens that came in: the position of the next one."""
        return self.stored + self.dropped

    @property
    def sinks(self) -> int:
        """Exact tokens before the sealed ones."""
        return min(self.storage.sinks, self.exact)

    @property
    def ready(self) -> int:
        """Exact tokens that lie before the window and fill blocks."""
        storage = self.storage
        if storage.codec is None:
            return 0
        return max(self.exact - storage.sinks - storage.window, 0) // storage.block * storage.block

    def append(self, keys, values, joined: tuple | None = None) -> None:
        """Put `keys`, `values` [b, H, L, D] behind the exact tokens; `joined`: as `attend` gave it."""
        self.exact_keys, self.exact_values = joined or self._joined(keys, values)

    def slots(self, seen: int, tokens: int) -> tuple[int, int]:
        """Which of `tokens` slots behind the first `seen` are no padding: from the first number to the second."""
        start = min(max(self.pad - seen, 0), tokens)
        return start, tokens if self.end is None else min(max(self.end - seen, start), tokens)

    def shift(self, slots: int) -> None:
        """Stand so many slots later in a batch that has as many more before."""
        self.pad += slots
        self.end = None if self.end is None else self.end + slots

    def own(self, keys, values) -> None:
        """Copy what came in where it is held as it came: it may be a view of the projection of all heads."""
        if self.exact_keys is keys:
            self.exact_keys, self.exact_values = self.storage.xp.copy(keys), self.storage.xp.copy(values)

    def seal(self, staged: bool = False) -> None:
        """Code the exact tokens that are `ready`; `staged`: at more bits, until the prompt ends."""
        ready = self.ready
        if not ready:
            return
        storage, xp = self.storage, self.storage.xp
        first, stop = storage.sinks, storage.sinks + ready

        def split(x):
            return x[:, :, first:stop], xp.concat([x[:, :, :first], x[:, :, stop:]], axis=2)

        position, left_places = split(self.places()) if self.dropped else (first + self.sealed, None)
        (keys, left_keys), (values, left_values) = split(self.exact_keys), split(self.exact_values)
        if staged:
            self.staged = storage.staging.extend(self.staged, keys, values, position, storage.adapts)
        else:
            self.chunks = storage.codec.extend(self.chunks, keys, values, position, storage.adapts)
        self.exact_keys, self.exact_values, self.positions = left_keys, left_values, left_places

    def finalize(self) -> None:
        """End the prompt: what was staged is encoded at the plan's bits, chunk by chunk."""
        if not self.staged:
            return
        storage, xp = self.storage, self.storage.xp
        position = storage.sinks + sum(chunk.tokens for chunk in self.chunks)
        parts: list[tuple] = []
        for part in decoded(xp, storage.staging, self.staged, xp.float32):
            parts.append(part)
            tokens = sum(keys.shape[2] for keys, _ in parts)
            if tokens % storage.block == 0:  # blocks of the plan's codec may be longer
                keys, values = parts[0] if len(parts) == 1 else (xp.concat(list(x), axis=2) for x in zip(*parts))
                self.chunks = storage.codec.extend(self.chunks, keys, values, position, storage.adapts)
                position, parts = position + tokens, []
        self.staged = []

    def attend(
        self, queries, keys, values, scale: float, fused, layer: int = 0, working_set: int | None = None, sinks=None
    ) -> tuple:
        """Attention [b, Hq, L, D] to everything held and to L new tokens of `layer`, which do not enter.

        fused, sinks: see `LayerCache.attend`. working_set: bytes of decoded chunks of `layer` that may stay, None for a cache
        without. Returns also keys and values of the exact tokens with the new ones behind them, or None where it took none.
        """
        sealed = self.chunks or self.staged
        if sealed and queries.shape[2] > LATENT_QUERIES:
            return self._attend_prompt(queries, keys, values, scale, fused, layer, sinks is None), None
        k, v = joined = self._joined(keys, values, layer)
        if not sealed:
            return fused(queries, k, v, scale), joined
        plain = [chunk for chunk in self.chunks if chunk.is_plain]
        if len(plain) < len(self.chunks):
            k, v = self._with_others(k, v, layer)
        if sinks is not None:
            reader = self.storage.codec.reader(layer)
            out = attention.decode_step(self.storage.xp, reader, plain, queries, k, v, scale, sinks)
        elif working_set is not None:
            out = decoded_chunks.decode_step(self, plain, layer, working_set, queries, k, v, scale)
        elif plain:
            out = self.storage.codec.reader(layer).decode_step(plain, queries, k, v, scale)
        else:
            out = attention.decode_step(self.storage.xp, None, [], queries, k, v, scale)
        return out, joined

    def _with_others(self, keys, values, layer: int) -> tuple:
        """Keys and values of the chunks that no kernel takes, decoded, before `keys` and `values`."""
        xp, codec = self.storage.xp, self.storage.codec
        others = [chunk for chunk in self.chunks if not chunk.is_plain]
        sides = zip(*decoded(xp, codec, others, keys.dtype, layer), (keys, values))
        return tuple(xp.concat(list(side), axis=2) for side in sides)

    def _attend_prompt(self, queries, keys, values, scale: float, fused, layer: int, tiles: bool):
        """`attend` for many new tokens, to decoded keys and values; tiles: not all of them at a time."""
        xp = self.storage.xp
        at_once = self.storage.codec.reader(layer).decoder and self.sealed <= DENSE_TOKENS
        if tiles and not at_once and xp.kernels and xp.kernels.supports_partial_attention(queries):
            return self._attend_tiles(queries, keys, values, scale, layer)
        return fused(queries, *self.dense(keys.dtype, (keys, values), layer), scale)

    def _attend_tiles(self, queries, keys, values, scale: float, layer: int):
        """`attend` with never more of the history decoded than `decoded` gives at a time."""
        xp = self.storage.xp
        attend = xp.kernels.partial_attention

        def partials():
            yield attend(queries, keys, values, scale, causal=True)
            if self.exact:  # no fused kernel takes 0 keys
                yield attend(queries, *self._exact(layer), scale)
            for tile in self._tiles(queries.dtype, layer):
                yield attend(queries, *tile, scale)

        parts = partials()
        total = next(parts)
        xp.evaluate(*total)
        for part in parts:
            total = attention.add_partials(xp, total, part)
            xp.evaluate(*total)  # else all parts are there until the last one
        o, _, l = total
        return xp.astype((o / l).reshape(queries.shape), queries.dtype)

    def dense(self, dtype, new=(), layer: int | None = None) -> tuple:
        """Keys and values [b, H, stored, D], decoded: sinks, what is sealed, the rest, and those of `new` tokens.

        Of one layer, or of all (None).
        """
        xp, sinks, exact = self.storage.xp, self.sinks, self._exact(layer)
        parts = [[x[:, :, :sinks]] for x in exact]
        for tile in self._tiles(dtype, layer):
            for side, x in zip(parts, tile):
                side.append(x)
        for side, x in zip(parts, exact):
            side.append(x[:, :, sinks:])
        for side, x in zip(parts, new):
            side.append(x)
        return tuple(xp.concat([xp.astype(x, dtype) for x in side], axis=2) for side in parts)

    def _tiles(self, dtype, layer: int | None) -> Iterator[tuple]:
        """Keys and values [b, H, T, D] of what is sealed, in its order, of one layer or of all, decoded part by part."""
        storage = self.storage
        if self.chunks:
            yield from decoded(storage.xp, storage.codec, self.chunks, dtype, layer)
        if self.staged:
            yield from decoded(storage.xp, storage.staging, self.staged, dtype, layer)

    def _exact(self, layer: int | None = None) -> tuple:
        """Exact keys and values [b, H, exact, D] of one layer, or of all (None)."""
        sides, layers = (self.exact_keys, self.exact_values), self.storage.layers
        return sides if layer is None or layers == 1 else split_layers(*sides, layers)[layer]

    def _joined(self, keys, values, layer: int | None = None) -> tuple:
        """Keys and values of the exact tokens, with `keys` and `values` behind them."""
        if not self.exact:
            return keys, values
        exact_keys, exact_values = self._exact(layer)
        concat = self.storage.xp.concat
        return concat([exact_keys, keys], axis=2), concat([exact_values, values], axis=2)

    def recent(self) -> int:
        """Exact tokens at the end that nothing is missing between; not more than the window of those at the last eviction."""
        if not self.dropped:
            return self.exact
        known = self.storage.xp.to_numpy(self.positions)[..., ::-1]
        later = self.exact - known.shape[2]
        whole = (known == self.seen - later - 1 - np.arange(known.shape[2])).all((0, 1))
        return later + min(int(np.logical_and.accumulate(whole).sum()), self.storage.window)

    def places(self):
        """Positions int32 [b or 1, H or 1, exact] of the exact tokens."""
        xp = self.storage.xp
        if self.dropped:
            known = self.positions
            first = self.seen - (self.exact - known.shape[2])
            rest = np.arange(first, self.seen, dtype=np.int32)[None, None]
            blank = xp.zeros((*known.shape[:2], 1), dtype=xp.int32, like=known)
            return xp.concat([known, xp.asarray(rest, like=known) + blank], axis=2)
        places = np.concatenate([np.arange(self.sinks), np.arange(self.sinks + self.sealed, self.seen)])
        return xp.asarray(places.astype(np.int32)[None, None], like=self.exact_keys)

    def all_places(self) -> np.ndarray:
        """Positions [b, H or 1, stored] of all tokens, NumPy: sinks, sealed ones, the rest."""
        xp, exact, first = self.storage.xp, self.places(), self.sinks
        sealed = [positions_of(xp, chunk, exact) for chunk in (*self.chunks, *self.staged)]
        parts = [xp.to_numpy(x) for x in (exact[:, :, :first], *sealed, exact[:, :, first:])]
        shape = len(self.sequences), max(part.shape[1] for part in parts)
        return np.concatenate([np.broadcast_to(part, (*shape, part.shape[2])) for part in parts], axis=2)

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; a sealed block that the cut splits keeps its codes."""
        xp, keep = self.storage.xp, self.stored - tokens
        self.decoded = {}
        if keep <= 0:
            self.exact_keys = self.exact_values = self.positions = None
            self.chunks, self.dropped = [], 0
            return
        if self.dropped:
            self.positions = xp.copy(self.positions[:, :, : self.exact - tokens])
        if self.chunks and tokens > self.exact - self.sinks:
            self._crop_sealed(keep)
            return
        left = self.exact - tokens
        self.exact_keys, self.exact_values = (xp.copy(x[:, :, :left]) for x in (self.exact_keys, self.exact_values))

    def _crop_sealed(self, keep: int) -> None:
        """Keep the first `keep` tokens, of which the sealed ones are the last."""
        storage, xp = self.storage, self.storage.xp
        exact = [x[:, :, : min(storage.sinks, keep)] for x in (self.exact_keys, self.exact_values)]
        left = max(keep - storage.sinks, 0)
        chunks: list[Chunk] = []
        for chunk in self.chunks:
            here = min(left, chunk.tokens)
            if here == chunk.tokens:
                chunks.append(chunk)
            elif here and storage.adapts:
                chunks += self._cropped(chunk, here)
            elif here:  # tokens are dropped from plain chunks
                whole = here // storage.block * storage.block
                chunks += [storage.codec.cut(chunk, whole)] if whole else []
                tail = (x[:, :, whole:here] for x in storage.codec.decode(chunk))
                exact = [xp.concat([x, xp.astype(y, x.dtype)], axis=2) for x, y in zip(exact, tail)]
            left -= here
        self.exact_keys, self.exact_values = (xp.copy(x) for x in exact)
        self.chunks = chunks

    def _cropped(self, chunk: Chunk, tokens: int) -> list[Chunk]:
        """Chunks of the first `tokens` tokens of `chunk`."""
        if isinstance(chunk, CutChunk):
            return [CutChunk.of(chunk.whole, tokens)]
        if isinstance(chunk, ExactChunk):
            arrays = tuple(self.storage.xp.copy(x[:, :, :tokens]) for x in chunk.arrays)
            return [replace(chunk, tokens=tokens, arrays=arrays)]
        return self.storage.codec.cropped(chunk, tokens)

    def select(self, places: list[int], sequences: list[int]) -> PaddingGroup:
        """The sequences at `places` of this group, repeats allowed, with the numbers `sequences`."""
        xp = self.storage.xp
        if places == list(range(len(self.sequences))):  # all of them, which share the arrays
            return replace(self.copy(), sequences=sequences, decoded={})
        kept = PaddingGroup(self.storage, sequences, self.pad, dropped=self.dropped, end=self.end)
        if self.exact_keys is not None:
            index = xp.asarray(np.array(places, np.int32), like=self.exact_keys)
            kept.exact_keys = xp.take(self.exact_keys, index, axis=0)
            kept.exact_values = xp.take(self.exact_values, index, axis=0)
            kept.chunks = [chunk.of_sequences(xp, index) for chunk in self.chunks]
            kept.staged = [chunk.of_sequences(xp, index) for chunk in self.staged]
            if self.positions is not None:
                kept.positions = xp.take(self.positions, index, axis=0)
        return kept

    def copy(self) -> PaddingGroup:
        """An independent group; arrays are never changed in place, so both share them."""
        return replace(self, sequences=list(self.sequences), chunks=list(self.chunks), staged=list(self.staged))

    def state_arrays(self) -> list:
        """Every array held, without what others of them decode to."""
        exact = [x for x in (self.exact_keys, self.exact_values, self.positions) if x is not None]
        return exact + [a for chunk in (*self.chunks, *self.staged) for a in chunk.held]

    def decoded_arrays(self, layer: int | None = None) -> list:
        """The decoded arrays that stay, of one layer or of all (None)."""
        return [x for (_, of), pair in self.decoded.items() if layer in (None, of) for x in pair]

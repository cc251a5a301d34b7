"""The tokens of a layer with a sliding window: packed codes, an exact tail behind them, and nothing that is out of sight.

The host's own attention reads them decoded, with its own mask, in every step.
"""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import numpy as np

from ..codecs.base import Codec
from ..codecs.chunk import Chunk, CutChunk, ExactChunk, decoded
from ..errors import UsageError
from ..planning.cache_plan import CachePlan, cache_plan
from ..planning.plan import Plan
from .padding_group import LATENT_QUERIES

RING = 8  # chunks that fill a window: at most one of them is out of sight for the most part
PACKED = 4  # a window is worth packing from so many exact tails on


class SlidingWindow:
    """Keys and values [B, H, T, D] of the last tokens of one layer.

    width: Tokens that the next one attends to, itself not counted. tail: the last ones, which stay exact; up to a block
    less one more wait for their block. A prompt stays exact until it ends, as in `LayerCache`; no more than `width` of it.

    Slots of left padding are tokens as any other, which the host's mask hides.
    """

    def __init__(self, xp, codec: Codec, width: int, tail: int):
        self.xp, self.codec, self.width, self.tail = xp, codec, width, tail
        self.chunk_tokens = max(width // RING // codec.block, 1) * codec.block
        self.chunks: list[Chunk] = []
        self.exact_keys: Any = None
        self.exact_values: Any = None
        self.seen = 0

    def __deepcopy__(self, memo) -> SlidingWindow:
        """An independent one of the same codec; arrays are never changed in place, so both share them."""
        new = copy(self)
        new.chunks = list(self.chunks)
        return new

    @property
    def exact(self) -> int:
        """Tokens that are held exactly."""
        return 0 if self.exact_keys is None else self.exact_keys.shape[2]

    @property
    def held(self) -> int:
        """Tokens that are held, those of a chunk that are out of sight among them."""
        return self.exact + sum(chunk.tokens for chunk in self.chunks)

    @property
    def visible(self) -> int:
        """Tokens that the next one attends to, itself not counted: what `dense` gives."""
        return min(self.held, self.width)

    def append(self, keys, values) -> None:
        """Take in L tokens [B, H, L, D]; up to `LATENT_QUERIES` of them end a prompt."""
        length = keys.shape[2]
        if length <= LATENT_QUERIES:
            self.seal()
        new = (keys, values)
        if self.exact:
            held = (self.exact_keys, self.exact_values)
            new = tuple(self.xp.concat(list(side), axis=2) for side in zip(held, new))
        self.exact_keys, self.exact_values = new
        self.seen += length
        self._forget()
        if length <= LATENT_QUERIES:
            self.seal()
        elif self.exact_keys is keys:  # what came in may be a view of the projection of all heads
            self.exact_keys, self.exact_values = self.xp.copy(keys), self.xp.copy(values)

    def seal(self) -> None:
        """End the prompt: code the exact tokens before the tail that fill blocks."""
        ready = max(self.exact - self.tail, 0) // self.codec.block * self.codec.block
        position, start = self.seen - self.exact, 0
        while start < ready:
            last = self.chunks[-1:]
            if last and not (last[0].is_plain and last[0].tokens < self.chunk_tokens):
                last = []
            stop = min(start + self.chunk_tokens - sum(chunk.tokens for chunk in last), ready)
            keys, values = (x[:, :, start:stop] for x in (self.exact_keys, self.exact_values))
            kept = self.chunks[: len(self.chunks) - len(last)]
            self.chunks = kept + self.codec.extend(last, keys, values, position + start, True)
            start = stop
        if ready:
            sides = (self.exact_keys, self.exact_values)
            self.exact_keys, self.exact_values = (self.xp.copy(x[:, :, ready:]) for x in sides)
        self._forget()

    def _forget(self) -> None:
        """Let go what is out of sight: whole chunks, and exact tokens where there are no chunks."""
        while self.chunks and self.held - self.chunks[0].tokens >= self.width:
            self.chunks = self.chunks[1:]
        if not self.chunks and self.exact > self.width:
            sides = (self.exact_keys, self.exact_values)
            self.exact_keys, self.exact_values = (self.xp.copy(x[:, :, -self.width :]) for x in sides)

    def dense(self, dtype) -> tuple:
        """Keys and values [B, H, visible, D], decoded."""
        parts = list(decoded(self.xp, self.codec, self.chunks, dtype))
        parts.append(tuple(self.xp.astype(x, dtype) for x in (self.exact_keys, self.exact_values)))
        sides = (x[0] if len(x) == 1 else self.xp.concat(list(x), axis=2) for x in zip(*parts))
        return tuple(x[:, :, -self.visible :] for x in sides)

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; raises UsageError once some before them are out of sight."""
        if self.seen > self.held:
            raise UsageError(
                f"Expected a prompt of at most {self.width} tokens to forget some of, received {self.seen}: those before the "
                "sliding window are no longer there. Start again with an empty cache."
            )
        keep = max(self.seen - tokens, 0)
        self.seen = keep
        sealed = sum(chunk.tokens for chunk in self.chunks)
        chunks, left = self.chunks, min(keep, sealed)
        self.chunks = []
        for chunk in chunks:
            here = min(left, chunk.tokens)
            if here == chunk.tokens:
                self.chunks.append(chunk)
            elif here:
                self.chunks += self._cropped(chunk, here)
            left -= here
        sides, exact = (self.exact_keys, self.exact_values), max(keep - sealed, 0)
        self.exact_keys, self.exact_values = (self.xp.copy(x[:, :, :exact]) for x in sides)

    def _cropped(self, chunk: Chunk, tokens: int) -> list[Chunk]:
        if isinstance(chunk, CutChunk):
            return [CutChunk.of(chunk.whole, tokens)]
        if isinstance(chunk, ExactChunk):
            return [CutChunk.of(chunk, tokens)]
        return self.codec.cropped(chunk, tokens)

    def select(self, rows) -> None:
        """Make the batch out of the old rows `rows` (ints, in the new order, repeats allowed)."""
        if self.exact_keys is None:
            return
        index = self.xp.asarray(np.array([int(row) for row in rows], np.int32), like=self.exact_keys)
        sides = (self.exact_keys, self.exact_values)
        self.exact_keys, self.exact_values = (self.xp.take(x, index, axis=0) for x in sides)
        self.chunks = [chunk.of_sequences(self.xp, index) for chunk in self.chunks]

    def arrays(self) -> list:
        """Every array held for the sequences."""
        exact = [x for x in (self.exact_keys, self.exact_values) if x is not None]
        return exact + [x for chunk in self.chunks for x in chunk.held]


def is_worth_packing(width: int, tail: int) -> bool:
    """Whether packing a window of `width` tokens saves bytes, with an exact `tail`."""
    return width >= PACKED * max(tail, 1)


class WindowLayer:
    """A layer with a sliding window whose tokens are codes, as far as it is the same in every host.

    A host's own cache layer inherits it, and gives `xp`. sliding_window: tokens that attention sees, the newest included.
    `store`: None until the device is known.
    """

    xp: Any = None
    store: Any  # SlidingWindow | None

    def __init__(self, plan: Plan | CachePlan, layer_group: int, sliding_window: int, tail: int):
        super().__init__()
        self.plan, self.layer_group = cache_plan(plan), layer_group
        self.sliding_window, self.tail = sliding_window, tail
        self.store = None

    def __deepcopy__(self, memo):
        """An independent layer that shares the plan and the arrays."""
        new = copy(self)
        new.store = deepcopy(self.store, memo)
        return new

    @property
    def seen(self) -> int:
        """Slots seen, padding included."""
        return 0 if self.store is None else self.store.seen

    def open(self, device=None) -> None:
        """Put the codec's tables on `device`, and make the store, empty."""
        codec = self.plan.codecs(self.xp, device)[self.layer_group]
        self.store = SlidingWindow(self.xp, codec, self.sliding_window - 1, self.tail)

    def take(self, keys, values) -> tuple:
        """Take in L tokens [B, H, L, D]; returns keys and values [B, H, T, D] that they attend to, themselves included."""
        expected, received = (self.plan.shape.kv_heads, self.plan.shape.head_dim), (keys.shape[1], keys.shape[3])
        if expected != received:
            raise UsageError(
                f"Expected keys with (kv_heads, head_dim) {expected} in a layer with a sliding window, received {received}: "
                "the cache was made for another model. Make one with the model that is called."
            )
        store = self.store
        if keys.shape[2] <= LATENT_QUERIES:
            store.seal()
        held = store.dense(keys.dtype) if store.held else None
        store.append(keys, values)
        if held is None:
            return keys, values
        return tuple(self.xp.concat([old, new], axis=2) for old, new in zip(held, (keys, values)))

    def fill(self, keys, values, seen: int) -> None:
        """Take over the last tokens [B, H, n, D] of a prompt of `seen`, as one call with all of them would have left them."""
        self.take(keys, values)
        self.store.seen = seen  # before anything is coded: what enters at once stays exact until the prompt ends

    @property
    def elements(self) -> int:
        """Elements of the keys and values of what the next token attends to."""
        if not self.seen:
            return 0
        batch, heads, _, head_dim = self.store.exact_keys.shape
        return 2 * batch * heads * self.store.visible * head_dim

    def exact(self) -> tuple:
        """Decoded keys and values [B, H, n, D] of the last tokens; None twice when empty."""
        return self.store.dense(self.store.exact_keys.dtype) if self.seen else (None, None)

    def finalize(self) -> None:
        """End the prompt now: the layer takes its final size."""
        if self.store is not None:
            self.store.seal()
            self.xp.evaluate(*self.store.arrays())

    def arrays(self) -> list:
        """Every array held for the sequences."""
        return [] if self.store is None else self.store.arrays()

    def tables(self) -> list:
        """Every array that all sequences share."""
        return [] if self.store is None else self.store.codec.tables()

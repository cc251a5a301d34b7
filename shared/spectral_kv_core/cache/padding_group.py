"""What a cache layer holds for the sequences of a batch that start at the same slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..codecs.chunk import Chunk, positions_of


@dataclass
class PaddingGroup:
    """State of the sequences of a batch, by their numbers, that share their left padding `pad` (slots)."""

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

    def recent(self, xp, window: int) -> int:
        """Exact tokens at the end that nothing is missing between; not more than `window` of those at the last eviction."""
        if not self.dropped:
            return self.exact
        known = xp.to_numpy(self.positions)[..., ::-1]
        later = self.exact - known.shape[2]
        whole = (known == self.seen - later - 1 - np.arange(known.shape[2])).all((0, 1))
        return later + min(int(np.logical_and.accumulate(whole).sum()), window)

    def places(self, xp, sinks: int):
        """Positions int32 [b or 1, H or 1, exact] of the exact tokens, of which `sinks` stand before the sealed ones."""
        if self.dropped:
            known = self.positions
            first = self.seen - (self.exact - known.shape[2])
            rest = np.arange(first, self.seen, dtype=np.int32)[None, None]
            blank = xp.zeros((*known.shape[:2], 1), dtype=xp.int32, like=known)
            return xp.concat([known, xp.asarray(rest, like=known) + blank], axis=2)
        sinks = min(sinks, self.exact)
        places = np.concatenate([np.arange(sinks), np.arange(sinks + self.sealed, self.seen)])
        return xp.asarray(places.astype(np.int32)[None, None], like=self.exact_keys)

    def all_places(self, xp, sinks: int) -> np.ndarray:
        """Positions [b, H or 1, stored] of all tokens, NumPy: sinks, sealed ones, the rest."""
        exact, first = self.places(xp, sinks), min(sinks, self.exact)
        sealed = [positions_of(xp, chunk, exact) for chunk in (*self.chunks, *self.staged)]
        parts = [xp.to_numpy(x) for x in (exact[:, :, :first], *sealed, exact[:, :, first:])]
        shape = len(self.sequences), max(part.shape[1] for part in parts)
        return np.concatenate([np.broadcast_to(part, (*shape, part.shape[2])) for part in parts], axis=2)

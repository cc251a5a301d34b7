"""How large a cache is, of which kinds its bytes are, and beside what."""

from __future__ import annotations

from collections.abc import Mapping

from ..codecs.chunk import ExactChunk
from .layer_cache import LayerCache

#: Of the arrays of a cache. codes: packed tokens, with what they are coded about. exact: tokens as they came, in sinks,
#: windows, blocks that wait or stay exact, and layers that nobody compresses. decoded: tokens of codes that stay decoded.
#: sliding window: tokens of layers that forget. state: of linear attention. other: counters of the host.
KINDS = ("codes", "exact", "decoded", "sliding window", "state", "other")


class CacheSize(int):
    """Bytes of every array held for the sequences of a cache, with what they stand for.

    by_kind: the bytes by `KINDS`, which add up to all; exact_tokens: tokens of all sequences that a compressed layer holds as
    they came, the mean over these layers; dense_nbytes: what the plain cache needs for the same tokens at 16 bits;
    table_nbytes: all arrays that are held beside the sequences, once for all caches that code alike; compression:
    dense_nbytes / this; bits_per_element: 16 / compression.
    """

    by_kind: dict[str, int]
    exact_tokens: float
    dense_nbytes: int
    table_nbytes: int

    def __new__(cls, by_kind: Mapping[str, int], exact_tokens: float, dense_nbytes: int, table_nbytes: int):
        """A size of the sum of `by_kind`, which may leave kinds out."""
        kinds = dict.fromkeys(KINDS, 0) | dict(by_kind)
        size = super().__new__(cls, sum(kinds.values()))
        size.by_kind, size.exact_tokens = kinds, exact_tokens
        size.dense_nbytes, size.table_nbytes = dense_nbytes, table_nbytes
        return size

    def __getnewargs__(self) -> tuple[dict[str, int], float, int, int]:  # type: ignore[override]  # `int` has one argument
        """What copies and pickles of it are made from."""
        return self.by_kind, self.exact_tokens, self.dense_nbytes, self.table_nbytes

    @property
    def compression(self) -> float:
        return self.dense_nbytes / self if self else 1.0

    @property
    def bits_per_element(self) -> float:
        return 16 / self.compression if self.dense_nbytes else 0.0

    def described(self) -> str:
        """In words: the bytes, those of exact tokens, and how many the plain cache needs at 16 bits."""
        exact = f"{self.by_kind['exact']:,} of them exact"
        return (
            f"{int(self):,} bytes, {exact}, {self.compression:.1f} times smaller than {self.dense_nbytes:,} in 16 bits"
        )


def arrays_by_kind(store: LayerCache) -> dict[str, list]:
    """Every array that the `store` of a compressed layer holds, by kind."""
    held: dict[str, list] = {"codes": [], "exact": [], "decoded": []}
    for group in store.padding_groups:
        held["exact"] += [x for x in (group.exact_keys, group.exact_values, group.positions) if x is not None]
        for chunk in (*group.chunks, *group.staged):
            held["exact" if isinstance(chunk, ExactChunk) else "codes"] += chunk.held
        held["decoded"] += group.decoded_arrays()
    return held


def exact_tokens(store: LayerCache) -> int:
    """Tokens of all sequences that the `store` of a compressed layer holds as they came."""
    kept = (
        (group, sum(chunk.tokens for chunk in (*group.chunks, *group.staged) if isinstance(chunk, ExactChunk)))
        for group in store.padding_groups
    )
    return sum((group.exact + tokens) * len(group.sequences) for group, tokens in kept)

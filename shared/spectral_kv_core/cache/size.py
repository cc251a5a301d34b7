"""How large a cache is, and beside what."""

from __future__ import annotations


class CacheSize(int):
    """Bytes of every array held for the sequences of a cache, with what they stand for.

    dense_nbytes: what the plain cache needs for the same tokens at 16 bits; table_nbytes: all arrays that are held beside
    the sequences, once for all caches that code alike; compression: dense_nbytes / this; bits_per_element: 16 / compression.
    """

    dense_nbytes: int
    table_nbytes: int

    def __new__(cls, stored: int, dense_nbytes: int, table_nbytes: int):
        size = super().__new__(cls, stored)
        size.dense_nbytes, size.table_nbytes = dense_nbytes, table_nbytes
        return size

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]  # `int` has one argument
        """What copies and pickles of it are made from."""
        return int(self), self.dense_nbytes, self.table_nbytes

    @property
    def compression(self) -> float:
        return self.dense_nbytes / self if self else 1.0

    @property
    def bits_per_element(self) -> float:
        return 16 / self.compression if self.dense_nbytes else 0.0

    def described(self) -> str:
        """In words: the bytes, and how many the plain cache needs at 16 bits."""
        return f"{int(self):,} bytes, {self.compression:.1f} times smaller than {self.dense_nbytes:,} in 16 bits"

"""A conversation: its tokens, the cache that holds them, and how it goes on token by token.

Every call of a model is one step, so that whoever runs several conversations may take turns, stop one, or count bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import ModuleType
from typing import Any

from ..cache.size import CacheSize


class Event(Enum):
    """What a step may be, beside a token: a piece of the prompt was READ, or there is no room, FULL."""

    READ = "read"
    FULL = "full"


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model that answers: its backend's module `generation`, its tokenizer, and what makes empty caches for it."""

    backend: ModuleType
    model: Any
    tokenizer: Any
    new_cache: Callable[[], Any]

    @cached_property
    def token_nbytes(self) -> int:
        """Bytes that a token adds to a cache at most."""
        return self.backend.token_nbytes(self.model)


@dataclass(eq=False)
class Conversation:
    """What has been said, as token ids, in a cache.

    tokens: those that the cache holds. broken: a call has ended halfway, and the cache is of no more use.
    """

    speaker: Speaker
    cache: Any
    tokens: list[int] = field(default_factory=list)
    broken: bool = False
    _measured: tuple[int, int] = (0, 0)  # bytes, and at how many tokens

    @property
    def most_nbytes(self) -> int:
        """Bytes that the cache has at most: those that were measured, and what all tokens since may have added."""
        nbytes, tokens = self._measured
        return nbytes + max(len(self.tokens) - tokens, 0) * self.speaker.token_nbytes

    def measure(self) -> CacheSize:
        """The size of the cache."""
        size = self.speaker.backend.cache_nbytes(self.cache)
        self._measured = int(size), len(self.tokens)
        return size

    def rewind(self, prompt: Sequence[int]) -> int:
        """Keep what `prompt` begins with, all of it but the last token at most; returns how many tokens are kept.

        A cache that cannot forget its last tokens is replaced by an empty one.
        """
        kept = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        surplus = len(self.tokens) - kept
        if self.broken or (surplus and not (kept and self.speaker.backend.crop(self.cache, surplus))):
            self.cache, kept = self.speaker.new_cache(), 0
        self.tokens, self.broken = self.tokens[:kept], False
        self.measure()
        return kept

    def answer(
        self, prompt: Sequence[int], choose: Callable, room: Callable[[Conversation, int], int]
    ) -> Iterator[int | Event]:
        """Tokens after `prompt`, without an end, and an event for every piece of the prompt that was read.

        A token enters the cache when the one after it is asked for. choose: the token for logits. room: how many of so many
        more tokens the cache may take in; where it says none, FULL comes again and again until it has some.
        """
        backend = self.speaker.backend
        rest = list(prompt[self.rewind(prompt) :])
        while len(rest) > 1:
            piece = room(self, min(len(rest) - 1, backend.PREFILL_CHUNK))
            if not piece:
                yield Event.FULL
                continue
            self._take_in(backend.read, rest[:piece])
            rest = rest[piece:]
            yield Event.READ
        while True:
            while not room(self, 1):
                yield Event.FULL
            logits = self._take_in(backend.feed, rest)
            rest = [choose(logits[-1])]
            yield rest[0]

    def _take_in(self, call: Callable, tokens: list[int]):
        self.broken = True
        out = call(self.speaker.model, tokens, self.cache)
        self.tokens += tokens
        self.broken = False
        return out


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common, from the first on."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""Caches of earlier conversations, from which later ones go on, within a limit of bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from .conversation import Conversation, Speaker, common_prefix

UNLIMITED = 1 << 62


class PromptCaches:
    """Conversations that go on, `active`, and those that wait to be gone on from, `stored`, the latest last.

    limit: bytes of the caches of all of them, as `cache_nbytes` counts. What two caches share counts twice. most: how many
    are stored.
    """

    def __init__(self, speaker: Speaker, limit: int | None = None, most: int = 64):
        self.speaker, self.limit, self.most = speaker, UNLIMITED if limit is None else limit, most
        self.stored: list[Conversation] = []
        self.active: list[Conversation] = []

    @property
    def most_nbytes(self) -> int:
        """Bytes of all conversations, at most."""
        return sum(held.most_nbytes for held in (*self.stored, *self.active))

    def begin(self, prompt: Sequence[int]) -> Conversation:
        """A conversation for `prompt`: one that goes on from the stored one with the most tokens in common, or a new one.

        The stored one stays as it is where there is room for both. Where there is none, it is gone on from itself, if at
        least half of it is in common.
        """
        found = max(self.stored, key=lambda held: self._common(held, prompt), default=None)
        common = self._common(found, prompt) if found is not None else 0
        if found is None or not common:
            held = Conversation(self.speaker, self.speaker.new_cache())
        elif self.most_nbytes + found.most_nbytes <= self.limit:
            self.stored = [*(other for other in self.stored if other is not found), found]
            held = Conversation(self.speaker, copy.deepcopy(found.cache), list(found.tokens))
        elif 2 * common >= len(found.tokens):
            self.stored.remove(found)
            held = found
        else:
            held = Conversation(self.speaker, self.speaker.new_cache())
        held.measure()
        self.active.append(held)
        return held

    def _common(self, held: Conversation, prompt: Sequence[int]) -> int:
        """How many tokens of `held` a conversation for `prompt` can go on from: all or none where it cannot be cropped."""
        common = common_prefix(held.tokens, prompt)
        whole = common == len(held.tokens) < len(prompt)
        return common if whole or self.speaker.backend.can_crop(held.cache) else 0

    def keep(self, held: Conversation) -> None:
        """Store a copy of what is `held` where it could not be cropped to this later, and there is room for it."""
        if self.speaker.backend.can_crop(held.cache):
            return
        if self.most_nbytes + int(held.measure()) <= self.limit and self.most:
            kept = Conversation(self.speaker, copy.deepcopy(held.cache), list(held.tokens))
            kept.measure()
            self.stored = [*self.stored, kept][-self.most :]

    def end(self, held: Conversation) -> None:
        """Store what is no longer active, in place of what it went on from."""
        self.active.remove(held)
        if held.broken or not held.tokens:
            return
        size = int(held.measure())
        if self.speaker.backend.can_crop(held.cache):  # then it serves for all that it begins with
            begun = [common_prefix(other.tokens, held.tokens) == len(other.tokens) for other in self.stored]
            self.stored = [other for other, prefix in zip(self.stored, begun) if not prefix]
        self._drop(self.limit - size)
        if size + sum(other.most_nbytes for other in self.active) <= self.limit:
            self.stored = [*self.stored, held][-self.most :] if self.most else []

    def room(self, held: Conversation, tokens: int) -> int:
        """How many of `tokens` more the cache of `held` may take in; stored ones are dropped for it, the oldest first."""
        needed = tokens * self.speaker.token_nbytes
        if self.most_nbytes + needed > self.limit:
            for other in self.active:
                other.measure()
            self._drop(self.limit - needed)
        return max(min(tokens, (self.limit - self.most_nbytes) // self.speaker.token_nbytes), 0)

    def _drop(self, most: int) -> None:
        """Drop stored caches until all together have `most` bytes, or none is left."""
        while self.stored and self.most_nbytes > most:
            del self.stored[0]

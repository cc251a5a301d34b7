"""mlx-lm's stored prompts and batches within a limit of bytes, and what the log says of every answer."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch
from mlx_lm.models.cache import LRUPromptCache

from spectral_kv_core.serving.requests import no_room

from .generation import cache_nbytes, token_nbytes

log = logging.getLogger("spectralkv")
REMEMBERED = 256  # prompts whose answer may still come
REFUSING = 0.02  # seconds between two looks at whether a client that was refused has gone


class StoredPrompts(LRUPromptCache):
    """mlx-lm's stored prompts; the log says of every answer how many tokens were reused, and what the cache holds."""

    def __init__(self, *args, limit: int | None = None, **options):
        """limit: bytes of these and of what is `active`, a batch that goes on."""
        super().__init__(*args, **options)
        self.limit, self.active = limit, None
        self.waiting: deque[tuple[list[int], int]] = deque(maxlen=REMEMBERED)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list | None, list[int]]:
        """As mlx-lm has it."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        self.waiting.append((list(tokens), len(tokens) - len(rest)))
        return cache, rest

    def insert_cache(self, model: Any, tokens: Sequence[int], prompt_cache: list, *, cache_type: str = "assistant"):
        """As mlx-lm has it."""
        self.tell(list(tokens), prompt_cache)
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        self.make_room(0)

    def make_room(self, nbytes: int) -> None:
        """Drop what was used longest ago until so many bytes are free within the limit, or nothing is left."""
        if self.limit is not None:
            active = 0 if self.active is None else self.active.prompt_cache_nbytes
            self.trim_to(n_bytes=self.limit - active - nbytes)

    def tell(self, tokens: list[int], cache: list) -> None:
        """Log a line about the answer that ends in `tokens`, if it is one."""
        found = next((known for known in self.waiting if tokens[: len(known[0])] == known[0]), None)
        if found is None:  # what a prompt begins with
            return
        self.waiting.remove(found)
        prompt, reused = found
        log.info(
            "%d tokens, %d of them of the prompt, %d reused: %s",
            len(tokens),
            len(prompt),
            reused,
            cache_nbytes(cache).described(),
        )


class BoundedBatches(BatchGenerator):
    """mlx-lm's batches within a limit of bytes.

    Before a step there is room for what it may add at most: stored prompts go for it, pieces of prompts get shorter, and
    prompts wait. Where an answer has no room it ends, as by its length. Where a prompt has none, and nobody is left who
    could make some, it is refused.
    """

    def __init__(self, model, *, stored: StoredPrompts, responses: Callable[[], Any], **options):
        super().__init__(model, **options)
        self.stored, self.responses, self.limit = stored, responses, stored.limit
        self.token_nbytes, self.step = token_nbytes(model), self.prefill_step_size
        self.queues: dict[int, Queue] = {}
        self.refused: set[int] = set()
        stored.active = self

    def insert_segments(self, *args, **options) -> list[int]:
        """As mlx-lm has it; whoever waits for the answer is known from now on."""
        uids = super().insert_segments(*args, **options)
        self.queues |= dict.fromkeys(uids, self.responses().queue)
        return uids

    def remove(self, uids, **options):
        """As mlx-lm has it."""
        for uid in uids:
            self.queues.pop(uid, None)
            self.refused.discard(uid)
        return super().remove(uids, **options)

    def next(self) -> tuple[list, list]:
        """As mlx-lm has it."""
        reading = self._reading()
        free = self._free(sum(wanted for _, wanted in reading))
        if reading and free < len(reading):
            if not len(self._generation_batch):
                return self._refuse(reading[-1][0]), []
            with mx.stream(self._stream):
                answers = self._generation_batch.next()
            return [], self._end_some(answers)
        if reading:
            self.prefill_step_size = min(self.step, free // len(reading))
        prompts, answers = super().next()
        return prompts, self._end_some(answers)

    def _reading(self) -> list[tuple[int, int]]:
        """Sequences that the next step reads a piece of, the youngest last, and how many tokens that may be."""
        begun = [
            (uid, min(len(segments[0]), self.step))
            for uid, (segments, *_) in zip(self._prompt_batch.uids, self._currently_processing)
            if len(segments) > 1 or len(segments[0]) > 1
        ]
        places = min(
            self.prefill_batch_size - len(self._prompt_batch), self.completion_batch_size - len(self._generation_batch)
        )
        waiting = list(self._unprocessed_sequences)[: max(places, 0)]
        return begun + [(sequence[0], min(len(sequence[1][0]), self.step)) for sequence in waiting]

    def _free(self, wanted: int) -> int:
        """Tokens that there is room for, beside those of answers; stored prompts go for `wanted` ones."""
        answering = 2 * (len(self._generation_batch) + len(self._prompt_batch)) * self.token_nbytes
        self.stored.make_room(answering + wanted * self.token_nbytes)
        free = self.limit - self.stored.nbytes - self.prompt_cache_nbytes - answering
        return max(free, 0) // self.token_nbytes

    def _refuse(self, uid: int) -> list:
        """Tell whoever waits for `uid` that there is no room. The sequence leaves when they have gone."""
        if uid not in self.refused:
            self.refused.add(uid)
            alone = len(self._prompt_batch) + len(self._unprocessed_sequences) == 1
            self.queues[uid].put(no_room(self.limit, alone))
        time.sleep(REFUSING)
        return [PromptProcessingBatch.Response(uid, (0, 1), False, False)]

    def _end_some(self, answers: list) -> list:
        """`answers`, of which the youngest end now where the next step has no room for them."""
        for answer in reversed(answers):
            self._free(0)
            needed = 2 * len(self._generation_batch) * self.token_nbytes
            if self.prompt_cache_nbytes + needed <= self.limit:
                break
            if answer.finish_reason is None:
                with mx.stream(self._stream):
                    cache, tokens = self.extract_cache([answer.uid])[answer.uid]
                    self.remove([answer.uid])
                answer.finish_reason, answer.prompt_cache, answer.all_tokens = "length", cache, tokens
        for answer in answers:
            if answer.finish_reason is not None:
                self.queues.pop(answer.uid, None)
        return answers

"""The thread that answers requests: several at a time, which take turns step by step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from .conversation import Conversation, Event
from .prompt_caches import UNLIMITED, PromptCaches
from .requests import Completion, RequestError, no_room
from .sampling import Sampler
from .stop_texts import StoppingText

log = logging.getLogger("spectralkv")
IDLE = 0.2  # seconds between two looks at whether to stop


@dataclass(frozen=True)
class End:
    """How an answer ended: `stop` or `length`."""

    reason: str


@dataclass(eq=False)
class Job:
    """A request under way. events: pieces of text, then `End` or a RequestError. reused: tokens that were not read again."""

    asked: Completion
    prompt: list[int]
    label: str
    events: SimpleQueue = field(default_factory=SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    reused: int = 0
    generated: int = 0
    ended: str = "failed"

    def usage(self) -> dict:
        """Tokens, as OpenAI's API counts them."""
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": self.generated,
            "total_tokens": len(self.prompt) + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }


class Worker(threading.Thread):
    """Answers jobs, at most `most` at a time; further ones wait. Only this thread calls the model and touches caches."""

    def __init__(self, caches: PromptCaches, most: int):
        super().__init__(name="spectralkv worker", daemon=True)
        self.caches, self.most = caches, most
        self.speaker = caches.speaker
        self.ends = self.speaker.backend.end_tokens(self.speaker.model, self.speaker.tokenizer)
        self.waiting: SimpleQueue[Job] = SimpleQueue()
        self.running: dict[Job, Iterator[bool]] = {}
        self.stopping = threading.Event()
        self.failure: Exception | None = None  # what has ended the thread

    def stop(self) -> None:
        """End all jobs, and wait for that."""
        self.stopping.set()
        self.join()

    def run(self) -> None:
        """Take turns until `stop`."""
        try:
            while not self.stopping.is_set():
                self._admit()
                moved = [self._step(job) for job in list(self.running)]
                if moved and not any(moved):
                    self._refuse_one()
            for job in list(self.running):
                self._end(job, RequestError(503, "The server stops."))
        except Exception as error:
            self.failure = error

    def _admit(self) -> None:
        while len(self.running) < self.most:
            try:
                job = self.waiting.get(block=not self.running, timeout=IDLE)
            except Empty:
                return
            self.running[job] = self._answer(job)

    def _step(self, job: Job) -> bool:
        """Let `job` take its turn; returns whether it came further."""
        try:
            return next(self.running[job])
        except StopIteration:
            self._end(job, End(job.ended))
        except RequestError as error:
            self._end(job, error)
        except Exception as error:
            log.error("%s failed: %s: %s", job.label, type(error).__name__, str(error)[:500])
            self._end(job, RequestError(500, "The answer failed. The log of the server says why."))
        return True

    def _end(self, job: Job, last: End | RequestError) -> None:
        self.running.pop(job).close()  # type: ignore[attr-defined]  # a generator
        job.events.put(last)

    def _answer(self, job: Job) -> Iterator[bool]:
        """Answer step by step; yields whether there was room for the step."""
        if job.cancelled.is_set():
            return
        asked, backend = job.asked, self.speaker.backend
        held = self.caches.begin(job.prompt)
        text = StoppingText(backend.text_stream(self.speaker.tokenizer), asked.stops)
        choose = Sampler(asked.temperature, asked.top_p, None if asked.seed is None else asked.seed % 2**63)
        try:
            job.reused = held.rewind(job.prompt)
            for event in held.answer(job.prompt, choose, self.caches.room):
                if job.cancelled.is_set():
                    job.ended = "cancelled"
                    return
                if isinstance(event, int):
                    if not job.generated:  # the cache holds the prompt and nothing else
                        self.caches.keep(held)
                    self._take(job, text, event)
                elif event is Event.FULL and job.generated:
                    job.ended = "length"
                if job.ended in ("stop", "length"):
                    job.events.put(text.end())
                    return
                yield event is not Event.FULL
        finally:
            self.caches.end(held)
            self._tell(job, held)

    def _take(self, job: Job, text: StoppingText, token: int) -> None:
        job.generated += 1
        if token not in self.ends:
            job.events.put(text.token(token))
        if token in self.ends or text.stopped:
            job.ended = "stop"
        elif job.generated >= job.asked.most:
            job.ended = "length"

    def _refuse_one(self) -> None:
        """End the youngest job: all wait for room that nobody gives back."""
        job = list(self.running)[-1]
        job.ended = "refused"
        self._end(job, no_room(self.caches.limit, alone=len(self.running) == 1))

    def _tell(self, job: Job, held: Conversation) -> None:
        """Log a line: tokens of the answer, and bytes of the conversation and of all that is held."""
        size = "nothing" if held.broken else self.speaker.backend.cache_nbytes(held.cache).described()
        held_by_all = f"{self.caches.most_nbytes:,} bytes"
        within = "" if self.caches.limit >= UNLIMITED else f" of {self.caches.limit:,}"
        log.info(
            "%s: %d tokens, %d of them reused, %d generated, %s; its cache: %s; all caches: at most %s%s",
            job.label, len(job.prompt), job.reused, job.generated, job.ended, size, held_by_all, within,
        )  # fmt: skip

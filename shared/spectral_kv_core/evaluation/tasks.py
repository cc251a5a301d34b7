"""The tasks of an evaluation: what is fed to the plain cache and to compressed ones, and what is measured on the way.

Works on any module with the names of a backend's `generation`. Every prefix is read once, by the plain cache in one
call; compressed caches take its keys and values over, since a single call to an empty cache attends exactly. Those that
drop tokens read the same tokens themselves, in one call too: their scorers may look at queries. A method for files is
measured through the plain cache that its file fills, and has the bits of that file.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.divergence import compare_logits, compare_tokens
from ..cache.request import CacheRequest
from ..codecs.tiers import GROUP
from ..planning.methods import Method
from ..planning.plan import Plan
from ..scorers import get_scorer
from .documents import Document
from .fidelity import output_errors, output_perturbation, relative_error, sealed_span, spectral_fidelity

LOW_PPL = 2.0  # a text this predictable was learned by heart or repeats itself: little can go wrong on it


@dataclass(frozen=True, eq=False)  # a job is itself: plans are not compared
class Job:
    """One compressed cache to measure; `keep`: share of the prefix's tokens for a method that drops some, else None.

    rounding_scores, tiers, wavelet: as in `make_prompt_cache`, None where the method's own rounding, plain bits and the
    scorer's own wavelet are used.
    """

    method: Method
    bits: float
    plan: Plan
    plan_hash: str
    keep: float | None = None
    rounding_scores: str | None = None
    tiers: tuple[tuple[float, float], ...] | None = None
    wavelet: str | None = None

    @property
    def block(self) -> int:
        """Tokens that are sealed together."""
        return GROUP if self.tiers else self.method.block

    def budget_tokens(self, prefix: int) -> int | None:
        return None if self.keep is None else round(self.keep * prefix)

    def request(self, prefix: int, window: int, sinks: int) -> CacheRequest:
        """What asks for this cache, with `window` and `sinks`, after a prefix of so many tokens."""
        return CacheRequest(
            method=self.method,  # with its rounding
            bits=None if self.tiers else self.bits,
            window=window,
            sinks=sinks,
            budget_tokens=self.budget_tokens(prefix),
            tiers=self.tiers,
            wavelet=self.wavelet,
        )


@dataclass(frozen=True)
class Compressed:
    """A prefix under a job: the cache to go on with, the logits [1, V] after it, and the cache of a method for files."""

    cache: Any
    before: np.ndarray
    file: Any = None


@dataclass(frozen=True)
class Turn:
    """A turn of the task `drift`: the prompt `piece`, then `labels`, with the plain cache as it is between the two.

    context: all tokens before the labels. before, logits, attended: the plain cache's logits after the piece and for the
    labels, and its attention calls there.
    """

    piece: list[int]
    labels: list[int]
    context: list[int]
    plain: Any
    before: np.ndarray
    logits: np.ndarray
    attended: dict


class Runner:
    """Runs jobs with one model."""

    def __init__(self, backend, model, settings):
        self.backend, self.model, self.settings = backend, model, settings
        self.layers = backend.model_shape(model)[0].layers

    def measure(self, document: Document, todo: dict[str, list[Job]]) -> Iterator[tuple[str, Job, dict]]:
        """(task, job, numbers) of everything in `todo`, each as soon as it is there; `drift` gives one per `turn`."""
        if not any(todo.values()):
            return
        plain = self.backend.plain_cache(self.model)
        after_prefix = self.backend.feed(self.model, document.prefix, plain)  # predicts the first scored token
        tasks = {"text": self._text, "copy": self._copy, "drift": self._drift, "needle": self._needle}
        for task, jobs in todo.items():
            if jobs:
                yield from ((task, *found) for found in tasks[task](document, jobs, plain, after_prefix))

    def _text(self, document: Document, jobs: list[Job], plain, after_prefix) -> Iterator[tuple[Job, dict]]:
        """Score what really follows; generate from the same place; compare what the cache holds of the prefix."""
        settings, greedy = self.settings, None
        if settings.greedy:
            greedy = self._generated(self._copied(plain), after_prefix)
        for job, numbers, made in self._scored(document.scored["text"], document, jobs, plain, after_prefix):
            started = time.perf_counter()
            if "reconstruction" in settings.metrics:
                numbers |= self._reconstruction(job, plain, made, len(document.prefix))
            if greedy:
                numbers |= compare_tokens(greedy, self._generated(made.cache, made.before))
            numbers["seconds"] += time.perf_counter() - started
            if numbers["ppl_ref"] < LOW_PPL:
                numbers["low_ppl"] = True
            yield job, numbers

    def _copy(self, document: Document, jobs: list[Job], plain, after_prefix) -> Iterator[tuple[Job, dict]]:
        """Score a span of the prefix, repeated."""
        for job, numbers, _ in self._scored(document.scored["copy"], document, jobs, plain, after_prefix):
            yield job, numbers

    def _scored(self, labels: list[int], document: Document, jobs: list[Job], plain, after_prefix):
        """(job, numbers, the `Compressed` prefix, not gone on with) of every job."""
        cache = self._copied(plain)
        with self.backend.recorded(self.model, cache, self._recorded_layers) as attended:
            reference = self._logits(cache, after_prefix, labels)
        del cache
        for job in jobs:
            started = time.perf_counter()
            made = self._compressed(job, document.prefix, plain, after_prefix)
            cache = copy.deepcopy(made.cache)
            logits = self._logits(cache, made.before, labels)
            numbers = compare_logits(reference, logits, labels) | {"scored_tokens": len(labels)}
            numbers |= self._sizes(job, cache if made.file is None else made.file)
            del cache
            numbers |= self._perturbation(copy.deepcopy(made.cache), attended)
            yield job, numbers | {"seconds": time.perf_counter() - started}, made

    def _drift(self, document: Document, jobs: list[Job], plain, after_prefix) -> Iterator[tuple[Job, dict]]:
        """Turns on one cache: a piece of prompt, then scored tokens that enter as generated ones do.

        kl_fresh: the same tokens with a cache made at that turn of what the plain cache holds before them.
        """
        turns = list(self._turns(document, plain))
        for job in jobs:
            cache = self._compressed(job, document.prefix, plain, after_prefix).cache
            for number, turn in enumerate(turns, 1):
                started = time.perf_counter()
                before = self.backend.feed(self.model, turn.piece, cache)
                numbers = self._perturbation(copy.deepcopy(cache), turn.attended)
                logits = self._logits(cache, before, turn.labels)
                numbers |= compare_logits(turn.logits, logits, turn.labels) | self._sizes(job, cache)
                fresh = self._read(job, len(document.prefix), turn.context, turn.plain)
                logits = self._logits(fresh, turn.before, turn.labels)
                numbers["kl_fresh"] = compare_logits(turn.logits, logits, turn.labels)["kl"]
                self.backend.feed(self.model, turn.labels[-1:], cache)
                numbers |= {"turn": number, "context": len(turn.context), "scored_tokens": len(turn.labels)}
                yield job, numbers | {"seconds": time.perf_counter() - started}

    def _turns(self, document: Document, plain) -> Iterator[Turn]:
        settings, cache, tokens = self.settings, self._copied(plain), document.scored["drift"]
        length = settings.turn_tokens + settings.scored
        for start in range(0, len(tokens), length):
            piece, labels = tokens[start : start + settings.turn_tokens], tokens[start + settings.turn_tokens :]
            labels = labels[: settings.scored]
            before = self.backend.feed(self.model, piece, cache)
            held = self._copied(cache)
            with self.backend.recorded(self.model, cache, self._recorded_layers) as attended:
                logits = self._logits(cache, before, labels)
            self.backend.feed(self.model, labels[-1:], cache)
            context = document.prefix + tokens[: start + len(piece)]
            yield Turn(piece, labels, context, held, before, logits, attended)

    def _needle(self, document: Document, jobs: list[Job], plain, after_prefix) -> Iterator[tuple[Job, dict]]:
        """Ask for a number in the prefix after it was compressed; score the digits, given the ones before."""
        tokens = document.scored["needle"]
        question, answer = tokens[: -document.answer], tokens[-document.answer :]

        def answered(cache) -> np.ndarray:
            return self._logits(cache, self.backend.feed(self.model, question, cache), answer)

        reference = answered(self._copied(plain))
        for job in jobs:
            started = time.perf_counter()
            made = self._compressed(job, document.prefix, plain, after_prefix)
            logits = answered(made.cache)
            numbers = compare_logits(reference, logits, answer)
            yield (
                job,
                {
                    "found": bool((logits.argmax(-1) == answer).all()),
                    "found_ref": bool((reference.argmax(-1) == answer).all()),
                    "needle_kl": numbers["kl"],
                    "needle_logp": -math.log(numbers["ppl"]),
                    "needle_logp_ref": -math.log(numbers["ppl_ref"]),
                    "scored_tokens": len(answer),
                    **self._sizes(job, made.cache if made.file is None else made.file),
                    "seconds": time.perf_counter() - started,
                },
            )

    def _compressed(self, job: Job, prefix: list[int], plain, after_prefix: np.ndarray) -> Compressed:
        """What `job` makes of `prefix`, which `plain` has read."""
        settings = self.settings
        if not job.method.live:  # a file holds what a plain cache read, and fills a plain cache
            file = self.backend.encode_cache(job.plan, plain, settings.sinks, settings.window)
            return Compressed(self.backend.decode_cache(file, self.model), after_prefix, file)
        if settings.prefill_chunk is None or settings.prefill_chunk >= len(prefix):
            return Compressed(self._read(job, len(prefix), prefix, plain), after_prefix)
        cache = self._empty(job, len(prefix))
        for start in range(0, len(prefix), settings.prefill_chunk):
            before = self.backend.feed(self.model, prefix[start : start + settings.prefill_chunk], cache)
        return Compressed(cache, before)

    def _read(self, job: Job, prefix: int, tokens: list[int], plain):
        """A compressed cache of `tokens`, which `plain` holds and `prefix` begin, as one call with all of them leaves it."""
        cache = self._empty(job, prefix)
        if job.method.scorer is not None and get_scorer(job.method.scorer).needs_recent:
            self.backend.feed(self.model, tokens, cache)  # the text's own queries decide
        else:
            self.backend.fill(cache, plain)
        return cache

    def _empty(self, job: Job, prefix: int):
        request = job.request(prefix, self.settings.window, self.settings.sinks)
        return self.backend.build_cache(self.model, job.plan.profile, request)

    def _copied(self, plain):
        cache = self.backend.plain_cache(self.model)
        self.backend.fill(cache, plain)
        return cache

    def _logits(self, cache, before: np.ndarray, labels: list[int]) -> np.ndarray:
        """Logits [len(labels), V] for the tokens `labels`, fed `step` at a time; `before` [1, V] predict the first."""
        logits, step = [before], self.settings.step
        for start in range(0, len(labels) - 1, step):
            part = labels[start : min(start + step, len(labels) - 1)]
            logits.append(self.backend.feed(self.model, part, cache, len(part)))
        return np.concatenate(logits)

    def _generated(self, cache, before: np.ndarray) -> list[int]:
        """Greedy tokens, the end of a text ignored; `before` [1, V] predict the first."""
        tokens = [int(before.argmax())]
        while len(tokens) < self.settings.greedy:
            tokens.append(int(self.backend.feed(self.model, tokens[-1:], cache).argmax()))
        return tokens

    @property
    def _recorded_layers(self) -> tuple[int, ...]:
        return self.layers if "aop" in self.settings.metrics else ()

    def _perturbation(self, cache, attended: dict) -> dict:
        """AOP of `cache`, which takes in the new keys and values of the plain cache's calls and attends with its queries."""
        if not attended:
            return {}
        errors = [
            [output_errors(call.outputs, self.backend.attend(cache, layer_idx, call)) for call in calls]  # [Hq, L]
            for layer_idx, calls in attended.items()
        ]
        return output_perturbation([np.concatenate(layer, axis=-1) for layer in errors])

    def _reconstruction(self, job: Job, plain, made: Compressed, tokens: int) -> dict:
        """Errors of the keys and values that are sealed, and how their spectra over time fit: means over layers."""
        span = sealed_span(tokens, self.settings.sinks, self.settings.window, job.block)
        sums = np.zeros(3)
        held = self.backend.held_vectors(made.cache if made.file is None else made.file, self.layers)
        for exact, (*vectors, positions) in zip(self.backend.held_vectors(plain, self.layers), held):
            errors = [relative_error(x, y, positions, span) for x, y in zip(exact, vectors)]
            spectra = [spectral_fidelity(x, y, positions, span) for x, y in zip(exact, vectors)]
            sums += np.array([*errors, np.mean(spectra)])
        return dict(zip(("key_error", "value_error", "spectral_fidelity"), (sums / len(self.layers)).tolist()))

    def _sizes(self, job: Job, stored) -> dict:
        size = self.backend.cache_nbytes(stored)
        return {
            "cache_bytes": int(size),
            "bytes_by_kind": size.by_kind,
            "exact_tokens": size.exact_tokens,
            "dense_bytes": size.dense_nbytes,
            "compression": size.compression,
            "bits_per_element": size.bits_per_element,
            "table_bytes": size.table_nbytes,
            "sealed_bits": job.plan.bits_per_element if job.method.live else self.backend.sealed_bits(stored),
        }

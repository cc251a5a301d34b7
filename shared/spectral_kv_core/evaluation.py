"""What compression costs: a compressed cache against the plain one, on text after a prefix that both have read.

Works on any module with the names of a backend's `generation`. Every document's prefix is read once, by the plain
cache in one call; compressed caches take its keys and values over, since a single call to an empty cache attends
exactly. A method for files is measured through the plain cache that its file fills, and has the bits of that file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import __version__
from .divergence import compare_logits
from .evaluation_rows import RowFile, summarise
from .evaluation_text import Text, copy_span, split_documents
from .methods import PAIRS, Method, get_method
from .plan import Plan, bits_range, make_plan
from .profile import Profile
from .profile_store import auto_profile

log = logging.getLogger("spectralkv")
TASKS = ("text", "copy")  # score what really follows; score a span of the prefix, repeated
SUITES = {
    "quick": {"prefixes": (1024,), "documents": 2, "scored": 64, "tasks": TASKS},
    "full": {"prefixes": (1024, 2048), "documents": 4, "scored": 128, "tasks": TASKS},
}
DEFAULT_BITS = (4.0, 3.0, 2.0)
LOW_PPL = 2.0  # a text this predictable was learnt by heart or repeats itself: little can go wrong on it


@dataclass(frozen=True)
class Settings:
    """What to measure, in tokens: `prefixes` read, then `scored` tokens, `step` per model call.

    prefill_chunk: tokens per call of the prefix, through the compressed cache itself; None reads it in one call.
    """

    methods: tuple[str, ...]
    bits: tuple[float, ...] = DEFAULT_BITS
    tasks: tuple[str, ...] = TASKS
    prefixes: tuple[int, ...] = (1024,)
    scored: int = 64
    documents: int = 2
    step: int = 1
    prefill_chunk: int | None = None
    window: int = 64
    sinks: int = 4

    def __post_init__(self):
        for name, values in (("methods", self.methods), ("tasks", self.tasks), ("prefix", self.prefixes)):
            if not values:
                raise ValueError(f"Expected at least one value for --{name}, received none.")
        for name in self.methods:
            get_method(name)
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"Expected tasks among {', '.join(TASKS)}, received {task!r}.")
        for bits in self.bits:
            if not (math.isfinite(bits) and bits > 0):
                raise ValueError(f"Expected bits above 0, received {bits:g}.")
        chunk = 1 if self.prefill_chunk is None else self.prefill_chunk
        numbers = [
            ("prefix", prefix, 2) for prefix in self.prefixes
        ]  # a tokenizer's own first token, and one of the text
        numbers += [("scored", self.scored, 2), ("documents", self.documents, 1), ("step", self.step, 1)]
        numbers += [("prefill-chunk", chunk, 1), ("window", self.window, 0), ("sinks", self.sinks, 0)]
        for name, value, least in numbers:  # the first scored token is predicted by the prefix alone
            if value < least:
                raise ValueError(f"Expected --{name} of at least {least}, received {value}.")
        if "copy" in self.tasks:
            for prefix in self.prefixes:
                copy_span(prefix, self.scored, self.sinks, self.window)


@dataclass(frozen=True)
class Job:
    """One compressed cache to measure."""

    method: Method
    bits: float
    plan: Plan
    plan_hash: str


@dataclass(frozen=True)
class Document:
    """One of the documents of a text: a prefix, and what is scored after it by task."""

    text: Text
    index: int
    prefix: list[int]
    scored: dict[str, list[int]]

    def digest(self, task: str) -> str:
        """Identifies the tokens that `task` feeds."""
        return hashlib.sha256(json.dumps(self.prefix + self.scored[task]).encode()).hexdigest()[:16]


def evaluate(
    backend,
    model,
    tokenizer,
    settings: Settings,
    texts: list[Text],
    output: str | os.PathLike,
    *,
    names: dict[str, str],
    profile: Profile | None = None,
) -> dict:
    """Measure every method on every document; finished rows of `output`/rows.jsonl are kept and not run again.

    names: `model` and `backend` as rows call them. profile None looks for one, and calibrates if there is none. Returns
    `rows` (summaries), `documents` (the rows behind them), `skipped` (pairs of method and bits that cannot be
    reached), and what identifies the run. Raises ValueError before the model runs for anything that cannot work.
    """
    documents = make_documents(tokenizer, texts, settings, backend.context_limit(model))
    Path(output).mkdir(parents=True, exist_ok=True)
    finished = RowFile(Path(output) / "rows.jsonl")
    jobs, skipped = plan_jobs(backend, model, tokenizer, settings, profile)
    common = {
        **names,
        "weights": backend.weights_digest(model),
        "dtype": str(backend.model_dtype(model)).rpartition(".")[2],
        "library_version": __version__,
    }
    keys = {
        (d, task, j): _key(document, task, job, settings, common)
        for d, document in enumerate(documents)
        for task in document.scored
        for j, job in enumerate(jobs)
    }
    done = sum(finished.find(key) is not None for key in keys.values())
    with tqdm(total=len(keys), initial=done, desc="eval", unit="row") as bar:
        for d, document in enumerate(documents):
            todo = {
                task: [job for j, job in enumerate(jobs) if finished.find(keys[d, task, j]) is None]
                for task in document.scored
            }
            for task, job, numbers in _measure(backend, model, document, todo, settings):
                finished.append(_key(document, task, job, settings, common) | numbers)
                bar.update()
    rows = [finished.find(key) for key in keys.values()]
    low = sorted({row["text"] for row in rows if row.get("low_ppl")})
    if low:
        log.warning(
            "The plain cache's perplexity on %s is below %g: such a text says little about quality.",
            ", ".join(low),
            LOW_PPL,
        )
    return {
        "rows": summarise(rows),
        "documents": rows,
        "skipped": skipped,
        **{key: value for key, value in common.items() if key != "library_version"},
        "versions": versions(backend),
        "settings": asdict(settings) | {"texts": {text.name: text.digest for text in texts}},
    }


def make_documents(tokenizer, texts: list[Text], settings: Settings, limit: int | None) -> list[Document]:
    """All documents of all texts and prefixes; `limit`: the model's context in tokens, None when unknown."""
    longest = max(settings.prefixes) + settings.scored
    if limit and longest > limit:
        raise ValueError(
            f"Expected at most {limit:,} tokens, the model's context, received {max(settings.prefixes):,} of prefix and "
            f"{settings.scored:,} scored. Lower --prefix or --scored."
        )
    documents = []
    for text in texts:
        for prefix in settings.prefixes:
            pieces = split_documents(tokenizer, text, prefix + settings.scored, settings.documents)
            for index, tokens in enumerate(pieces):
                scored = {"text": tokens[prefix:]}
                if "copy" in settings.tasks:
                    scored["copy"] = tokens[slice(*copy_span(prefix, settings.scored, settings.sinks, settings.window))]
                documents.append(
                    Document(text, index, tokens[:prefix], {task: scored[task] for task in settings.tasks})
                )
    return documents


def plan_jobs(
    backend, model, tokenizer, settings: Settings, profile: Profile | None = None
) -> tuple[list[Job], list[dict]]:
    """Every pair of method and bits with its plan, and the pairs that cannot be reached, which are named.

    A method without a choice of bits comes once. Raises ValueError when no pair is left or the profile does not fit.
    """
    shape, passed = backend.model_shape(model)
    if not shape.layers:
        raise ValueError(
            f"Expected full-attention layers to compress, received only: {', '.join(set(passed.values()))}."
        )
    jobs, skipped = [], []
    for method in dict.fromkeys(map(get_method, settings.methods)):
        found = None
        if method.basis_set:
            found = profile or auto_profile(
                shape,
                method.basis_set,
                partial(backend.SpectralProfiler(pairs=method.basis_set == PAIRS).profile_from_model, model, tokenizer),
            )
            found.check(shape)
            found.basis_set(method.basis_set)
        low, high = bits_range(method)
        for bits in dict.fromkeys(settings.bits) if low < high else [low]:
            try:
                plan = make_plan(shape, found, method, bits)
                jobs.append(Job(method, bits, plan, plan.hash))
            except ValueError as error:
                log.warning("Skipped %s at %g bits: %s", method.name, bits, error)
                skipped.append({"method": method.name, "bits": bits, "reason": str(error)})
    if not jobs:
        raise ValueError(
            f"Expected a method and bits that it can reach, received methods {', '.join(settings.methods)} with bits "
            f"{', '.join(f'{b:g}' for b in settings.bits)}: {skipped[-1]['reason']}"
        )
    return jobs, skipped


def _measure(backend, model, document: Document, todo: dict[str, list[Job]], settings: Settings):
    """(task, job, numbers) of everything in `todo`, each as soon as it is there."""
    if not any(todo.values()):
        return
    plain = backend.plain_cache(model)
    after_prefix = backend.feed(model, document.prefix, plain)  # predicts the first scored token
    for task, jobs in todo.items():
        if not jobs:
            continue
        labels = document.scored[task]
        cache = backend.plain_cache(model)
        backend.fill(cache, plain)
        reference = _score(backend, model, cache, after_prefix, labels, settings.step)
        del cache
        for job in jobs:
            started = time.perf_counter()
            if job.method.live:
                cache, before = _live_cache(backend, model, document, job, plain, after_prefix, settings)
                logits = _score(backend, model, cache, before, labels, settings.step)
                stored, sealed_bits = cache, job.plan.bits_per_element
            else:  # a file holds what a plain cache read, and fills a plain cache
                stored = backend.encode_cache(job.plan, plain, settings.sinks, settings.window)
                cache, sealed_bits = backend.decode_cache(stored, model), backend.sealed_bits(stored)
                logits = _score(backend, model, cache, after_prefix, labels, settings.step)
            seconds = time.perf_counter() - started
            size = backend.cache_nbytes(stored)
            del cache, stored
            numbers = compare_logits(reference, logits, labels) | {
                "scored_tokens": len(labels),
                "cache_bytes": int(size),
                "dense_bytes": size.dense_nbytes,
                "compression": size.compression,
                "bits_per_element": size.bits_per_element,
                "table_bytes": size.table_nbytes,
                "sealed_bits": sealed_bits,
                "seconds": seconds,
            }
            if task == "text" and numbers["ppl_ref"] < LOW_PPL:
                numbers["low_ppl"] = True
            yield task, job, numbers


def _live_cache(backend, model, document: Document, job: Job, plain, after_prefix, settings: Settings) -> tuple:
    """A compressed cache that holds the prefix of `document`, and what then predicts the first scored token."""
    cache = backend.make_prompt_cache(
        model, job.plan.profile, job.bits, method=job.method, window=settings.window, sinks=settings.sinks
    )
    if settings.prefill_chunk is None or settings.prefill_chunk >= len(document.prefix):
        backend.fill(cache, plain)
        return cache, after_prefix
    for start in range(0, len(document.prefix), settings.prefill_chunk):
        before = backend.feed(model, document.prefix[start : start + settings.prefill_chunk], cache)
    return cache, before


def _score(backend, model, cache, before: np.ndarray, labels: list[int], step: int) -> np.ndarray:
    """Logits [len(labels), V] for the tokens `labels`, fed `step` at a time; `before` [1, V] predict the first."""
    logits = [before]
    for start in range(0, len(labels) - 1, step):
        part = labels[start : min(start + step, len(labels) - 1)]
        logits.append(backend.feed(model, part, cache, len(part)))
    return np.concatenate(logits)


def _key(document: Document, task: str, job: Job, settings: Settings, common: dict) -> dict:
    return {
        "method": job.method.name,
        "bits": job.bits,
        "task": task,
        "text": document.text.name,
        "text_digest": document.text.digest,
        "document": document.index,
        "document_digest": document.digest(task),
        "prefix": len(document.prefix),
        "scored": settings.scored,
        "step": settings.step,
        "prefill_chunk": settings.prefill_chunk,
        "window": settings.window,
        "sinks": settings.sinks,
        "plan": job.plan_hash,
        **common,
    }


def versions(backend) -> dict[str, str]:
    """Versions that a result belongs to: ours, NumPy's, and the host's."""
    found = {"spectralkv": __version__, "numpy": np.__version__}
    for package in backend.HOST_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # mlx has other names on some platforms
            continue
    return found

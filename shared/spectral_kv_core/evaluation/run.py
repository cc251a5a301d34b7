"""What compression costs: compressed caches against the plain one, over texts, methods, bits and tasks.

Works on any module with the names of a backend's `generation`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..codecs.registry import bits_range, make_plan, usable_method
from ..codecs.tiers import make_tiered_plan, mean_bits, name_tiers
from ..errors import UsageError
from ..files.locking import one_process
from ..planning.methods import Method, get_method, rounded_by
from ..profile.basis_set import PAIRS, WHOLE_MODEL
from ..profile.profile import Profile
from ..profile.store import auto_profile
from .documents import Document, make_documents
from .records import RecordFile, record_key, summarize
from .settings import METRICS, Settings, drops_tokens, has_wavelet, rounds, unreachable
from .tasks import LOW_PPL, Job, Runner
from .text import Text

log = logging.getLogger("spectralkv")

Place: TypeAlias = tuple[int, str, Job]  # of a record: which document, the task and the cache
Tiers: TypeAlias = tuple[tuple[float, float], ...]  # (share, bits) pairs


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
    """Measure every method on every document; finished records of `output`/rows.jsonl are kept and not run again.

    names: `model` and `backend` as records call them. profile None looks for one, and calibrates if there is none. Returns
    `rows` (summaries), `documents` (the records behind them), `skipped` (pairs of method and bits that cannot be reached, or
    that a task is not for), `layers` (the indices that `aop_layers` are of), and what identifies the run. Raises UsageError
    before the model runs for anything that cannot work.
    """
    documents = make_documents(tokenizer, texts, settings, backend.context_limit(model))
    Path(output).mkdir(parents=True, exist_ok=True)
    with one_process(
        Path(output) / ".lock", f"Another evaluation writes to {output}: waiting for it, to go on from its records."
    ):
        return _evaluate(backend, model, tokenizer, settings, texts, output, documents, names, profile)


def _evaluate(
    backend,
    model,
    tokenizer,
    settings: Settings,
    texts: list[Text],
    output: str | os.PathLike,
    documents: list[Document],
    names: dict[str, str],
    profile: Profile | None,
) -> dict:
    """`evaluate`, while no other process does so in the same folder."""
    finished = RecordFile(Path(output) / "rows.jsonl")
    jobs, skipped = plan_jobs(backend, model, tokenizer, settings, profile)
    common = {
        **names,
        "weights": backend.weights_digest(model),
        "dtype": str(backend.model_dtype(model)).rpartition(".")[2],
        "library_version": __version__,
    }
    keys, unfit = _plan_records(documents, jobs, settings, common)
    runner = Runner(backend, model, settings)
    records = _run_records(runner, documents, jobs, keys, finished)
    _warn_of_low_perplexity(records)
    return {
        "rows": summarize(records),
        "documents": records,
        "skipped": skipped + unfit,
        "layers": list(runner.layers),
        **{key: value for key, value in common.items() if key != "library_version"},
        "versions": versions(backend),
        "settings": asdict(settings) | {"texts": {text.name: text.digest for text in texts}},
    }


def _plan_records(
    documents: list[Document], jobs: list[Job], settings: Settings, common: dict
) -> tuple[dict[Place, list[dict]], list[dict]]:
    """What identifies the records of every place, and the pairs of job and task that do not go together, by name."""
    skipped = []
    for job, task in product(jobs, settings.tasks):
        if not _runs(task, job):
            reason = f"{job.method.name} is for files, the task {task} needs a live cache"
            log.warning("Skipped %s at %g bits in the task %s: %s.", job.method.name, job.bits, task, reason)
            skipped.append({"method": job.method.name, "bits": job.bits, "task": task, "reason": reason})
    keys = {
        (d, task, job): _keys(document, task, job, settings, common)
        for d, document in enumerate(documents)
        for task, job in product(document.scored, jobs)
        if _runs(task, job)
    }
    return keys, skipped


def _run_records(
    runner: Runner, documents: list[Document], jobs: list[Job], keys: dict[Place, list[dict]], finished: RecordFile
) -> list[dict]:
    """The record of every key, in their order; what `finished` lacks is measured now and added to it."""

    def missing(place: Place) -> list[dict]:
        return [key for key in keys.get(place, ()) if finished.find(key) is None]

    total = sum(map(len, keys.values()))
    with tqdm(
        total=total, initial=total - sum(len(missing(place)) for place in keys), desc="eval", unit="record"
    ) as bar:
        for d, document in enumerate(documents):
            todo = {task: [job for job in jobs if missing((d, task, job))] for task in document.scored}
            for task, job, numbers in runner.measure(document, todo):
                key = keys[d, task, job][numbers.get("turn", 1) - 1]
                if finished.find(key) is None:  # turns are run again from the first on
                    now = datetime.now(UTC).isoformat(timespec="seconds")
                    finished.append(key | numbers | {"date": now})
                    bar.update()
    return [finished.records[record_key(key)] for group in keys.values() for key in group]


def _warn_of_low_perplexity(records: list[dict]) -> None:
    low = sorted({record["text"] for record in records if record.get("low_ppl")})
    if low:
        log.warning(
            "The plain cache's perplexity on %s is below %g: such a text says little about quality.",
            ", ".join(low),
            LOW_PPL,
        )


def plan_jobs(
    backend, model, tokenizer, settings: Settings, profile: Profile | None = None
) -> tuple[list[Job], list[dict]]:
    """Every pair of method and bits with its plan, and the pairs that cannot be reached, which are named.

    A method without a choice of bits comes once. Raises UsageError when no pair is left or the profile does not fit.
    """
    shape, passed = backend.model_shape(model)
    if not shape.layers:
        raise UsageError(
            f"Expected full-attention layers to compress, received only: {', '.join(set(passed.values()))}."
        )
    jobs, skipped = [], []
    for method in dict.fromkeys(usable_method(get_method(name)) for name in settings.methods):
        found = None
        if method.profile_set:
            found = profile or auto_profile(
                shape, method.profile_set, partial(_calibrated, backend, model, tokenizer, method.profile_set)
            )
            found.check(shape)
            found.basis_set(method.profile_set)
        for bits, scorer, tiers in _plans_of(method, settings):
            try:
                made = rounded_by(method, scorer)
                plan = make_tiered_plan(shape, found, made, tiers) if tiers else make_plan(shape, found, made, bits)
                jobs += [
                    Job(made, bits, plan, plan.hash, keep, scorer, tiers, wavelet)
                    for keep, wavelet in _caches_of(method, settings, tiers)
                ]
            except UsageError as error:
                log.warning("Skipped %s at %g bits: %s", method.name, bits, error)
                skipped.append({"method": method.name, "bits": bits, "reason": str(error)})
    if not jobs:
        raise unreachable(settings, str(skipped[-1]["reason"]))
    return jobs, skipped


def _plans_of(method: Method, settings: Settings) -> list[tuple[float, str | None, Tiers | None]]:
    """(bits, rounding scores, tiers) of every plan of `method` that `settings` ask for; bits alone first, then tiers."""
    drops, (low, high) = drops_tokens(method), bits_range(method)
    bits = dict.fromkeys(settings.bits) if low < high else (low,)
    scorers = settings.rounding_scores or (None,) if rounds(method) else (None,)
    plans: list[tuple[float, str | None, Tiers | None]] = []
    if settings.shares or not drops:
        plans += [(b, scorer, None) for b, scorer in product(bits, scorers)]
    if drops:
        plans += [(mean_bits(tiers), scorer, tiers) for tiers, scorer in product(settings.tiers, scorers)]
    return plans


def _caches_of(method: Method, settings: Settings, tiers: Tiers | None) -> Iterable[tuple[float | None, str | None]]:
    """(share of the tokens kept, wavelet) of every cache that a plan with `tiers`, or without, is measured in."""
    if tiers:
        return [(None, None)]
    shares = settings.shares if drops_tokens(method) else (None,)
    return product(shares, settings.wavelets or (None,) if has_wavelet(method) else (None,))


def _calibrated(backend, model, tokenizer, basis_set: str) -> Profile:
    """A profile of `model` made now, with `basis_set`."""
    profiler = backend.SpectralProfiler(pairs=basis_set == PAIRS, joint=basis_set == WHOLE_MODEL)
    return profiler.profile_from_model(model, tokenizer)


def _runs(task: str, job: Job) -> bool:
    """Whether `task` is for `job`: a file is made once, and does not go on."""
    return job.method.live or task != "drift"


def _keys(document: Document, task: str, job: Job, settings: Settings, common: dict) -> list[dict]:
    """What identifies the records of `job` in `task`: one, or one per turn."""
    metrics = {"text": METRICS, "copy": METRICS[:2], "drift": METRICS[:2], "needle": METRICS[:1]}[task]
    key = {
        "method": job.method.name,
        "bits": job.bits,
        "keep": job.keep,
        "budget_tokens": job.budget_tokens(len(document.prefix)),
        "rounding_scores": job.rounding_scores,
        "tiers": job.tiers and name_tiers(job.tiers),
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
        "metrics": ",".join(name for name in metrics if name == "kl" or name in settings.metrics),
        "plan": job.plan_hash,
        **common,
    }
    if job.wavelet:  # other records stay as they are without it
        key["wavelet"] = job.wavelet
    if task == "text":
        return [key | {"greedy": settings.greedy}]
    if task == "needle":
        return [key | {"depth": document.depth}]
    if task == "copy":
        return [key]
    length = settings.turn_tokens + settings.scored
    return [
        key | {"turn": turn, "document_digest": document.digest(task, turn * length)}
        for turn in range(1, settings.turns + 1)
    ]


def versions(backend) -> dict[str, str]:
    """Versions that a result belongs to: ours, NumPy's, and the host's."""
    found = {"spectralkv": __version__, "numpy": np.__version__}
    for package in backend.HOST_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # mlx has other names on some platforms
            continue
    return found

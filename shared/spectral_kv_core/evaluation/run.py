"""What compression costs: compressed caches against the plain one, over texts, methods, bits and tasks.

Works on any module with the names of a backend's `generation`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..codecs.registry import bits_range, make_plan, usable_method
from ..codecs.tiers import check_tiers, make_tiered_plan, mean_bits, name_tiers
from ..errors import UsageError
from ..planning.budget import SINKS, WAITING, WINDOW
from ..planning.methods import ROUNDINGS, Method, get_method, rounded_by
from ..profile.basis_set import JOINT, PAIRS
from ..profile.profile import Profile
from ..profile.store import auto_profile
from ..scorers import check_wavelet, get_scorer
from .documents import Document, make_documents
from .records import RecordFile, record_key, summarize
from .tasks import LOW_PPL, Job, Runner
from .text import Text, copy_span

log = logging.getLogger("spectralkv")
# score what really follows; a span of the prefix, repeated; turns on one cache; a number hidden in the prefix
TASKS = ("text", "copy", "drift", "needle")
METRICS = ("kl", "aop", "reconstruction")
SUITES: dict[str, dict[str, Any]] = {
    "quick": {"prefixes": (1024,), "documents": 2, "scored": 64, "tasks": ("text", "copy"), "greedy": 32},
    "full": {"prefixes": (1024, 2048), "documents": 4, "scored": 128, "tasks": TASKS, "greedy": 128},
}
DEFAULT_BITS = (4.0, 3.0, 2.0)
DEFAULT_KEEP = (0.5, 0.25)

Place: TypeAlias = tuple[int, str, Job]  # of a record: which document, the task and the cache
Tiers: TypeAlias = tuple[tuple[float, float], ...]  # (share, bits) pairs

_LEAST = {  # tokens, documents or turns that a field of `Settings` has at least
    "prefixes": 2,  # a tokenizer's own first token, and one of the text
    "scored": 2,  # the first is predicted by the prefix alone
    "documents": 1,
    "step": 1,
    "prefill_chunk": 1,
    "window": 0,
    "sinks": 0,
    "greedy": 0,
    "turns": 1,
    "turn_tokens": 1,
}


@dataclass(frozen=True)
class Settings:
    """What to measure, in tokens: `prefixes` read, then `scored` tokens, `step` per model call.

    prefill_chunk: tokens per call of the prefix, through the compressed cache itself; None reads it in one call. metrics:
    `kl` is always measured. greedy: tokens generated after the prefix, in the task `text`. turns, turn_tokens: how often the
    task `drift` goes on with a piece of prompt, and how long that is. keep: shares of the prefix's tokens that methods
    which drop tokens keep, `DEFAULT_KEEP` unless told. wavelets: filters of wavelet scorers, one cache each; the scorer's
    own unless told. rounding_scores: whose scores weight the codec's rounding, one cache each; the method's own unless told.
    tiers: (share, bits) pairs, as in `make_prompt_cache`, for methods SCORER+METHOD, which then drop nothing.
    """

    methods: tuple[str, ...]
    bits: tuple[float, ...] = DEFAULT_BITS
    tasks: tuple[str, ...] = SUITES["quick"]["tasks"]
    metrics: tuple[str, ...] = METRICS
    prefixes: tuple[int, ...] = (1024,)
    scored: int = 64
    documents: int = 2
    step: int = 1
    prefill_chunk: int | None = None
    window: int = WINDOW
    sinks: int = SINKS
    greedy: int = 0
    turns: int = 5
    turn_tokens: int = 256
    keep: tuple[float, ...] = ()
    wavelets: tuple[str, ...] = ()
    rounding_scores: tuple[str, ...] = ()
    tiers: tuple[tuple[tuple[float, float], ...], ...] = ()

    def __post_init__(self):
        self._check_values()
        self._check_numbers()
        methods = [get_method(name) for name in self.methods]
        self._check_tasks(methods)
        self._check_tiers(methods)
        self._check_rounding(methods)
        self._check_wavelets(methods)
        self._check_keep([method for method in methods if _drops_tokens(method)])

    @property
    def shares(self) -> tuple[float, ...]:
        """What methods that drop tokens keep; none where tiers alone are asked for."""
        return self.keep or (() if self.tiers else DEFAULT_KEEP)

    def _check_values(self) -> None:
        """Raise UsageError for an empty list that must not be, and for tasks and metrics that do not exist."""
        for name in ("methods", "tasks", "prefixes"):
            if not getattr(self, name):
                raise UsageError(f"Expected at least one value for `{name}`, received none.")
        for name, known in (("tasks", TASKS), ("metrics", METRICS)):
            for value in getattr(self, name):
                if value not in known:
                    raise UsageError(f"Expected `{name}` among {', '.join(known)}, received {value!r}.")

    def _check_numbers(self) -> None:
        """Raise UsageError for a number that is too small."""
        for bits in self.bits:
            if not (math.isfinite(bits) and bits > 0):
                raise UsageError(f"Expected `bits` above 0, received {bits:g}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if number < least:
                    raise UsageError(f"Expected `{name}` of at least {least}, received {number}.")

    def _check_tasks(self, methods: list[Method]) -> None:
        """Raise UsageError for a prefix that has no span to copy, and for the task `drift` alone without a live cache."""
        if "copy" in self.tasks:
            for prefix in self.prefixes:
                copy_span(prefix, self.scored, self.sinks, self.window)
        if self.tasks == ("drift",) and not any(method.live for method in methods):
            raise UsageError(
                f"Expected a method with a live cache for the task drift, received {', '.join(self.methods)}, for files."
            )

    def _check_tiers(self, methods: list[Method]) -> None:
        """Raise UsageError for `tiers` that a method cannot have, or that none takes."""
        dropping = [method for method in methods if _drops_tokens(method)]
        for tiers, method in product(self.tiers, dropping):
            check_tiers(method, tiers)
        if self.tiers and not dropping:
            raise UsageError(
                f"Expected a method SCORER+METHOD for `tiers`, {', '.join(self.methods)} are none. Take for example "
                "triattention+spectral."
            )

    def _check_rounding(self, methods: list[Method]) -> None:
        """Raise UsageError for `rounding_scores` that do not exist, or that no method rounds by."""
        for scorer in self.rounding_scores:
            if scorer not in ROUNDINGS:
                raise UsageError(f"Expected `rounding_scores` among {', '.join(ROUNDINGS)}, received {scorer!r}.")
        if self.rounding_scores and not any(map(_rounds, methods)):
            raise UsageError(
                f"Expected a method that rounds by scores for `rounding_scores`, {', '.join(self.methods)} do not."
            )

    def _check_wavelets(self, methods: list[Method]) -> None:
        """Raise UsageError for `wavelets` that do not exist, or that no method scores with."""
        wavy = [named for method in methods if (named := method.scorer) and _has_wavelet(method)]
        if self.wavelets and not (wavy and self.shares):
            raise UsageError(
                f"Expected a method that drops tokens by a wavelet scorer for `wavelets`, {', '.join(self.methods)} "
                f"{'drop none with `tiers` alone' if wavy else 'do not'}."
            )
        for wavelet in self.wavelets:
            check_wavelet(get_scorer(wavy[0]), wavelet)

    def _check_keep(self, dropping: list[Method]) -> None:
        """Raise UsageError for shares that leave nothing to choose, or that no method takes."""
        if self.keep and not dropping:
            raise UsageError(
                f"Expected a method that drops tokens for `keep`, {', '.join(self.methods)} keep every token."
            )
        for keep in self.shares if dropping else ():
            if not 0 < keep <= 1:
                raise UsageError(f"Expected shares above 0, at most 1, for `keep`, received {keep:g}.")
            waits = WAITING if any(method.compresses for method in dropping) else 0
            for prefix in self.prefixes:
                if round(keep * prefix) <= self.sinks + self.window + waits:
                    raise UsageError(
                        f"Expected `keep` to leave more than the {self.sinks} sinks, the window of {self.window} and {waits} "
                        f"that wait to be coded, received {keep:g}, {round(keep * prefix):,} of {prefix:,} tokens. Raise "
                        "`keep` or `prefixes`."
                    )


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
                    finished.append(key | numbers)
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
        raise UsageError(
            f"Expected a method and bits that it can reach, received methods {', '.join(settings.methods)} with bits "
            f"{', '.join(f'{b:g}' for b in settings.bits)}: {skipped[-1]['reason']}"
        )
    return jobs, skipped


def _plans_of(method: Method, settings: Settings) -> list[tuple[float, str | None, Tiers | None]]:
    """(bits, rounding scores, tiers) of every plan of `method` that `settings` ask for; bits alone first, then tiers."""
    drops, (low, high) = _drops_tokens(method), bits_range(method)
    bits = dict.fromkeys(settings.bits) if low < high else (low,)
    scorers = settings.rounding_scores or (None,) if _rounds(method) else (None,)
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
    shares = settings.shares if _drops_tokens(method) else (None,)
    return product(shares, settings.wavelets or (None,) if _has_wavelet(method) else (None,))


def _calibrated(backend, model, tokenizer, basis_set: str) -> Profile:
    """A profile of `model` made now, with `basis_set`."""
    profiler = backend.SpectralProfiler(pairs=basis_set == PAIRS, joint=basis_set == JOINT)
    return profiler.profile_from_model(model, tokenizer)


def _drops_tokens(method: Method) -> bool:
    return method.scorer is not None


def _has_wavelet(method: Method) -> bool:
    return method.scorer is not None and "wavelet" in get_scorer(method.scorer).options


def _rounds(method: Method) -> bool:
    return method.rounding != "nearest"


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

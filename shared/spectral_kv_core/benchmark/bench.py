"""Speed and peak memory beside the host's plain and quantized caches, all in one process.

Ratios are the baseline's time over ours: above 1 we are faster. Every time is the median over `REPEATS` rounds that go
through all variants in turn. A compressed cache is timed over `SEAL` tokens in a row, of which one makes it seal a
block, and counts with the mean over them; before every timed step `sweep` reads memory that is larger than the
processor's caches, as the other layers and the weights of a model would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice

import numpy as np
from tqdm import tqdm

from ..cache.size import CacheSize
from ..errors import UsageError
from ..evaluation import run as evaluation
from ..evaluation.settings import Settings as Evaluated
from ..evaluation.tasks import Job
from ..evaluation.text import default_texts
from ..hosts.backends import load_backend
from ..planning.budget import SEAL, SINKS, WINDOW
from ..planning.methods import get_live_method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from .machine import cpu_cores, cpu_name
from .synthetic import kept_share, synthetic_plan, synthetic_profile, synthetic_shape, synthetic_vectors
from .timing import Bench

WAYS = ("host", "gqa", "grouped")  # of attending to a plain cache with one token
REPEATS = 3
DECODED = SEAL + 1  # tokens that a decode rate is taken over, the first of which is not timed
AFTER = SEAL + DECODED  # tokens that follow the prompt in all
PEAK_DECODED = 16  # tokens that follow the prompt where peak memory is measured
CHARACTERS = 8  # of text per token of a prompt: about twice what a token takes
CONTEXTS = (1024, 4096, 16384)
HOST_ERRORS = (ImportError, ValueError, RuntimeError)  # of a quantized cache that cannot run: records give the reason


@dataclass(frozen=True)
class Settings:
    """What to measure: every method at `bits` after every number of tokens of `contexts`.

    synthetic: name of a shape, or None for a model; plan: what a synthetic layer stores.
    """

    methods: tuple[str, ...]
    contexts: tuple[int, ...] = CONTEXTS
    bits: float = 3.0
    synthetic: str | None = None
    plan: str | None = None

    def __post_init__(self):
        for method in map(get_live_method, self.methods):
            if method.scorer is not None:
                raise UsageError(
                    f"Expected methods that keep every token, {method.name} drops some: how fast it is follows from how many "
                    "are left. Measure its codec at fewer tokens."
                )
        if self.synthetic is not None:
            _ = self.plans  # raises UsageError
        elif self.plan is not None:
            raise UsageError(
                f"Expected `plan` {self.plan} with `synthetic`, received a model, whose profile makes the plan."
            )
        else:
            _ = self.evaluated
        least = SINKS + WINDOW + SEAL
        for context in self.contexts:
            if context < least:
                raise UsageError(
                    f"Expected `contexts` of at least {least} tokens, {SINKS} sinks, a window of {WINDOW} and a block of "
                    f"{SEAL}, received {context}."
                )

    @cached_property
    def evaluated(self) -> Evaluated:
        """The methods and bits as `evaluation.plan_jobs` takes them."""
        return Evaluated(self.methods, (self.bits,), tasks=("text",))

    @property
    def shape(self) -> ModelShape:
        assert self.synthetic is not None, "asked of a synthetic layer alone"
        return synthetic_shape(self.synthetic)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """What every method stores of the synthetic layer."""
        methods = [get_live_method(name) for name in self.methods]
        profile = synthetic_profile(self.shape, methods)
        return {m.name: synthetic_plan(self.shape, profile, m, self.bits, self.plan) for m in methods}

    def within(self, limit: int | None, drop: bool) -> Settings:
        """The same for a model made for `limit` tokens; `drop` contexts that it cannot go on from, or raise UsageError."""
        if limit is None:
            return self
        fitting = tuple(c for c in self.contexts if c + AFTER <= limit)
        if not fitting or (len(fitting) < len(self.contexts) and not drop):
            raise UsageError(
                f"Expected `contexts` of at most {limit - AFTER:,} tokens, {AFTER} below the model's context, received "
                f"{max(self.contexts):,}."
            )
        return replace(self, contexts=fitting)


def bench_layer(bench: Bench, backend: str, settings: Settings, dtype: str) -> dict:
    """`rows` of a synthetic layer, and the machine's read bandwidth. `bench`: the module of that name of `backend`."""
    shape, plans = settings.shape, settings.plans
    records, sweeps = [], []
    for context in tqdm(settings.contexts, desc="bench", unit="context"):
        layer = bench.BenchLayer(shape, *synthetic_vectors(shape, context + SEAL), dtype)
        steps = {way: getattr(layer, way)() for way in WAYS}
        reason = None
        try:
            steps["quantized"] = layer.quantized()
        except HOST_ERRORS as error:
            reason = _one_line(error)
        times = {name: np.zeros((REPEATS, SEAL)) for name in (*steps, *plans)}
        sizes = {}
        for repeat in range(-1, REPEATS):  # the first round warms up
            for name, plan in plans.items():
                steps[name], sizes[name] = layer.compressed(plan, SINKS, WINDOW)
            for i in range(SEAL if repeat >= 0 else 1):
                for name, step in steps.items():
                    swept, seconds = bench.sweep(), step()
                    if repeat >= 0:
                        sweeps.append(swept)
                        times[name][repeat, i] = seconds
        typical = {name: np.median(t, axis=0) for name, t in times.items()}
        means = {name: float(t.mean()) for name, t in typical.items()}
        names = {"backend": backend, "synthetic": settings.synthetic, "plan": settings.plan, "dtype": dtype}
        plain_peak = fresh_peak(**names, context=context, method=None, bits=settings.bits)
        for name, plan in plans.items():
            record = _record(plan, context, dtype, bench.threads(), means, reason, sizes[name], layer.plain_bytes)
            records.append(
                record
                | {
                    "bits": settings.bits,
                    "sealing_us": 1e6 * (means[name] - float(np.median(typical[name]))),
                    "peak_bytes": fresh_peak(**names, context=context, method=name, bits=settings.bits),
                    "plain_peak_bytes": plain_peak,
                }
            )
    return {"rows": records, **_bandwidth(bench, sweeps)}


def bench_model(host, bench: Bench, model, tokenizer, settings: Settings, names: dict) -> dict:
    """`rows` of a model that reads real text, and the machine's read bandwidth.

    host, bench: a backend's modules `generation` and `bench`; names: what `measure_peak` finds the model by.
    """
    jobs, skipped = evaluation.plan_jobs(host, model, tokenizer, settings.evaluated)
    dtype = str(host.model_dtype(model)).rpartition(".")[2]
    records = []
    for context in tqdm(settings.contexts, desc="bench", unit="context"):
        runs = _Runs(host, bench, model, real_prompt(tokenizer, context + 1))
        for _ in range(REPEATS):
            runs.go_round(jobs)
        rate, means = ({name: float(np.median(x)) for name, x in f.items()} for f in (runs.decoded, runs.attention))
        read = {name: float(np.median(x)) for name, x in runs.read.items()}
        plain_peak = fresh_peak(**names, context=context, method=None, bits=None)
        for job in jobs:
            name = job.method.name
            sizes = runs.sizes[name], runs.sizes["host"]
            record = _record(job.plan, context, dtype, bench.threads(), means, runs.reason, *sizes) | {
                "bits": job.bits,
                "decode_tokens_per_s": rate[name],
                "plain_decode_tokens_per_s": rate["host"],
                "prefill_tokens_per_s": read[name],
                "plain_prefill_tokens_per_s": read["host"],
                "peak_bytes": fresh_peak(**names, context=context, method=name, bits=job.bits),
                "plain_peak_bytes": plain_peak,
            }
            records.append(record)
    return {"rows": records, "skipped": skipped, **_bandwidth(bench, [bench.sweep() for _ in range(REPEATS + 1)])}


class _Runs:
    """Rounds of a model over one prompt, all but the last token of which are read before anything is decoded.

    By cache: tokens read and decoded per second, and seconds in the attention of all `layers` per step.
    """

    def __init__(self, host, bench: Bench, model, prompt: list[int]):
        self.host, self.bench, self.model, self.prompt = host, bench, model, prompt
        self.read: dict[str, list[float]] = {}
        self.decoded: dict[str, list[float]] = {}
        self.attention: dict[str, list[float]] = {}
        self.sizes: dict[str, CacheSize] = {}
        self.reason: str | None = None
        self.layers = host.model_shape(model)[0].layers

    def go_round(self, jobs: list[Job]) -> None:
        host, model = self.host, self.model
        plain = self._read("host", host.plain_cache(model))
        for way in WAYS:
            cache = host.plain_cache(model)
            host.fill(cache, plain)
            self._attend(way, cache, way)
            if way == "host":
                self._decode(way, cache)
        try:
            self._attend("quantized", self.bench.quantized_cache(model, plain))
        except HOST_ERRORS as error:
            self.reason = _one_line(error)
        del plain, cache
        for job in jobs:
            options = {"method": job.method, "window": WINDOW, "sinks": SINKS}
            cache = host.make_prompt_cache(model, job.plan.profile, job.bits, **options)
            self._attend(job.method.name, self._read(job.method.name, cache))
            self._decode(job.method.name, cache)

    def _read(self, name: str, cache):
        *tokens, last, _ = self.prompt
        started = time.perf_counter()
        self.host.prefill(self.model, tokens, cache)
        self.host.feed(self.model, [last], cache)  # a prompt in several calls is encoded for good now
        seconds = time.perf_counter() - started
        self.read.setdefault(name, []).append((len(tokens) + 1) / seconds)
        return cache

    def _attend(self, name: str, cache, way: str = "host") -> None:
        with self.bench.attention_clock(self.model, cache, self.layers, way) as clock:
            self._generate(cache, SEAL)
        self.attention.setdefault(name, []).append(clock.seconds / clock.calls * len(self.layers))
        self.sizes[name] = self.host.cache_nbytes(cache)

    def _decode(self, name: str, cache) -> None:
        self.decoded.setdefault(name, []).append(self._generate(cache, DECODED).decode_tokens_per_s())

    def _generate(self, cache, tokens: int):
        return self.host.generate(self.model, None, self.prompt[-1:], cache, tokens, True, lambda token: None)


def machine(host, bench: Bench) -> dict:
    """What a time belongs to."""
    return {
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "device": bench.device_name(),
        "threads": bench.threads(),
        "versions": evaluation.versions(host),
        "host_quantized": bench.HOST_QUANTIZED,
    }


def real_prompt(tokenizer, context: int) -> list[int]:
    """The first `context` tokens of the shipped prose, repeated where it is too short."""
    text = default_texts()[0].text[: CHARACTERS * context]
    return list(islice(cycle(tokenizer.encode(text)), context))


def fresh_peak(**configuration) -> int:
    """Peak bytes of `measure_peak` or, for a synthetic layer, of `measure_layer_peak` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, json.dumps(configuration)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"Expected a measurement of peak memory, its process ended with code {done.returncode}.")
    return int(done.stdout.split()[-1])


def measure_peak(
    backend: str, model: str, dtype: str | None, context: int, method: str | None, bits: float | None
) -> int:
    """Peak bytes of this process when it reads `context` tokens and decodes a few; method None is the plain cache."""
    _, host = load_backend(backend)
    loaded, tokenizer = host.load_model(model, dtype)
    if method is None:
        cache = host.plain_cache(loaded)
    else:
        cache = host.make_prompt_cache(loaded, None, bits, method=method, window=WINDOW, sinks=SINKS)
    host.reset_peak()
    host.generate(loaded, tokenizer, real_prompt(tokenizer, context), cache, PEAK_DECODED, True, lambda token: None)
    return host.peak_bytes()


def measure_layer_peak(
    backend: str, synthetic: str, plan: str, dtype: str, context: int, method: str | None, bits: float
) -> int:
    """`measure_peak` of a synthetic layer; its vectors are drawn call by call."""
    _, host = load_backend(backend)
    _, bench = load_backend(backend, "bench")
    shape = synthetic_shape(synthetic)
    made = None if method is None else Settings((method,), (context,), bits, synthetic, plan).plans[method]
    read = bench.layer_reader(shape, made, SINKS, WINDOW, dtype)
    host.reset_peak()
    whole, rest = divmod(context, host.PREFILL_CHUNK)
    for seed, tokens in enumerate([host.PREFILL_CHUNK] * whole + [rest] * (rest > 0) + [1] * PEAK_DECODED):
        read(*synthetic_vectors(shape, tokens, seed))
    return host.peak_bytes()


def _record(
    plan: Plan,
    context: int,
    dtype: str,
    threads: int,
    means: dict,
    reason: str | None,
    nbytes: CacheSize,
    plain_bytes: int,
) -> dict:
    """What every record has, from the mean seconds of a step by cache; a step reads all bytes of its cache."""
    own, quantized, fastest = means[plan.method.name], means.get("quantized"), min(means[way] for way in WAYS)
    return {
        "method": plan.method.name,
        "context": context,
        "plan_hash": plan.hash,
        "bits_per_element": plan.bits_per_element,
        "kept_share": kept_share(plan),
        "dtype": dtype,
        "threads": threads,
        "attention_us": 1e6 * own,
        **{f"plain_{way}_us": 1e6 * means[way] for way in WAYS},
        "host_quantized_us": None if quantized is None else 1e6 * quantized,
        "ratio_to_dense": fastest / own,
        **{f"ratio_to_{way}": means[way] / own for way in WAYS},
        "ratio_to_host_quantized": None if quantized is None else quantized / own,
        "host_quantized_reason": reason,
        "bytes": int(nbytes),
        "bytes_by_kind": nbytes.by_kind,
        "exact_tokens": nbytes.exact_tokens,
        "plain_bytes": int(plain_bytes),
        "read_gb_per_s": nbytes / own / 1e9,
        "plain_read_gb_per_s": plain_bytes / fastest / 1e9,
    }


def _bandwidth(bench: Bench, sweeps: list[float]) -> dict:
    return {"machine_read_gb_per_s": bench.SWEEP_BYTES / float(np.median(sweeps)) / 1e9}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    configuration = json.loads(sys.argv[1])
    print((measure_layer_peak if "synthetic" in configuration else measure_peak)(**configuration))

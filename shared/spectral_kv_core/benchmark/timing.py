"""One clock for the decode steps of all backends, which say what must be waited for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from ..cache.size import CacheSize
from ..planning.budget import SEAL
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape

SWEEP_BYTES = 256 * 2**20
Synchronize = Callable[[Any], None]  # waits until a result, and all that the device was given before, is there


class Bench(Protocol):
    """What benchmarks ask of a backend: its module `bench`. Peak memory is that of its module `generation`."""

    HOST_QUANTIZED: str  # what the host's quantized cache is
    SWEEP_BYTES: int
    BenchLayer: type[TimedLayer]

    def synchronize(self, result: Any = None) -> None:
        """Wait until `result`, and all that the device was given before, is there."""

    def sweep(self) -> float:
        """Seconds to read `SWEEP_BYTES` of memory, after which no cache of the processor holds anything else."""

    def layer_reader(self, shape: ModelShape, plan: Plan | None, sinks: int, window: int, dtype: str) -> Callable:
        """What lets one layer attend from vectors [1, H, T, D] of the next T tokens; plan None: a layer of the host's."""

    def quantized_cache(self, model, plain) -> Any:
        """The host's quantized cache with the tokens of `plain`; raises one of `bench.HOST_ERRORS` where it cannot run."""

    def attention_clock(
        self, model, cache, layers: tuple[int, ...], way: str = "host"
    ) -> AbstractContextManager[Clock]:
        """Clock of the attention of `layers` of `cache`; `way` of attending to a plain one."""

    def threads(self) -> int:
        """Threads that the array library computes with."""

    def device_name(self) -> str:
        """Name of the GPU, or cpu."""

    def default_dtype(self) -> str:
        """Dtype of a synthetic layer, unless told."""


class Clock:
    """Time in seconds spent in functions called through it, and calls that `count`."""

    def __init__(self, synchronize: Synchronize):
        self.seconds, self.calls, self._synchronize = 0.0, 0, synchronize

    def time(self, run: Callable, *args, count: bool = False, **kwargs):
        """What `run` gives for the arguments, once it is there."""
        self._synchronize(None)
        started = time.perf_counter()
        out = run(*args, **kwargs)
        self._synchronize(out)
        self.seconds += time.perf_counter() - started
        self.calls += count
        return out


def seconds(synchronize: Synchronize, run: Callable) -> float:
    """Seconds until the result of `run` is there."""
    clock = Clock(synchronize)
    clock.time(run)
    return clock.seconds


def grouped(attend: Callable, query, keys, values, scale: float):
    """`attend(query, keys, values, scale)` with the query heads of a KV head as rows of one query."""
    rows = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
    return attend(rows, keys, values, scale).reshape(query.shape)


class TimedLayer(ABC):
    """One attention layer; `queries`, `keys`, `values` [1, H, T, D] end with the `SEAL` tokens that steps bring.

    Every way gives a step: a function that takes one token in, attends, and returns its seconds. A compressed cache goes
    through the last `SEAL` tokens; the others stay at the middle of them.
    """

    def __init__(self, shape: ModelShape, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, dtype: str):
        self.queries, self.keys, self.values = (self.array(x, dtype) for x in (queries, keys, values))
        self.shape, self.scale = shape, shape.head_dim**-0.5
        self.context = keys.shape[2] - SEAL
        self.middle = self.context + SEAL // 2
        self.plain_bytes = 2 * self.keys[:, :, : self.middle + 1].nbytes

    def compressed(self, plan: Plan, sinks: int, window: int) -> tuple[Callable[[], float], CacheSize]:
        """A step of our cache, and its size after one step that is not timed."""
        layer, prompt = self.new_layer(plan, sinks, window), self.context - 1
        layer.append(self.keys[:, :, :prompt], self.values[:, :, :prompt])
        self.step(layer, prompt)
        tokens: Iterator[int] = iter(range(self.context, self.context + SEAL))
        return lambda: self.step(layer, next(tokens)), self.size(layer)

    def gqa(self) -> Callable[[], float]:
        """The kernel alone, on keys and values that lie ready."""
        return self._kernel(self.attend)

    def grouped(self) -> Callable[[], float]:
        """The kernel alone, with the query heads of a KV head as rows."""
        return self._kernel(lambda *given: grouped(self.attend, *given))

    def _kernel(self, attend: Callable) -> Callable[[], float]:
        keys, values = (self.contiguous(x[:, :, : self.middle + 1]) for x in (self.keys, self.values))
        query = self.contiguous(self.queries[:, :, self.middle : self.middle + 1])
        return lambda: self.seconds(lambda: attend(query, keys, values, self.scale))

    def step(self, layer, token: int) -> float:
        """Seconds in which `layer` takes `token` in and attends."""
        given = [self.contiguous(x[:, :, token : token + 1]) for x in (self.queries, self.keys, self.values)]
        return self.seconds(lambda: self.take(layer, *given))

    @abstractmethod
    def host(self) -> Callable[[], float]:
        """As the host does it, with a layer of its own."""

    @abstractmethod
    def quantized(self) -> Callable[[], float]:
        """The host's quantized cache; raises one of `bench.HOST_ERRORS` where it cannot run."""

    @abstractmethod
    def array(self, x: np.ndarray, dtype: str) -> Any:
        """`x` on the device."""

    @abstractmethod
    def contiguous(self, x) -> Any:
        """`x` in memory of its own, there already."""

    @abstractmethod
    def seconds(self, run: Callable) -> float:
        """Seconds until the result of `run` is there."""

    @abstractmethod
    def attend(self, query, keys, values, scale: float) -> Any:
        """The host's attention kernel for one token: [1, Hq, 1, D]."""

    @abstractmethod
    def take(self, layer, query, key, value) -> Any:
        """What a model calls: `layer` takes a token in and is attended to."""

    @abstractmethod
    def new_layer(self, plan: Plan, sinks: int, window: int) -> Any:
        """An empty layer of our cache."""

    @abstractmethod
    def size(self, layer) -> CacheSize:
        """Bytes of all that a layer of our cache holds."""

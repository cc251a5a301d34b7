"""Timed decode steps on MLX: our cache and mlx-lm's own, through the functions that a model calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from spectral_kv_core.benchmark import timing
from spectral_kv_core.benchmark.machine import cpu_cores
from spectral_kv_core.benchmark.timing import SWEEP_BYTES, Clock, TimedLayer
from spectral_kv_core.cache.model_cache import cache_nbytes
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.errors import UsageError
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.model_shape import ModelShape

from . import host as own_host
from . import ops
from .cache import SpectralKVCache
from .handles import RoutedCache, routing
from .host_cache import exact_layer
from .places import dispatcher, replaced_attention
from .survey import install

__all__ = [
    "HOST_QUANTIZED", "SWEEP_BYTES", "BenchLayer", "attention_clock", "default_dtype", "device_name", "layer_reader",
    "quantized_cache", "sweep", "synchronize", "threads",
]  # fmt: skip
HOST_QUANTIZED = "mlx-lm QuantizedKVCache, 4 bits, groups of 64"
QUANTIZED = {"group_size": 64, "bits": 4}

scaled_dot_product_attention = dispatcher(base.scaled_dot_product_attention)


class BenchLayer(TimedLayer):
    """`TimedLayer` with the caches of mlx-lm, which its attention function is given as a model gives them."""

    def host(self) -> Callable[[], float]:
        """As mlx-lm does it: `KVCache.update_and_fetch`, then its own attention function."""
        return self._repeated(KVCache())

    def quantized(self) -> Callable[[], float]:
        """mlx-lm's quantized cache and its attention on the codes."""
        return self._repeated(QuantizedKVCache(**QUANTIZED))

    def _repeated(self, cache: KVCache | QuantizedKVCache) -> Callable[[], float]:
        cache.update_and_fetch(self.keys[:, :, : self.middle], self.values[:, :, : self.middle])
        mx.eval(cache.keys, cache.values)

        def step():
            seconds = self.step(cache, self.middle)
            cache.trim(1)
            return seconds

        return step

    def array(self, x: np.ndarray, dtype: str) -> mx.array:
        return ops.asarray(x).astype(getattr(mx, dtype))

    def contiguous(self, x: mx.array) -> mx.array:
        x = mx.contiguous(x)
        mx.eval(x)
        return x

    def seconds(self, run: Callable) -> float:
        return timing.seconds(synchronize, run)

    def attend(self, query, keys, values, scale: float):
        return _gqa(query, keys, values, scale)

    def take(self, layer, query, key, value):
        with routing():
            keys, values = layer.update_and_fetch(key, value)
            return scaled_dot_product_attention(query, keys, values, layer, self.scale, None), _held(layer)

    def new_layer(self, plan: Plan, sinks: int, window: int) -> SpectralKVCache:
        return SpectralKVCache(plan, 0, sinks, window)

    def size(self, layer: SpectralKVCache) -> CacheSize:
        return cache_nbytes(own_host, [layer])


def layer_reader(shape: ModelShape, plan: Plan | None, sinks: int, window: int, dtype: str) -> Callable:
    """What lets one layer attend from queries, keys and values [1, H, T, D] of the next T tokens; plan None: the host's."""
    cache = KVCache() if plan is None else SpectralKVCache(plan, 0, sinks, window)

    def read(*vectors: np.ndarray) -> mx.array:
        query, key, value = (ops.asarray(x).astype(getattr(mx, dtype)) for x in vectors)
        mask = "causal" if query.shape[2] > 1 else None
        with routing():
            keys, values = cache.update_and_fetch(key, value)
            out = scaled_dot_product_attention(query, keys, values, cache, shape.head_dim**-0.5, mask)
        mx.eval(out, _held(cache))
        return out

    return read


def quantized_cache(model, plain: list) -> list:
    """mlx-lm's quantized cache with the tokens of `plain`; raises UsageError for layers that it cannot hold."""
    made = []
    for host in plain:
        if type(host) is not KVCache:
            raise UsageError(f"Expected layers that mlx-lm can quantize, received a {type(host).__name__}.")
        held, cache = exact_layer(host), QuantizedKVCache(**QUANTIZED)
        cache.update_and_fetch(held.keys, held.values)
        mx.eval(cache.keys, cache.values)
        made.append(cache)
    return made


@contextmanager
def attention_clock(model, cache: list, layers: tuple[int, ...], way: str = "host") -> Iterator[Clock]:
    """Clock of the attention of `layers`; `way` of attending to a plain cache.

    What a cache of mlx-lm does to take a token in, a write in place, is not counted; our own cache's share is.
    """
    clock = Clock(synchronize)
    chosen = {id(cache[i]) for i in layers}

    def around(attention):
        def timed(queries, keys, values, cache, scale, mask, sinks=None):
            attend = partial(attention, queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
            if id(cache) not in chosen:
                return attend()
            if way != "host":
                attend = partial(
                    {"gqa": _gqa, "grouped": partial(timing.grouped, _gqa)}[way], queries, keys, values, scale
                )
            mx.eval(queries, keys, values)
            return clock.time(lambda: (attend(), _held(cache)), count=True)[0]

        return timed

    install(model)
    with replaced_attention(model, around):
        yield clock


def synchronize(result=None) -> None:
    """Compute `result`: arrays, in tuples or alone. Nothing else is computed meanwhile."""
    if result is not None and not isinstance(result, np.generic):
        mx.eval(result)


def sweep() -> float:
    """Seconds to read `SWEEP_BYTES` of memory, after which no cache of the processor holds anything else."""
    return timing.seconds(synchronize, _field().max)


def threads() -> int:
    """Threads that the BLAS under the CPU build may compute with."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), cpu_cores())


def device_name() -> str:
    """Name of the GPU, or cpu."""
    return "cpu" if _on_cpu() else mx.device_info()["device_name"]


def default_dtype() -> str:
    """What models are mostly stored in, and float32 on the CPU, where half precision is emulated."""
    return "float32" if _on_cpu() else "bfloat16"


@cache
def _field() -> mx.array | np.ndarray:
    # the reductions of MLX's CPU build read at a fraction of the memory's speed
    field = np.ones(SWEEP_BYTES // 4, np.float32) if _on_cpu() else mx.ones(SWEEP_BYTES // 4)
    float(field.max())
    return field


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _gqa(query, keys, values, scale: float):
    return mx.fast.scaled_dot_product_attention(query, keys, values, scale=scale)


def _held(cache) -> tuple:
    return (*cache.store.arrays(),) if isinstance(cache, RoutedCache) else (cache.keys, cache.values)

"""Timed decode steps on PyTorch: our layer and transformers' own, through the functions that a model calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer, HQQQuantizedLayer, QuantizedCache
from transformers.modeling_utils import AttentionInterface

from spectral_kv_core.benchmark.bench import Clock
from spectral_kv_core.planning.budget import SEAL
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.model_shape import ModelShape

from . import ops
from .cache import SpectralKVLayer, storages
from .integration import ATTENTION, attention_forward, exact_layer, install, register

__all__ = [
    "HOST_QUANTIZED", "SWEEP_BYTES", "BenchLayer", "attention_clock", "default_dtype", "device_name", "layer_reader",
    "quantized_cache", "sweep", "threads",
]  # fmt: skip
HOST_QUANTIZED = "transformers QuantizedCache, hqq, 4 bits, groups of 64"
# the axes that transformers' guide gives for hqq
HQQ = {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 64}
SWEEP_BYTES = 256 * 2**20


class BenchLayer:
    """One attention layer; `queries`, `keys`, `values` [1, H, T, D] end with the `SEAL` tokens that steps bring.

    Every method gives a step: a function that takes one token in, attends, and returns its seconds. A compressed cache
    goes through the last `SEAL` tokens; the others stay at the middle of them.
    """

    def __init__(self, shape: ModelShape, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, dtype: str):
        like = torch.empty(0, device=_device())
        self.queries, self.keys, self.values = (
            ops.asarray(x, like).to(getattr(torch, dtype)) for x in (queries, keys, values)
        )
        self.context = keys.shape[2] - SEAL
        self.middle = self.context + SEAL // 2
        self.module = SimpleNamespace(num_key_value_groups=shape.q_heads // shape.kv_heads, layer_idx=0)
        self.scale = shape.head_dim**-0.5
        self.plain_bytes = 2 * self.keys[:, :, : self.middle + 1].numel() * self.keys.element_size()

    def compressed(self, plan: Plan, sinks: int, window: int) -> tuple[Callable[[], float], int]:
        """A step of our cache, and the bytes that it holds after one step that is not timed."""
        layer, prompt = SpectralKVLayer(plan, 0, sinks, window), self.context - 1
        layer.append(self.keys[:, :, :prompt], self.values[:, :, :prompt])
        self._step(layer, prompt)
        tokens = iter(range(self.context, self.context + SEAL))
        return lambda: self._step(layer, next(tokens)), sum(storages(layer.arrays()).values())

    def host(self) -> Callable[[], float]:
        """As transformers does it: `DynamicLayer.update`, then its own attention function."""
        return self._repeated(DynamicLayer())

    def quantized(self) -> Callable[[], float]:
        """transformers' quantized cache, which decodes all it holds; raises ImportError without hqq.

        It encodes everything again every 128 tokens, which no step here falls on.
        """
        return self._repeated(HQQQuantizedLayer(**HQQ))

    def gqa(self) -> Callable[[], float]:
        """The kernel alone, on keys and values that lie ready."""
        return self._kernel(_gqa)

    def grouped(self) -> Callable[[], float]:
        """The kernel alone, with the query heads of a KV head as rows."""
        return self._kernel(_grouped)

    def _repeated(self, layer: DynamicLayer) -> Callable[[], float]:
        layer.update(self.keys[:, :, : self.middle], self.values[:, :, : self.middle])
        held = dict(vars(layer))  # `update` makes new tensors

        def step():
            vars(layer).update(held)
            return self._step(layer, self.middle)

        return step

    def _kernel(self, attend: Callable) -> Callable[[], float]:
        keys, values = (x[:, :, : self.middle + 1].contiguous() for x in (self.keys, self.values))
        query = self.queries[:, :, self.middle : self.middle + 1]
        return lambda: _seconds(lambda: attend(query, keys, values, self.scale))

    def _step(self, layer, token: int) -> float:
        query, key, value = (x[:, :, token : token + 1] for x in (self.queries, self.keys, self.values))
        return _seconds(
            lambda: attention_forward(self.module, query, *layer.update(key, value), None, scaling=self.scale)
        )


def layer_reader(shape: ModelShape, plan: Plan | None, sinks: int, window: int, dtype: str) -> Callable:
    """What lets one layer attend from queries, keys and values [1, H, T, D] of the next T tokens; plan None: the host's."""
    like = torch.empty(0, device=_device())
    module = SimpleNamespace(num_key_value_groups=shape.q_heads // shape.kv_heads, layer_idx=0)
    layer = DynamicLayer() if plan is None else SpectralKVLayer(plan, 0, sinks, window)

    @torch.inference_mode()
    def read(*vectors: np.ndarray) -> torch.Tensor:
        query, key, value = (ops.asarray(x, like).to(getattr(torch, dtype)) for x in vectors)
        seen, length, mask = layer.get_seq_length(), query.shape[2], None
        if plan is None and seen and length > 1:
            mask = torch.ones(length, seen + length, dtype=torch.bool, device=query.device).tril(seen)[None, None]
        return attention_forward(module, query, *layer.update(key, value), mask, scaling=shape.head_dim**-0.5)[0]

    return read


def quantized_cache(model, plain: Cache) -> QuantizedCache:
    """transformers' quantized cache with the tokens of `plain`; raises ImportError without hqq."""
    cache = QuantizedCache("hqq", model.config, **HQQ)
    for layer, host in zip(cache.layers, plain.layers):
        held = exact_layer(host)
        layer.update(held.keys, held.values)
    return cache


@contextmanager
def attention_clock(model, cache: Cache, layers: tuple[int, ...], way: str = "host") -> Iterator[Clock]:
    """Clock of the attention of `layers`, and of what `cache.update` does for it; `way` of attending to a plain cache.

    The ways `gqa` and `grouped` count the kernel alone.
    """
    install(model)
    clock = Clock()

    def timed(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        attend = partial(attention_forward, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if module.layer_idx not in layers:
            return attend()
        if way == "host":
            return _clocked(clock, attend, count=True)
        kernel = {"gqa": _gqa, "grouped": _grouped}[way]
        out = _clocked(clock, kernel, query, key, value, scaling, count=True)
        return out.transpose(1, 2).contiguous(), None

    chosen = [cache.layers[i] for i in layers] if way == "host" else []
    AttentionInterface.register(ATTENTION, timed)
    for layer in chosen:
        layer.update = partial(_clocked, clock, layer.update)
    try:
        yield clock
    finally:
        register()
        for layer in chosen:
            del layer.update


def sweep() -> float:
    """Seconds to read `SWEEP_BYTES` of memory, after which no cache of the processor holds anything else."""
    return _seconds(_field().max)


def threads() -> int:
    """Threads that torch computes with."""
    return torch.get_num_threads()


def device_name() -> str:
    """Name of the card, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def default_dtype() -> str:
    """What models are mostly stored in."""
    return "bfloat16"


@cache
def _field() -> torch.Tensor:
    return torch.ones(SWEEP_BYTES // 4, device=_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _gqa(query, keys, values, scale: float):
    return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)


def _grouped(query, keys, values, scale: float):
    rows = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
    return scaled_dot_product_attention(rows, keys, values, scale=scale).reshape(query.shape)


def _clocked(clock: Clock, run: Callable, *args, count: bool = False, **kwargs):
    _wait()
    return clock.time(_finished, run, *args, count=count, **kwargs)


@torch.inference_mode()
def _seconds(run: Callable) -> float:
    _wait()
    started = time.perf_counter()
    _finished(run)
    return time.perf_counter() - started


def _finished(run: Callable, *args, **kwargs):
    out = run(*args, **kwargs)
    _wait()
    return out


def _wait() -> None:
    """Let a card finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Timed decode steps on PyTorch: our layer and transformers' own, through the functions that a model calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer, HQQQuantizedLayer, QuantizedCache
from transformers.modeling_utils import AttentionInterface

from spectral_kv_core.benchmark import timing
from spectral_kv_core.benchmark.timing import SWEEP_BYTES, Clock, TimedLayer
from spectral_kv_core.cache.model_cache import cache_nbytes
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.model_shape import ModelShape

from . import host as own_host
from . import ops
from .cache import SpectralKVLayer
from .handles import ATTENTION, attention_forward
from .integration import exact_layer, install, register

__all__ = [
    "HOST_QUANTIZED", "SWEEP_BYTES", "BenchLayer", "attention_clock", "default_dtype", "device_name", "layer_reader",
    "quantized_cache", "sweep", "synchronize", "threads",
]  # fmt: skip
HOST_QUANTIZED = "transformers QuantizedCache, hqq, 4 bits, groups of 64"
# the axes that transformers' guide gives for hqq
HQQ = {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 64}


class BenchLayer(TimedLayer):
    """`TimedLayer` with the layers of transformers, which its attention function is given as a model gives them."""

    @cached_property
    def _module(self) -> SimpleNamespace:
        return _module(self.shape)

    def host(self) -> Callable[[], float]:
        """As transformers does it: `DynamicLayer.update`, then its own attention function."""
        return self._repeated(DynamicLayer())

    def quantized(self) -> Callable[[], float]:
        """transformers' quantized cache, which decodes all it holds; raises ImportError without hqq.

        It encodes everything again every 128 tokens, which no step here falls on.
        """
        return self._repeated(HQQQuantizedLayer(**HQQ))

    def _repeated(self, layer: DynamicLayer) -> Callable[[], float]:
        layer.update(self.keys[:, :, : self.middle], self.values[:, :, : self.middle])
        held = dict(vars(layer))  # `update` makes new tensors

        def step():
            vars(layer).update(held)
            return self.step(layer, self.middle)

        return step

    def array(self, x: np.ndarray, dtype: str) -> torch.Tensor:
        return ops.asarray(x, torch.empty(0, device=_device())).to(getattr(torch, dtype))

    def contiguous(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()

    @torch.inference_mode()
    def seconds(self, run: Callable) -> float:
        return timing.seconds(synchronize, run)

    def attend(self, query, keys, values, scale: float):
        return _gqa(query, keys, values, scale)

    def take(self, layer, query, key, value):
        return attention_forward(self._module, query, *layer.update(key, value), None, scaling=self.scale)

    def new_layer(self, plan: Plan, sinks: int, window: int) -> SpectralKVLayer:
        return SpectralKVLayer(plan, 0, sinks, window)

    def size(self, layer: SpectralKVLayer) -> CacheSize:
        return cache_nbytes(own_host, SimpleNamespace(layers=[layer]))


def layer_reader(shape: ModelShape, plan: Plan | None, sinks: int, window: int, dtype: str) -> Callable:
    """What lets one layer attend from queries, keys and values [1, H, T, D] of the next T tokens; plan None: the host's."""
    like = torch.empty(0, device=_device())
    module = _module(shape)
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
    clock = Clock(synchronize)

    def timed(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        attend = partial(attention_forward, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if module.layer_idx not in layers:
            return attend()
        if way == "host":
            return clock.time(attend, count=True)
        kernel = {"gqa": _gqa, "grouped": partial(timing.grouped, _gqa)}[way]
        out = clock.time(kernel, query, key, value, scaling, count=True)
        return out.transpose(1, 2).contiguous(), None

    chosen = [cache.layers[i] for i in layers] if way == "host" else []
    AttentionInterface.register(ATTENTION, timed)
    for layer in chosen:
        layer.update = partial(clock.time, layer.update)
    try:
        yield clock
    finally:
        register()
        for layer in chosen:
            del layer.update


def synchronize(result=None) -> None:
    """Let a card finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sweep() -> float:
    """Seconds to read `SWEEP_BYTES` of memory, after which no cache of the processor holds anything else."""
    return timing.seconds(synchronize, _field().max)


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


def _module(shape: ModelShape) -> SimpleNamespace:
    """What an attention function reads of the module that calls it."""
    return SimpleNamespace(num_key_value_groups=shape.q_heads // shape.kv_heads, layer_idx=0)


def _gqa(query, keys, values, scale: float):
    shared = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=shared)

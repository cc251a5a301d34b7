"""mlx-lm and our MLX backend, under the names that `tests/backends` asks of a host."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hosts import TEXT, ByteTokenizer
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import base
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache, trim_prompt_cache
from mlx_models import hybrid, make_model

import spectral_kv_mlx
from spectral_kv_core.cache.compressed_layer import leading_layers
from spectral_kv_mlx import (
    InferenceEngine,
    SpectralProfiler,
    bench,
    cache_nbytes,
    capture,
    footprint,
    load_model,
    load_prompt_cache,
    make_prompt_cache,
    ops,
    save_prompt_cache,
)
from spectral_kv_mlx import generation as backend
from spectral_kv_mlx.cache import SpectralKVCache
from spectral_kv_mlx.generation import decode_cache, encode_cache, fill, generate, plain_cache, score, sealed_bits
from spectral_kv_mlx.integration import exact_layer, install, model_shape
from spectral_kv_mlx.places import _fused

__all__ = [
    "InferenceEngine",
    "SpectralProfiler",
    "backend",
    "bench",
    "cache_nbytes",
    "capture",
    "decode_cache",
    "encode_cache",
    "fill",
    "footprint",
    "generate",
    "hybrid",
    "install",
    "load_model",
    "load_prompt_cache",
    "make_prompt_cache",
    "model_shape",
    "ops",
    "plain_cache",
    "restore",
    "leading_layers",
    "save_prompt_cache",
    "score",
    "sealed_bits",
]
NAME = "mlx"
PACKAGE = "mlx-lm"
PASSED = {0: "sliding window", 2: "sliding window"}  # layers of the tiny Gemma 3 that stay as they are
IS_ARRAY = mx.array

_kept: list = []  # models that tests share
new_model = make_model


@functools.cache
def model(name: str):
    return _keep(make_model(name))


def _keep(made):
    _kept.append(made)
    return made


@functools.cache
def profile(name: str):
    return calibrate(model(name), name=name)


@functools.cache
def model_of_three(name: str):
    """The tiny model `name`, with three layers."""
    return _keep(make_model(name, num_hidden_layers=3))


def restore(of) -> None:
    """Give `of` its host's attention back, and with it the models that tests share: a family has one attention."""
    for kept in (of, *_kept):
        if type(kept) is type(of):
            spectral_kv_mlx.restore(kept)


def calibrate(of, text=TEXT, name: str | None = None, **options):
    profiler = SpectralProfiler(**{"tokens": 2048, "document": 1024, "progress": False, **options})
    return profiler.profile_from_model(of, ByteTokenizer(), text, name=name)


def logits(of, ids: list[int], cache, chunk: int | None = None) -> np.ndarray:
    """Logits [T, V] of `ids`, fed `chunk` at a time."""
    chunk = chunk or len(ids)
    parts = [of(mx.array([ids[i : i + chunk]]), cache=cache) for i in range(0, len(ids), chunk)]
    return np.array(mx.concatenate(parts, axis=1).astype(mx.float32))[0]


def raw_logits(of, ids: list[int], cache):
    """Logits [1, T, V] as the model gives them."""
    return of(mx.array([ids]), cache=cache)


def padded_cache(of, padding: list[int], *args, **options):
    """A cache for a batch with left padding, which mlx-lm tells a cache itself."""
    return make_prompt_cache(of, *args, left_padding=padding, **options)


def batch_logits(of, rows: list[list[int]], padding: list[int], cache, start: int, stop: int) -> np.ndarray:
    """Logits [B, stop - start, V] of these slots of padded `rows`."""
    return np.array(of(mx.array([row[start:stop] for row in rows]), cache=cache))


def greedy(of, prompt: list[int], cache, count: int, before: list[int] = ()) -> list[int]:
    """The next `count` tokens by `generate_step`; `before`: what the cache has seen."""
    return [int(token) for token, _ in generate_step(mx.array(prompt), of, prompt_cache=cache, max_tokens=count)]


def layers(cache) -> list:
    return cache


def stores(cache) -> list:
    """The stores of the compressed layers of a cache, with every token that came in."""
    for layer in leading_layers(cache):
        layer.commit()
    return [layer.store for layer in leading_layers(cache)]


def is_compressed(layer) -> bool:
    return isinstance(layer, SpectralKVCache)


def seen(cache) -> int:
    (offset,) = {layer.offset for layer in cache}
    return offset


def crop(cache, count: int) -> None:
    """Take the last `count` tokens away."""
    assert trim_prompt_cache(cache, count) == count


def crop_layers(cache, count: int) -> None:
    """Take the last `count` tokens away, also of a cache that drops tokens: mlx-lm does not count on it."""
    for layer in cache:
        assert layer.trim(count) == count


def keys_and_values(layer) -> list[np.ndarray]:
    """Keys and values [B, H, T, D] of a plain layer."""
    held = exact_layer(layer)
    return [np.array(held.keys), np.array(held.values)]


def arrays(cache) -> list:
    """Every array of a cache."""
    held = [layer.arrays() if is_compressed(layer) else exact_layer(layer) for layer in cache]
    return [x for layer in held for x in (layer if isinstance(layer, list) else (layer.keys, layer.values))]


def foreign_layers() -> list:
    """Layers of the host that no file can hold."""
    return [CacheList(ArraysCache(2), KVCache()), QuantizedKVCache(), RotatingKVCache(16, keep=4)]


def tune(of) -> None:
    """Give a model other weights."""
    of.model.norm.weight = 1.5 * of.model.norm.weight


def adapt(of, layer: int, name: str, change: float = 0.02) -> None:
    """Merge an adapter of low rank into the weight `name` of a layer: it changes by the share `change`."""
    weight = dict(tree_flatten(of.layers[layer].parameters()))[name]
    a, b = (mx.random.normal((n, 2), key=mx.random.key(n)) for n in (weight.shape[0], weight[0].size))
    delta = (a @ b.T).reshape(weight.shape)
    changed = weight + delta * change * mx.linalg.norm(weight.reshape(-1)) / mx.linalg.norm(delta.reshape(-1))
    of.layers[layer].load_weights([(name, changed)], strict=False)


def cache_of_a_loop(of, made, bits: float):
    """A cache for a loop of one's own."""
    return make_prompt_cache(of, made, bits)


def update(cache, layer: int, keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Keys and values of all tokens, which a loop of one's own gets back."""
    return [np.array(x) for x in cache[layer].update_and_fetch(mx.array(keys), mx.array(values))]


@contextmanager
def own_attention(of) -> Iterator[None]:
    """The attention of the host itself, which decodes a compressed cache."""
    restore(of)
    assert not is_routed(of)
    try:
        yield
    finally:
        install(of)


def is_routed(of) -> bool:
    return attention_function(of) is not base.scaled_dot_product_attention


def attention_function(of):
    """What the module of the model would attend with."""
    return importlib.import_module(type(of.layers[0].self_attn).__module__).scaled_dot_product_attention


def fused(queries, keys, values, scale: float) -> np.ndarray:
    return np.array(_fused(*map(mx.array, (queries, keys, values)), scale))


def captured(of, ids: list[int]) -> dict[int, list[np.ndarray]]:
    """Queries, keys and values of every compressible layer."""
    cache = capture(of, ids)
    held = {i: cache[i] for i in model_shape(of)[0].layers}
    return {i: [np.array(x) for x in (layer.queries, layer.keys, layer.values)] for i, layer in held.items()}


@contextmanager
def attention_outputs(of) -> Iterator[dict[int, np.ndarray]]:
    """What the output projection of every layer receives, [B, T, Hq * D]."""
    found, run = {}, nn.Linear.__call__
    projections = {id(layer.self_attn.o_proj): i for i, layer in enumerate(of.layers)}

    def remember(self, x):
        if id(self) in projections:
            found[projections[id(self)]] = np.array(x)
        return run(self, x)

    with patch.object(nn.Linear, "__call__", remember):
        yield found


def attention_scale(of, layer: int) -> float:
    return of.layers[layer].self_attn.scale


@contextmanager
def counted_layers(of) -> Iterator[list]:
    """Every run of a layer but the first; none is replaced for good."""
    kind, runs, run = type(of.layers[0]), [], type(of.layers[0]).__call__

    def counted(self, *args, **options):
        if self is not of.layers[0]:
            runs.append(self)
        return run(self, *args, **options)

    with patch.object(kind, "__call__", counted):
        yield runs
    assert all(type(layer) is kind for layer in of.layers)


def poison(of) -> None:
    """Put NaN into a value projection."""
    of.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")


def cast(of, dtype: str):
    """`of` itself, with weights of `dtype`."""
    of.set_dtype(getattr(mx, dtype))
    return of


def dtype_of(x) -> str:
    return str(x.dtype).removeprefix("mlx.core.")


def storage(x: mx.array) -> tuple[int, int]:
    """Which array this is, and its bytes."""
    return id(x), x.nbytes

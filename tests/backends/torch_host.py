"""transformers and our PyTorch backend, under the names that `tests/backends` asks of a host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from hosts import ByteTokenizer
from torch_models import TEXT, hybrid, model_and_profile, tiny_model
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, StaticLayer
from transformers.modeling_utils import AttentionInterface

from spectral_kv_core.cache import compressed_layer
from spectral_kv_torch import (
    InferenceEngine,
    SpectralCache,
    SpectralProfiler,
    bench,
    cache_nbytes,
    capture,
    footprint,
    load_model,
    load_prompt_cache,
    make_prompt_cache,
    ops,
    restore,
    save_prompt_cache,
)
from spectral_kv_torch import generation as backend
from spectral_kv_torch.cache import SpectralKVLayer
from spectral_kv_torch.generation import decode_cache, encode_cache, fill, generate, plain_cache, score, sealed_bits
from spectral_kv_torch.handles import ATTENTION, _fused
from spectral_kv_torch.integration import cache_argument, install, model_shape

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
NAME = "torch"
PACKAGE = "transformers"
PASSED = {0: "sliding window"}  # layers of the tiny Gemma 3 that stay as they are
IS_ARRAY = torch.Tensor

new_model = tiny_model


def model(name: str):
    return model_and_profile(name)[0]


def profile(name: str):
    return model_and_profile(name)[1]


def model_of_three(name: str):
    """The tiny model `name`, which has three layers."""
    return model(name)


def calibrate(of, text=TEXT, name: str | None = None, **options):
    profiler = SpectralProfiler(**{"tokens": 2048, "document": 1024, "progress": False, **options})
    return profiler.profile_from_model(of, ByteTokenizer(), text, name=name)


def logits(of, ids: list[int], cache, chunk: int | None = None) -> np.ndarray:
    """Logits [T, V] of `ids`, fed `chunk` at a time."""
    with torch.no_grad():
        parts = torch.tensor([ids]).split(chunk or len(ids), dim=1)
        out = [of(part, use_cache=True, **cache_argument(of, cache)).logits for part in parts]
    return torch.cat(out, dim=1)[0].float().numpy()


def raw_logits(of, ids: list[int], cache):
    """Logits [1, T, V] as the model gives them."""
    with torch.no_grad():
        return of(torch.tensor([ids]), use_cache=True, **cache_argument(of, cache)).logits


def padded_cache(of, padding: list[int], *args, **options):
    """A cache for a batch with left padding, which transformers' masks tell it of."""
    return make_prompt_cache(of, *args, **options)


def batch_logits(of, rows: list[list[int]], padding: list[int], cache, start: int, stop: int) -> np.ndarray:
    """Logits [B, stop - start, V] of these slots of padded `rows`."""
    mask = (torch.arange(stop)[None] >= torch.tensor(padding)[:, None]).long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
    ids = torch.tensor([row[start:stop] for row in rows])
    with torch.no_grad():
        return of(ids, attention_mask=mask, position_ids=position, **cache_argument(of, cache)).logits.numpy()


def greedy(of, prompt: list[int], cache, count: int, before: list[int] = ()) -> list[int]:
    """The next `count` tokens by `model.generate`; `before`: what the cache has seen."""
    ids = torch.tensor([[*before, *prompt]])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    out = of.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(of, cache), **options)
    return out[0, ids.shape[1] :].tolist()


def layers(cache) -> list:
    return cache.layers


def leading_layers(cache) -> list:
    return compressed_layer.leading_layers(cache.layers)


def stores(cache) -> list:
    """The stores of the compressed layers of a cache, with every token that came in."""
    for layer in leading_layers(cache):
        layer.commit()
    return [layer.store for layer in leading_layers(cache)]


def is_compressed(layer) -> bool:
    return isinstance(layer, SpectralKVLayer)


def seen(cache) -> int:
    return cache.get_seq_length()


def crop(cache, count: int) -> None:
    """Take the last `count` tokens away."""
    cache.crop(-count)


def crop_layers(cache, count: int) -> None:
    """Take the last `count` tokens away, also of a cache that drops tokens."""
    cache.crop(-count)


def keys_and_values(layer) -> list[np.ndarray]:
    """Keys and values [B, H, T, D] of a plain layer."""
    return [layer.keys.numpy(), layer.values.numpy()]


def arrays(cache) -> list:
    """Every array of a cache."""
    return [
        x for layer in cache.layers for x in (layer.arrays() if is_compressed(layer) else (layer.keys, layer.values))
    ]


def foreign_layers() -> list:
    """Layers of the host that no file can hold."""
    return [LinearAttentionAndFullAttentionLayer(), StaticLayer(64)]


def tune(of) -> None:
    """Give a model other weights."""
    of.model.norm.weight.data.mul_(1.5)


def adapt(of, layer: int, name: str, change: float = 0.02) -> None:
    """Merge an adapter of low rank into the weight `name` of a layer: it changes by the share `change`."""
    weight = of.model.layers[layer].get_parameter(name)
    sides = [
        torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in (weight.shape[0], weight[0].numel())
    ]
    delta = (sides[0] @ sides[1].T).reshape(weight.shape)
    weight.data += delta * change * weight.data.norm() / delta.norm()


def cache_of_a_loop(of, made, bits: float):
    """A cache for a loop of one's own, which needs no model."""
    return SpectralCache(made, bits=bits)


def update(cache, layer: int, keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Keys and values of all tokens, which a loop of one's own gets back."""
    got = cache.update(torch.tensor(keys), torch.tensor(values), layer_idx=layer)
    assert all(type(x + 0) is torch.Tensor for x in got)
    return [(x + 0).numpy() for x in got]


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
    return of.config._attn_implementation == ATTENTION


def attention_function(of):
    """What the model and transformers would attend with."""
    return of.config._attn_implementation, AttentionInterface()[ATTENTION]


def fused(queries, keys, values, scale: float) -> np.ndarray:
    module = SimpleNamespace(num_key_value_groups=queries.shape[1] // keys.shape[1])
    return _fused(module, *map(torch.tensor, (queries, keys, values)), scale).numpy()


def captured(of, ids: list[int]) -> dict[int, list[np.ndarray]]:
    """Queries, keys and values of every compressible layer."""
    cache = capture(of, ids)
    held = {i: cache.layers[i] for i in model_shape(of)[0].layers}
    return {i: [x.detach().numpy() for x in (layer.queries, layer.keys, layer.values)] for i, layer in held.items()}


@contextmanager
def attention_outputs(of) -> Iterator[dict[int, np.ndarray]]:
    """What the output projection of every layer receives, [B, T, Hq * D]."""
    found = {}
    attention = [layer.self_attn for layer in of.model.layers]
    projections = [getattr(a, "o_proj", None) or a.dense for a in attention]
    hooks = [
        x.register_forward_pre_hook(lambda _, inputs, i=i: found.__setitem__(i, inputs[0].detach().numpy()))
        for i, x in enumerate(projections)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def attention_scale(of, layer: int) -> float:
    return of.model.layers[layer].self_attn.scaling


@contextmanager
def counted_layers(of) -> Iterator[list]:
    """Every run of a layer but the first; something else has put itself before their forward, as accelerate does."""
    runs, layers = [], of.model.layers

    def counted(forward):
        return lambda *args, **options: runs.append(forward) or forward(*args, **options)

    for layer in layers[1:]:
        layer.forward = counted(layer.forward)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        yield runs
        assert [layer.__dict__.get("forward") for layer in layers] == before and before[0] is None
    finally:
        for layer in layers[1:]:
            del layer.forward


def poison(of) -> None:
    """Put NaN into a value projection."""
    of.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")


def cast(of, dtype: str):
    """`of` itself, with weights of `dtype`; transformers leaves RoPE in float32."""
    for parameter in of.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return of


def dtype_of(x) -> str:
    return str(x.dtype).removeprefix("torch.")


def storage(x: torch.Tensor) -> tuple[int, int]:
    """Which memory an array lies in, and its bytes."""
    return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()

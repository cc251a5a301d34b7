"""The host's own cache: its layers for a model, and how a model is given one."""

from __future__ import annotations

import functools
import inspect

import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def host_layers(model, left_padding: list[int] | None = None) -> list:
    """The cache layers that transformers would use for `model`; it tells left padding by the mask, MLX here."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
    if all(
        type(layer) is DynamicLayer for layer in layers
    ):  # a decoder's number of layers has another name in some configs
        layers += [DynamicLayer() for _ in range(len(layers), _called_layers(model))]
    return layers


def _called_layers(model) -> int:
    """How many layers the modules of `model` number."""
    numbers = (getattr(module, "layer_idx", None) for module in model.modules())
    return 1 + max((number for number in numbers if isinstance(number, int)), default=-1)


def cache_argument(model, cache: Cache) -> dict[str, Cache]:
    """`cache` by the name that `model` takes it by: transformers 5.24 renames `past_key_values` to `cache`."""
    return {_cache_name(type(model)): cache}


@functools.cache
def _cache_name(model_class: type) -> str:
    names = inspect.signature(model_class.forward).parameters
    renamed = tuple(map(int, transformers.__version__.split(".")[:2])) >= (
        5,
        24,
    )  # asked of wrappers, which hand all on
    return "cache" if "past_key_values" not in names and (renamed or "cache" in names) else "past_key_values"


def plain_cache(model) -> Cache:
    """The host's own cache, which keeps everything."""
    return cache_of(host_layers(model))


def cache_of(layers: list) -> Cache:
    """The host's own cache made of `layers`."""
    cache = DynamicCache()
    cache.layers = layers
    return cache

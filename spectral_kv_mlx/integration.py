"""Everything that knows the inside of mlx-lm: model shape, attention dispatcher, loading."""

from __future__ import annotations

import copy
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    create_causal_mask,
)
from mlx_lm.utils import _download, load_config
from mlx_lm.utils import load_tokenizer as mlx_load_tokenizer

from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.cache.file_layers import ExactLayer, StateLayer, check_states, in_words
from spectral_kv_core.compat.engine import check_quantize
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.files import paths
from spectral_kv_core.hosts.weights import digest_weights, layer_weights, sampled
from spectral_kv_core.profile.model_shape import ModelShape

from .handles import is_ours, make_dispatcher, replacing, routing
from .ops import to_numpy

WEIGHT_GROUP = 64  # weights that share a scale where they are quantized here

ATTENTION = "scaled_dot_product_attention"
FLOATS = (mx.float32, mx.bfloat16, mx.float16)  # types of weights that are not quantized


def install(model) -> None:
    """Let `model` attend to compressed caches as codes; plain caches keep going to mlx-lm's own attention."""
    for owner, name, make in _places(model):
        if not is_ours(getattr(owner, name)):
            setattr(owner, name, make(getattr(owner, name)))
        getattr(owner, name).users[id(model)] = weakref.ref(model)


def dispatcher(host: Callable) -> Callable:
    """Attention that attends to our caches as codes; all else goes to `host`."""
    return make_dispatcher(host, _fused, MaskCheck())


def restore(model) -> None:
    """Give `model` its host's attention back; compressed caches then decode for it.

    Models of one family share their attention: it is given back when the last of them is restored.

    Args:
        model: A model that `make_prompt_cache` or `load_prompt_cache` has been called with.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import load_model, make_prompt_cache, restore
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model)
        >>> restore(model)
    """
    for owner, name, _ in _places(model):
        function = getattr(owner, name)
        if not is_ours(function):
            continue
        function.users.pop(id(model), None)
        if not any(user() is not None for user in function.users.values()):
            setattr(owner, name, function.host)


def _places(model) -> list[tuple[Any, str, Callable]]:
    """Where functions of ours stand while `model` is installed: owner, name, and what makes one of the host's own.

    The modules that `model` calls attention from, and the classes in them that its layers are made of.
    """
    names = _attention_modules(model)
    classes: dict[type, set[str]] = {}
    for part in (part for layer in model.layers if layer is not None for _, part in layer.named_modules()):
        bases = type(part).__mro__
        owner = next((base for base in bases if "__call__" in vars(base)), None)  # that says how `part` is called
        if owner is not None and owner.__module__ in names:
            classes.setdefault(owner, set()).update(names & {base.__module__ for base in bases})
    found = [(sys.modules[name], ATTENTION, dispatcher) for name in names]
    return found + [(owner, "__call__", partial(_routing_call, of)) for owner, of in classes.items()]


def _routing_call(modules: set[str], host: Callable) -> Callable:
    """How a part of a model is called: with a route while all `modules` that it may call attention from have ours."""

    def __call__(self, *args, **options):
        if not all(is_ours(getattr(sys.modules[name], ATTENTION)) for name in modules):
            return host(self, *args, **options)
        with routing():
            return host(self, *args, **options)

    return replacing(host, __call__)


@contextmanager
def routed(model) -> Iterator[None]:
    """Route the attention of `model` through ours for a while."""
    functions = [getattr(owner, name) for owner, name, _ in _places(model)]
    before = any(is_ours(function) and id(model) in function.users for function in functions)
    install(model)
    try:
        yield
    finally:
        if not before:
            restore(model)


@contextmanager
def replaced_attention(model, around: Callable[[Callable], Callable]) -> Iterator[None]:
    """Put `around(dispatcher)` where `model` calls attention, for a while."""
    install(model)
    before = {name: getattr(sys.modules[name], ATTENTION) for name in _attention_modules(model)}
    try:
        for name, function in before.items():
            setattr(sys.modules[name], ATTENTION, replacing(function.host, around(function), function.users))
        yield
    finally:
        for name, function in before.items():
            setattr(sys.modules[name], ATTENTION, function)


def _attention_modules(model) -> set[str]:
    """Modules of mlx-lm that `model` calls attention from."""
    return set().union(*(_routable(layer) for layer in model.layers if layer is not None))


def _routable(layer: nn.Module) -> set[str]:
    """Modules of the classes in `layer` that have mlx-lm's attention, or our dispatcher, under its usual name."""
    names = {cls.__module__ for _, module in layer.named_modules() for cls in type(module).__mro__}
    found = {name: getattr(sys.modules.get(name), ATTENTION, None) for name in names if name != base.__name__}
    return {name for name, f in found.items() if f is base.scaled_dot_product_attention or is_ours(f)}


def _fused(q, k, v, scale):
    """The host's fused kernel for L queries at the end of N keys, causal: [B, Hq, L, D]."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if q.shape[2] > 1 else None)


class MaskCheck:
    """Refuses masks that are not causal; looks at each once, as all layers of a forward pass share it."""

    def __init__(self):
        self._last: Callable = lambda: None

    def __call__(self, mask, cache, length: int) -> None:
        """Raise UsageError unless `mask` is causal, with the left padding of `cache` where it has some."""
        padding = getattr(cache, "left_padding", None)
        if not isinstance(mask, mx.array) or mask is self._last() or (length == 1 and padding is not None):
            return
        seen = cache.size() - length
        expected = create_causal_mask(length, seen, left_padding=mx.array(padding) if padding is not None else None)
        visible = mask if mask.dtype == mx.bool_ else mask >= 0
        if not mx.array_equal(*mx.broadcast_arrays(visible, expected[..., -mask.shape[-1] :])).item():
            raise UsageError(
                "Expected a causal mask with padding on the left only, received another mask. Pad on the left and give "
                "left_padding to make_prompt_cache."
            )
        self._last = weakref.ref(mask)


def _decoder(model) -> nn.Module:
    """The language model inside a wrapper, or `model` itself."""
    while hasattr(model, "language_model"):
        model = model.language_model
    return model


def _field(model, *names: str):
    """The first of the fields `names` that the arguments of `model` have, else None."""
    decoder = _decoder(model)
    args = getattr(decoder, "args", None) or getattr(getattr(decoder, "model", None), "args", None)
    return next((v for name in names if (v := getattr(args, name, None)) is not None), None)


def host_layers(model, left_padding: list[int] | None = None) -> list:
    """The cache layers that mlx-lm would use for `model`, whatever `make_cache` the instance was given.

    left_padding: slots before every sequence of a batch; raises UsageError where mlx-lm has no layers for it.
    """
    own = hasattr(type(model), "make_cache")
    layers = type(model).make_cache(model) if own else [KVCache() for _ in model.layers]
    return layers if left_padding is None else [padded(layer, left_padding) for layer in layers]


def padded(cache, left_padding: list[int]):
    """The host's counterpart of `cache` for a batch with left padding; raises UsageError where mlx-lm has none."""
    if type(cache) is KVCache:
        return BatchKVCache(left_padding)
    if type(cache) is RotatingKVCache and not cache.keep:
        return BatchRotatingKVCache(cache.max_size, left_padding)
    if type(cache) is ArraysCache:
        return ArraysCache(len(cache.cache), left_padding)
    raise UsageError(
        f"Expected layers that mlx-lm can pad, received a {type(cache).__name__} with left_padding. Generate row by row."
    )


def plain_cache(model) -> list:
    """The host's own cache, which keeps everything."""
    return host_layers(model)


def cache_of(layers: list) -> list:
    """The host's own cache made of `layers`."""
    return layers


def exact_layer(layer) -> ExactLayer | StateLayer:
    """What a layer of the host's own holds; raises UsageError for a kind that is no list of keys and values, nor states."""
    if type(layer) is ArraysCache:
        return StateLayer("mlx-lm", {str(i): x for i, x in enumerate(layer.cache) if x is not None})
    rotating = type(layer) in (RotatingKVCache, BatchRotatingKVCache)
    if not (rotating or type(layer) in (KVCache, BatchKVCache)) or getattr(layer, "keep", 0):
        raise UsageError(
            f"Expected layers that keep keys and values in their order, or states of linear attention, received a "
            f"{in_words(layer)}, which cannot be stored yet. Keep the prompt itself."
        )
    if layer.empty():
        raise UsageError("Expected a cache that has read a prompt, received an empty one.")
    if not rotating:
        padding = layer.left_padding.tolist() if isinstance(layer, BatchKVCache) else None
        return ExactLayer(*layer.keys_and_values(), layer.size(), padding)
    if isinstance(layer, BatchRotatingKVCache):
        layer = copy.copy(layer)
        layer._temporal_order()
        keys, values, seen = layer.keys[:, :, : layer._idx], layer.values[:, :, : layer._idx], layer._offset
    else:
        keys, values, seen = layer._temporal_order(layer.keys), layer._temporal_order(layer.values), layer.offset
    keep = min(seen, layer.max_size)
    return ExactLayer(keys[:, :, -keep:], values[:, :, -keep:], seen)


def set_exact_layer(layer, held: ExactLayer | StateLayer) -> None:
    """Let an empty layer of the host's own hold the arrays of `held`; raises UsageError when they do not fit it."""
    if isinstance(held, StateLayer):
        check_states(held, "mlx-lm", [str(i) for i in range(len(getattr(layer, "cache", ())))])
        for name, x in held.states.items():
            layer[int(name)] = x
        layer.left_padding = None  # which has been read
        return
    seen, received, window = held.seen, held.keys.shape[2], getattr(layer, "max_size", held.seen + 1)
    if received < min(seen, window - 1):
        raise UsageError(
            f"Expected the last {min(seen, window - 1):,} tokens for a window of {window:,}, received {received:,}: the cache "
            "is of a model with another window. Make it again."
        )
    keep = min(seen, window)
    # torch keeps one token less than the window: the slot of the missing one is the first to be overwritten
    gap = [(0, 0), (0, 0), (max(keep - received, 0), 0), (0, 0)]
    keys, values = (mx.pad(x[:, :, -keep:], gap) for x in (held.keys, held.values))
    kind = type(layer)
    if kind is KVCache:
        layer.state = keys, values, seen
    elif kind is RotatingKVCache:
        layer.state = keys, values, seen, layer.keep, window, keep
    elif kind is BatchKVCache:
        layer.state = keys, values, layer.offset + seen, layer.left_padding, seen
    else:
        padding = layer.left_padding - (seen - keep)
        layer.state = keys, values, layer.offset + seen, padding, window, seen, keep, False


def model_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """Architecture numbers of `model`, and the layers that are passed through with the reason."""
    number, heads, hidden = len(model.layers), _heads(model), _hidden(model)
    passed, caches = {}, host_layers(model)
    for i, cache in enumerate(caches):
        if isinstance(cache, RotatingKVCache):
            passed[i] = "sliding window"
        elif isinstance(cache, ArraysCache):
            passed[i] = "linear attention"
        elif type(cache) is not KVCache:
            passed[i] = type(cache).__name__
    everywhere = _unsupported(model, caches, passed)
    if everywhere:
        passed = dict.fromkeys(range(number), everywhere)
    shape = ModelShape(
        number,
        hidden,
        heads,
        _field(model, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads,
        _head_dim(model),
        tuple(i for i in range(number) if i not in passed),
        read_rope(model),
    )
    return shape, passed


def _unsupported(model, caches: list, passed: dict) -> str | None:
    if _field(model, "kv_lora_rank"):
        return "multi-head latent attention"
    if _field(model, "attn_logit_softcapping"):
        return "soft-capped attention scores"
    if any(name.endswith((".sinks", ".attention_sink_bias")) for name, _ in tree_flatten(model.parameters())):
        return "attention sink logits"
    if len(caches) != len(model.layers) or _field(model, "num_kv_shared_layers", "use_cla"):
        return "keys and values shared between layers"
    if any(not _routable(model.layers[i]) for i in range(len(caches)) if i not in passed):
        return "attention code of its own"
    return None


def read_rope(model) -> Rope | None:
    """Rotary embedding of the full-attention layers, read from the model's own modules; measured if of unknown kind."""
    layers = [layer for layer, cache in zip(model.layers, host_layers(model)) if type(cache) is KVCache]
    for layer in layers or model.layers:
        for _, module in layer.named_modules():
            rope = getattr(module, "rope", getattr(module, "rotary_emb", None))
            if isinstance(rope, nn.Module):
                return _read_rope(rope, _head_dim(model))
    return None


def _heads(model) -> int:
    return _field(model, "num_attention_heads", "n_head", "n_heads", "num_heads")


def _hidden(model) -> int:
    return _field(model, "hidden_size", "n_embd", "dim", "d_model")


def _head_dim(model) -> int:
    return _field(model, "head_dim") or _hidden(model) // _heads(model)


def _read_rope(rope: nn.Module, head_dim: int) -> Rope:
    if type(rope) is nn.RoPE:
        periods = rope.base ** (np.arange(0, rope.dims, 2) / rope.dims)
        return Rope(tuple(float(w) for w in rope.scale / periods), bool(rope.traditional))
    if hasattr(rope, "_freqs"):
        inv_freq = 1 / to_numpy(rope._freqs).astype(np.float64)
        scaling = float(getattr(rope, "mscale", None) or getattr(rope, "_scale", None) or 1.0)
        return Rope(tuple(float(w) for w in inv_freq), bool(getattr(rope, "traditional", False)), scaling)
    return measure_rope(rope, head_dim)


def measure_rope(rope, head_dim: int) -> Rope | None:
    """What `rope(x, offset=1)` does to the unit vectors of `head_dim` channels; None when it rotates nothing."""
    image = to_numpy(rope(mx.eye(head_dim)[:, None, None], offset=1))[:, 0, 0].astype(np.float64)  # [in, out]
    sine = np.triu(image, 1)  # channel i goes to its partner j > i with scaling * sin(w)
    first, second = np.nonzero(sine)
    if not len(first):
        return None
    angle = np.arctan2(sine[first, second], image[first, first])
    scaling = float(np.median(np.hypot(sine[first, second], image[first, first])))
    interleaved = bool((second == first + 1).all()) and len(first) > 1
    return Rope(tuple(float(w) for w in angle), interleaved, scaling)


def _final_norm(model) -> mx.array | None:
    """Weight of the final norm: model-wide, and touched by no weight quantization."""
    flat = tree_flatten(_decoder(model).parameters())
    norms = [p for name, p in flat if name.endswith("norm.weight") and "layers." not in name]
    return norms[-1] if norms else None


def weights_digest(model) -> str:
    """`digest_weights`."""
    norm, held = _final_norm(model), dict(tree_flatten(_decoder(model).parameters()))
    known = None if norm is None else to_numpy(norm)
    chosen = [(key, held[name]) for key, name in layer_weights(held)]
    if not chosen or any(p.dtype not in FLOATS for _, p in chosen):
        return digest_weights(known)
    kinds = (f"{key} {tuple(p.shape)} {p.dtype == mx.float16}" for key, p in chosen)
    samples = mx.concatenate([sampled(p.reshape(-1), p.size).astype(mx.float32) for _, p in chosen])
    return digest_weights(known, kinds, to_numpy(samples))


def load_model(name: str | os.PathLike, dtype: str | None = None, quantize: str | None = None):
    """Load a model and its tokenizer as mlx-lm does.

    Args:
        name: A directory or a hub id.
        dtype: Type of the weights, such as `bfloat16`; None as they are stored, on the CPU float32.
        quantize: `4bit` or `8bit` weights by MLX; None as they are stored. Weights that are stored quantized stay so.

    Returns:
        The model with its weights in memory, and its tokenizer.

    Raises:
        FileNotFoundError: There is no such directory, or the hub has no such model.
        UsageError: `quantize` is no width that is known.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import load_model
        >>> model, tokenizer = load_model(demo_model_path())
        >>> tokenizer.decode(tokenizer.encode("The sea"))
        'The sea'
    """
    check_quantize(quantize)
    if not Path(name).exists() and str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"Expected a model directory, found nothing at {name}.")
    try:
        path = _download(str(name))
        config = load_config(path)
        model, tokenizer = mlx_lm.load(str(path), model_config=_config_corrections(config), lazy=True)
    except OSError as error:
        raise FileNotFoundError(
            f"Expected a model directory, a hub id or demo, cannot load {str(name)!r}: {first_line(error)}"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"Expected a model that mlx-lm knows, cannot load {str(name)!r}: {first_line(error)}"
        ) from error
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):  # half precision is emulated there
        dtype = "float32"
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    if quantize is not None:
        _quantize(model, int(quantize.removesuffix("bit")))
    mx.eval(model.parameters())
    model.name_or_path = str(name)
    return model, tokenizer


def _quantize(model, bits: int) -> None:
    """Quantize what is not yet: layers whose rows are whole groups, as mlx-lm's `convert` does."""

    def whole(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % WEIGHT_GROUP == 0

    nn.quantize(model, WEIGHT_GROUP, bits, class_predicate=whole)


def load_tokenizer(model):
    """The tokenizer that `model` came with; None where `load_model` did not load it, or there is none."""
    name = getattr(model, "name_or_path", "")
    try:
        return mlx_load_tokenizer(_download(name)) if name else None
    except (OSError, ValueError):
        return None


def model_name(model) -> str:
    """Hub id or folder that `load_model` found the model in, else its kind."""
    return paths.model_name(getattr(model, "name_or_path", "")) or str(
        _field(model, "model_type") or type(model).__name__
    )


def _config_corrections(config: dict) -> dict:
    """What mlx-lm reads in other places of config.json than transformers 5 writes it to.

    transformers 5 has the RoPE base and scaling only under `rope_parameters`, by layer type where layers differ; most
    model files of mlx-lm 0.32 then take a default base without a word.
    """
    corrections = {}
    if isinstance(config.get("text_config"), dict):
        corrections["text_config"] = {**config["text_config"], **_config_corrections(config["text_config"])}
    parameters = config.get("rope_parameters") or {}
    by_layer = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    full = by_layer.get("full_attention", {}) if by_layer else parameters
    local = by_layer.get("sliding_attention", {})
    scaled = full.get("rope_type", "default") != "default"
    found = {
        "rope_theta": full.get("rope_theta"),
        "rope_global_base_freq": full.get("rope_theta") if by_layer else None,
        "rope_local_base_freq": local.get("rope_theta"),
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "rope_scaling": {k: v for k, v in full.items() if k != "rope_theta"} if scaled else None,
    }
    types = config.get("layer_types") or []
    if "sliding_attention" in types and "full_attention" in types:
        found["sliding_window_pattern"] = types.index("full_attention") + 1
    return corrections | {k: v for k, v in found.items() if v is not None and config.get(k) is None}


def end_tokens(tokenizer) -> set[int]:
    """Tokens that end a generation."""
    ends = getattr(tokenizer, "eos_token_ids", None)
    return set(ends) if ends else {getattr(tokenizer, "eos_token_id", None)}


def model_dtype(model) -> mx.Dtype:
    """Dtype in which the model keeps keys and values."""
    norm = _final_norm(model)
    return mx.float32 if norm is None else norm.dtype


def max_context(model) -> int | None:
    """Tokens that the model was made for, None when unknown."""
    return _field(model, "max_position_embeddings", "max_seq_len", "n_positions")

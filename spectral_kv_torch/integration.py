"""Everything that knows the inside of transformers 5: model shape, attention and mask registration, loading."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.cache.file_layers import ExactLayer, StateLayer, check_states, in_words
from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.compat.engine import check_quantize
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.files import paths
from spectral_kv_core.hosts.weights import digest_weights, layer_weights, sampled
from spectral_kv_core.profile.model_shape import ModelShape
from spectral_kv_core.profile.model_survey import CODES, PASSED, LayerSurvey

from . import ops
from .handles import ATTENTION, RoutedName, attention_forward

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # types of weights that are not quantized
STATES = ("conv_states", "recurrent_states")  # of a layer of linear attention


def register() -> None:
    """Make `attn_implementation="spectralkv"` known, for attention and for masks."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def install(model) -> None:
    """Let `model` attend to compressed caches as codes; plain caches go to sdpa."""
    register()
    if is_routed(model):
        return
    configurations = _configurations(model)
    before = [config._attn_implementation for config, _ in configurations]
    model.set_attn_implementation(ATTENTION)
    for (config, has_sdpa), name in zip(configurations, before):
        if config._attn_implementation == ATTENTION:
            if name == ATTENTION:  # a part that was installed alone, or a model that was loaded with our name
                name = getattr(name, "before", "sdpa")
            config._attn_implementation_internal = RoutedName(name, decode=not has_sdpa)


def is_routed(model) -> bool:
    """Whether `model` attends to compressed caches as codes."""
    return any(isinstance(config._attn_implementation, RoutedName) for config, _ in _configurations(model))


def restore(model) -> None:
    """Give `model` its host's attention back; compressed caches then decode for it.

    Every part of the model gets the attention that it had before. Caches decode for eager and sdpa; torch refuses to
    compile flex_attention for them.

    Args:
        model: A model that `make_prompt_cache` or `load_prompt_cache` has been called with.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import load_model, make_prompt_cache, restore
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model)
        >>> restore(model)
        >>> model.config._attn_implementation
        'sdpa'
    """
    for config, _ in _configurations(model):
        if isinstance(name := config._attn_implementation, RoutedName):
            config._attn_implementation_internal = name.before


@contextmanager
def routed(model) -> Iterator[None]:
    """Let `model` attend to compressed caches as codes, for a while."""
    was_routed = is_routed(model)
    install(model)
    try:
        yield
    finally:
        if not was_routed:
            restore(model)


def _configurations(model) -> list[tuple]:
    """Every configuration of `model` and of its parts, and whether the part that reads it has sdpa."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = {id(part.config): (part.config, bool(part._supports_sdpa)) for part in parts}
    waiting = [(model.config, bool(getattr(model, "_supports_sdpa", True)))]
    while waiting:
        config, has_sdpa = waiting.pop()
        config, has_sdpa = found.setdefault(id(config), (config, has_sdpa))
        inner = (getattr(config, name, None) for name in config.sub_configs)
        waiting += [(one, has_sdpa) for one in inner if one is not None]
    return list(found.values())


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


def exact_layer(layer) -> ExactLayer | StateLayer:
    """What a layer of the host's own holds; raises UsageError for a kind that is no list of keys and values, nor states."""
    if isinstance(layer, WindowLayer):
        return ExactLayer(*layer.exact(), layer.seen)
    if type(layer) is LinearAttentionLayer and not layer.record_past:
        held = [(f"{kind}/{i}", x) for kind in STATES for i, x in getattr(layer, kind).items()]
        return StateLayer("transformers", {name: x for name, x in held if x is not None})
    if type(layer).__name__ == "DummyLayer":
        return StateLayer("transformers", {})
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UsageError(
            f"Expected layers that keep keys and values in their order, or states of linear attention, received a "
            f"{in_words(layer)}, which cannot be stored yet. Keep the prompt itself."
        )
    if not layer.get_seq_length():
        raise UsageError("Expected a cache that has read a prompt, received an empty one.")
    keep = _kept(layer, layer.get_seq_length())
    return ExactLayer(layer.keys[:, :, -keep:], layer.values[:, :, -keep:], layer.get_seq_length())


def set_exact_layer(layer, held: ExactLayer | StateLayer) -> None:
    """Let an empty layer of the host's own hold the tensors of `held`; raises UsageError when they do not fit it."""
    if isinstance(held, StateLayer):
        _set_states(layer, held)
        return
    layer.lazy_initialization(held.keys, held.values)
    if layer.is_sliding:
        layer.cumulative_length = held.seen
    keep = _kept(layer, held.seen)
    if held.keys.shape[2] < keep:
        raise UsageError(
            f"Expected the last {keep:,} tokens for a window of {layer.sliding_window:,}, received {held.keys.shape[2]:,}: "
            "the cache is of a model with another window. Make it again."
        )
    layer.keys, layer.values = (ops.copy(x[:, :, -keep:]) for x in (held.keys, held.values))


def _set_states(layer, held: StateLayer) -> None:
    of_layer = {f"{kind}/{i}": (kind, i) for kind in STATES for i in getattr(layer, kind, ())}
    check_states(held, "transformers", of_layer)
    for name, x in held.states.items():
        kind, number = of_layer[name]
        if kind == "conv_states":
            layer.update_conv_state(x, state_idx=number)
        else:
            layer.update_recurrent_state(x, state_idx=number)


def _kept(layer, seen: int) -> int:
    """How many of `seen` tokens a layer of the host's own has use for: one less than its window, where it has one."""
    return min(seen, layer.sliding_window - 1) if layer.is_sliding else seen


def model_name(model) -> str:
    """Hub id or folder of the model, else its kind."""
    return paths.model_name(model.config.name_or_path) or type(model).__name__


def model_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """Architecture numbers of `model`, and the layers that are passed through with the reason, as `survey` sees them."""
    from . import survey  # which makes caches, and they stand on this module

    return survey.model_shape(model)


def window_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """`model_shape` with the layers that have a sliding window, and no others."""
    from . import survey

    return survey.window_shape(model)


def text_config(model):
    """The configuration of the part of `model` that has the cache."""
    return model.config.get_text_config(decoder=True)


def window_kind(model, layer_idx: int) -> str:
    """What a layer that keeps its last tokens only is called."""
    kinds = getattr(text_config(model), "layer_types", None) or ()
    return "chunked attention" if kinds[layer_idx : layer_idx + 1] == ["chunked_attention"] else "sliding window"


def read_layers(model) -> list[LayerSurvey]:
    """What the configuration says of every layer, of a model that cannot be called here."""
    config, rope = text_config(model), read_rope(model)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = heads, getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim, rope
    latent, layers = getattr(config, "kv_lora_rank", None), []
    for i, layer in enumerate(host_layers(model)):
        if latent:
            reason = "multi-head latent attention"
        elif getattr(layer, "is_sliding", False):
            reason = window_kind(model, i)
        else:
            reason = {"DynamicLayer": "", "DummyLayer": "no cache"}.get(type(layer).__name__, "linear attention")
        layers.append(LayerSurvey(PASSED if reason else CODES, reason, *sizes))
    return layers


def read_rope(model) -> Rope | None:
    """Rotary embedding of the full-attention layers, read from the model's own buffers."""
    known = known_ropes(model)
    if not known:
        return None
    rotary = next(m for m in model.modules() if any(name.endswith("inv_freq") for name in m._buffers))
    rotate_half = getattr(sys.modules[type(rotary).__module__], "rotate_half", None)
    probe = torch.arange(4.0)  # (0, 1, 2, 3) -> (-2, -3, 0, 1) when halves pair up, (-1, 0, -3, 2) when neighbors do
    interleaved = rotate_half is not None and rotate_half(probe).tolist()[1] == 0.0
    return next(rope for rope in known if rope.interleaved == interleaved)


def known_ropes(model) -> list[Rope]:
    """Rotations that `model` holds frequencies of, those of full-attention layers first, in all ways to pair and to turn."""
    found = []
    for module in model.modules():
        for name, frequencies in module._buffers.items():
            if name.endswith("inv_freq") and "original" not in name and frequencies is not None:
                prefix = name.removesuffix("inv_freq")
                scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0) or 1.0)
                numbers = tuple(float(w) for w in frequencies.detach().double().cpu().numpy())
                found.append((prefix != "full_attention_", numbers, scaling))
    found.sort(key=lambda one: one[0])
    return [
        Rope(tuple(sign * w for w in numbers), pairs, scaling)
        for _, numbers, scaling in dict.fromkeys(found)
        for sign in (1, -1)
        for pairs in (False, True)
    ]


def routes(model) -> list[tuple]:
    """Every configuration of `model`, and the name of the attention that stands in it."""
    return [(config, config._attn_implementation) for config, _ in _configurations(model)]


def set_routes(before: list[tuple]) -> None:
    """Put names of `routes` back."""
    for config, name in before:
        config._attn_implementation_internal = name


def weights_digest(model) -> str:
    """`digest_weights`; weights that are offloaded are not known."""
    held = dict(model.named_parameters())
    norms = [p for name, p in held.items() if name.endswith("norm.weight") and ".layers." not in name]
    norm = ops.to_numpy(norms[-1]) if norms and not norms[-1].is_meta else None
    chosen = [(key, held[name].detach()) for key, name in layer_weights(held)]
    if not chosen or any(p.is_meta or p.dtype not in FLOATS for _, p in chosen):
        return digest_weights(norm)
    kinds = (f"{key} {tuple(p.shape)} {p.dtype == torch.float16}" for key, p in chosen)
    at = chosen[0][1].device
    return digest_weights(
        norm, kinds, ops.to_numpy(torch.cat([sampled(p.reshape(-1), p.numel()).to(at) for _, p in chosen]))
    )


def load_model(name: str | os.PathLike, dtype: str | None = None, quantize: str | None = None):
    """Load a model and its tokenizer as transformers does.

    Args:
        name: A directory or a hub id.
        dtype: Type of the weights, such as `bfloat16`; None as they are stored.
        quantize: `4bit` or `8bit` weights by bitsandbytes, which needs CUDA; None as they are stored.

    Returns:
        The model in evaluation mode, on the first CUDA card where there is one, and its tokenizer.

    Raises:
        FileNotFoundError: There is no such directory, or the hub has no such model.
        UsageError: `quantize` is no width that is known, or this machine cannot do it.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import load_model
        >>> model, tokenizer = load_model(demo_model_path())
        >>> tokenizer.decode(tokenizer.encode("The sea"))
        'The sea'
    """
    if not Path(name).exists() and str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"Expected a model directory, found nothing at {name}.")
    options = _quantization(quantize)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", **options)
    except OSError as error:
        raise FileNotFoundError(
            f"Expected a model directory, a hub id or demo, cannot load {name!r}: {first_line(error)}"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"Expected a model that transformers knows, cannot load {name!r}: {first_line(error)}"
        ) from error
    if not options:  # bitsandbytes puts its weights on the card itself
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def load_tokenizer(model):
    """The tokenizer that `model` came with; None where its config does not say from where, or there is none."""
    name = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name) if name else None
    except (OSError, ValueError):
        return None


def _quantization(quantize: str | None) -> dict:
    """Options of `from_pretrained` for quantized weights; raises UsageError where bitsandbytes cannot run."""
    if check_quantize(quantize) is None:
        return {}
    missing = [] if torch.cuda.is_available() else ["a CUDA card"]
    missing += [] if find_spec("bitsandbytes") else ["bitsandbytes (pip install bitsandbytes)"]
    if missing:
        raise UsageError(
            f"Expected {' and '.join(missing)} for quantize={quantize!r}, found none. Use quantize=None, or spectral_kv_mlx, "
            "which quantizes weights everywhere: the cache is compressed either way."
        )
    bits = (
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        if quantize == "4bit"
        else {"load_in_8bit": True}
    )
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": 0}}


def device_of(model) -> torch.device:
    """Where `model` runs, which is not where weights are that wait elsewhere until they are used."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model, "_hf_hook", None)  # of accelerate
    at = getattr(hook, "execution_device", None)
    return torch.device("cpu" if at is None else at)


def model_dtype(model) -> np.dtype | torch.dtype:
    """Dtype in which the model keeps keys and values."""
    return model.dtype


def max_context(model) -> int | None:
    """Tokens that the model was made for, None when unknown."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

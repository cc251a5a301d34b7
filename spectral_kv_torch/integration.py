"""Everything that knows the inside of transformers 5: model shape, attention and mask registration, loading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from spectral_kv_core.cache.file_layers import ExactLayer, StateLayer, check_states, in_words
from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.compat.engine import check_quantize
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.files import paths
from spectral_kv_core.hosts.weights import digest_weights, layer_weights, sampled

from . import ops
from .arguments import device_of, max_context
from .host_cache import cache_argument, cache_of, host_layers, plain_cache
from .routing import install, is_routed, register, restore, routed
from .survey import model_shape, survey, window_shape

__all__ = [
    "cache_argument", "cache_of", "device_of", "exact_layer", "host_layers", "install", "is_routed", "load_model",
    "load_tokenizer", "max_context", "model_dtype", "model_name", "model_shape", "parts", "plain_cache", "register", "restore",
    "routed", "sample_of", "set_exact_layer", "survey", "weights_digest", "window_shape",
]  # fmt: skip

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # types of weights that are not quantized
STATES = ("conv_states", "recurrent_states")  # of a layer of linear attention


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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False, **options)
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
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False) if name else None
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


def model_dtype(model) -> np.dtype | torch.dtype:
    """Dtype in which the model keeps keys and values."""
    return model.dtype


def parts(model) -> Iterator[torch.nn.Module]:
    """All modules of `model`."""
    return model.modules()


def sample_of(part) -> np.ndarray | None:
    """Some weights of a module; None where none are in memory."""
    weight = next(part.parameters(), None)
    return (
        None if weight is None or weight.is_meta else ops.to_numpy(sampled(weight.detach().reshape(-1), weight.numel()))
    )

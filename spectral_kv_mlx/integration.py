"""Everything that knows the inside of mlx-lm: model shape, attention dispatcher, loading."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _download, load_config
from mlx_lm.utils import load_tokenizer as mlx_load_tokenizer

from spectral_kv_core.compat.engine import check_quantize
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.hosts.weights import digest_weights, layer_weights, sampled

from .arguments import decoder, final_norm, max_context, model_name
from .host_cache import cache_of, exact_layer, host_layers, plain_cache, set_exact_layer
from .ops import to_numpy
from .places import restore
from .survey import install, model_shape, survey, window_shape

__all__ = [
    "cache_of", "end_tokens", "exact_layer", "host_layers", "install", "load_model", "load_tokenizer", "max_context",
    "model_dtype", "model_name", "model_shape", "parts", "plain_cache", "restore", "sample_of", "set_exact_layer", "survey",
    "weights_digest", "window_shape",
]  # fmt: skip
WEIGHT_GROUP = 64  # weights that share a scale where they are quantized here
FLOATS = (mx.float32, mx.bfloat16, mx.float16)  # types of weights that are not quantized


def parts(model) -> list[nn.Module]:
    """All modules of `model`."""
    return model.modules()


def sample_of(part) -> np.ndarray | None:
    """Some weights of a module; None for one without."""
    weight = next((x for _, x in tree_flatten(part.parameters())), None)
    return None if weight is None else to_numpy(sampled(weight.reshape(-1), weight.size))


def weights_digest(model) -> str:
    """`digest_weights`."""
    norm, held = final_norm(model), dict(tree_flatten(decoder(model).parameters()))
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
        model, tokenizer = mlx_lm.load(
            str(path), {"trust_remote_code": False}, config_corrections(config), lazy=True, trust_remote_code=False
        )
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
        return mlx_load_tokenizer(_download(name), {"trust_remote_code": False}) if name else None
    except (OSError, ValueError):
        return None


def config_corrections(config: dict) -> dict:
    """What mlx-lm reads in other places of config.json than transformers 5 writes it to.

    transformers 5 has the RoPE base and scaling only under `rope_parameters`, by layer type where layers differ; most
    model files of mlx-lm 0.32 then take a default base without a word.
    """
    corrections = {}
    if isinstance(config.get("text_config"), dict):
        corrections["text_config"] = {**config["text_config"], **config_corrections(config["text_config"])}
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
    norm = final_norm(model)
    return mx.float32 if norm is None else norm.dtype

"""What the arguments of a model say, under the names that the modules of mlx-lm have for it.

A survey sees more: this is for a model that has no weights yet, and for one that cannot be called with tokens alone.
"""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from spectral_kv_core.files import paths
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED, SLIDING_WINDOW, LayerSurvey

from .host_cache import host_layers
from .places import attention_modules_of
from .rotation import read_rope


def decoder(model) -> nn.Module:
    """The language model inside a wrapper, or `model` itself."""
    while hasattr(model, "language_model"):
        model = model.language_model
    return model


def field(model, *names: str):
    """The first of the fields `names` that the arguments of `model` have, else None."""
    inside = decoder(model)
    args = getattr(inside, "args", None) or getattr(getattr(inside, "model", None), "args", None)
    return next((v for name in names if (v := getattr(args, name, None)) is not None), None)


def model_name(model) -> str:
    """Hub id or folder that `load_model` found the model in, else its kind."""
    return paths.model_name(getattr(model, "name_or_path", "")) or str(
        field(model, "model_type") or type(model).__name__
    )


def final_norm(model):
    """Weight of the final norm: model-wide, and touched by no weight quantization; None where there is none."""
    flat = tree_flatten(decoder(model).parameters())
    norms = [p for name, p in flat if name.endswith("norm.weight") and "layers." not in name]
    return norms[-1] if norms else None


def hidden_size(model) -> int:
    """Width of what goes from layer to layer; 0 where neither arguments nor the final norm tell."""
    told = field(model, "hidden_size", "n_embd", "dim", "d_model", "model_dim")
    norm = final_norm(model) if told is None else None
    return told or (0 if norm is None else norm.size)


def q_heads(model) -> int:
    """Query heads of a layer; 0 where no argument tells."""
    told = field(model, "num_attention_heads", "n_head", "n_heads", "num_heads")
    return told if isinstance(told, int) else 0


def max_context(model) -> int | None:
    """Tokens that the model was made for, None when unknown."""
    return field(model, "max_position_embeddings", "max_seq_len", "n_positions")


def why_kept(cache) -> str:
    """Why a layer keeps `cache`, one of the host's own; "" for a plain one, which can be compressed."""
    if isinstance(cache, RotatingKVCache):
        return SLIDING_WINDOW
    if isinstance(cache, ArraysCache):
        return "linear attention"
    if isinstance(cache, ChunkedKVCache):
        return f"attention within chunks of {cache.chunk_size:,} tokens"
    if isinstance(cache, CacheList):
        recurrent = any(isinstance(x, ArraysCache) for x in cache.caches)
        return "attention and linear attention in one layer" if recurrent else "two sets of keys in one layer"
    return "" if type(cache) is KVCache else "a cache of its own kind"


def argued_layers(model) -> list[LayerSurvey]:
    """How every layer of `model` would use its cache, by its arguments alone."""
    caches, heads = host_layers(model), q_heads(model)
    kv_heads = field(model, "num_key_value_heads", "num_kv_heads", "n_kv_heads")
    kv_heads = kv_heads if isinstance(kv_heads, int) else heads
    head_dim = field(model, "head_dim") or (hidden_size(model) // heads if heads else 0)
    sizes = {"q_heads": heads, "kv_heads": kv_heads, "key_dim": head_dim, "value_dim": head_dim}
    everywhere = ""
    if field(model, "kv_lora_rank"):
        everywhere = "multi-head latent attention"
    elif not heads or not head_dim:
        everywhere = "heads that its arguments do not tell"
    rope = None if everywhere else read_rope(model, head_dim)
    found = []
    for i, layer in enumerate(model.layers):
        reason = everywhere or (why_kept(caches[i]) if i < len(caches) else "the keys and values of another layer")
        if reason:
            found.append(LayerSurvey(PASSED, reason, **sizes))
        elif not attention_modules_of(layer):
            found.append(LayerSurvey(DECODED, "attention code of its own", **sizes, rope=rope))
        else:
            found.append(LayerSurvey(CODES, "", **sizes, rope=rope))
    return found

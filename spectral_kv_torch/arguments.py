"""What a model's configuration and buffers say of it.

A survey sees more: this is for a model that has no weights yet, and for one that cannot be called with tokens alone.
"""

from __future__ import annotations

import sys

import torch

from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.profile.model_survey import CODES, PASSED, SLIDING_WINDOW, LayerSurvey

from .host_cache import host_layers


def text_config(model):
    """The configuration of the part of `model` that has the cache."""
    return model.config.get_text_config(decoder=True)


def window_kind(model, layer_idx: int) -> str:
    """What a layer that keeps its last tokens only is called."""
    kinds = getattr(text_config(model), "layer_types", None) or ()
    return "chunked attention" if kinds[layer_idx : layer_idx + 1] == ["chunked_attention"] else SLIDING_WINDOW


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


def device_of(model) -> torch.device:
    """Where `model` runs, which is not where weights are that wait elsewhere until they are used."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model, "_hf_hook", None)  # of accelerate
    at = getattr(hook, "execution_device", None)
    return torch.device("cpu" if at is None else at)


def max_context(model) -> int | None:
    """Tokens that the model was made for, None when unknown."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

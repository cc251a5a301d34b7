"""Tiny random transformers models, seeded, built in memory."""

from __future__ import annotations

import functools

import torch
from hosts import ByteTokenizer
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from spectral_kv_torch import SpectralProfiler
from spectral_kv_torch.integration import cache_argument

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SCALING = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "llama3-rope": lambda: LlamaConfig(**SIZES, rope_parameters={**SCALING, "original_max_position_embeddings": 64}),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=32, layer_types=["sliding_attention", "full_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "phi": lambda: PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "phi3": lambda: Phi3Config(**SIZES),
}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 32}
HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SCAN = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRIDS = {
    "qwen3_next": lambda: Qwen3NextConfig(**SIZES, **MIXED, **HEADS, num_experts=0, mlp_only_layers=[0, 1, 2]),
    "qwen3_5": lambda: Qwen3_5TextConfig(**SIZES, **MIXED, **HEADS),
    "jamba": lambda: JambaConfig(
        **SIZES, num_experts=2, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4
    ),
    "falcon_h1": lambda: FalconH1Config(**SIZES, **SCAN, head_dim=16),
}


@functools.cache
def hybrid(name: str):
    """A tiny model with layers of linear attention."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(HYBRIDS[name](), dtype=torch.float32).eval()


def tiny_model(name: str):
    """The model `name` with weights large enough that attention matters; Qwen2 gets strongly biased keys."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    if name == "qwen2":
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data.normal_(0, 5)
    return model


def tokens(count: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """[batch, count] token ids above the special ones."""
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


# uniformly random tokens, like the prompts of the tests
TEXT = [bytes(b - 3 for b in tokens(1024, seed=9 + i)[0].tolist()).decode("latin-1") for i in range(2)]


@functools.cache
def model_and_profile(name: str):
    """The tiny model `name`, and a profile of it."""
    model = tiny_model(name)
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False)
    return model, profiler.profile_from_model(model, ByteTokenizer(), TEXT, name=name)


def logits_of(model, ids, cache, chunk=None, **kwargs):
    """Logits [B, T, V] of `ids` fed in chunks."""
    out = []
    with torch.no_grad():
        for part in torch.split(ids, chunk or ids.shape[1], dim=1):
            out.append(model(part, use_cache=True, **cache_argument(model, cache), **kwargs).logits)
    return torch.cat(out, dim=1)

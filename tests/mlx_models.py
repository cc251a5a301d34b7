"""Tiny random models for the tests of the MLX backend; torch and transformers are needed for `save_llama` only."""

from __future__ import annotations

import functools
import importlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from spectral_kv_mlx import SpectralProfiler
from spectral_kv_mlx.generation import generate

VOCABULARY = 256
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
MODELS = {  # name -> (module of mlx_lm.models, arguments on top of SIZES)
    "llama": ("llama", {"num_hidden_layers": 2}),
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": False, "rope_theta": 1e5}),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 4, "sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
    ),
}
HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
MIXED = {"num_hidden_layers": 3, "full_attention_interval": 2, "linear_conv_kernel_dim": 4, **HEADS}
SCALES = (
    "attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in", "ssm_out",
)  # fmt: skip
OFF = ("attention_bias", "mamba_norm_before_gate", "mamba_proj_bias", "mamba_rms_norm", "mlp_bias", "projectors_bias")
HYBRIDS = {  # name -> arguments on top of SIZES
    "qwen3_next": {
        **MIXED, "num_experts": 0, "num_experts_per_tok": 0, "decoder_sparse_step": 1, "moe_intermediate_size": 0,
        "shared_expert_intermediate_size": 0, "mlp_only_layers": [0, 1], "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    },
    "qwen3_5": {"text_config": {"model_type": "qwen3_5", **SIZES, **MIXED}},
    "jamba": {
        "num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 3, "expert_layer_offset": 1,
        "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2, "num_experts": 1,
        "num_experts_per_tok": 1, "mamba_dt_rank": 4,
    },
    "falcon_h1": {
        **{f"{name}_multiplier": 1.0 for name in SCALES}, **dict.fromkeys(OFF, False), "num_hidden_layers": 2,
        "hidden_act": "silu", "mamba_chunk_size": 16, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 16,
        "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 4,
        "mamba_use_mlp": True, "mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5, "rope_theta": 1e4,
        "rope_traditional": False, "tie_word_embeddings": False,
    },
}  # fmt: skip


@functools.cache
def hybrid(name: str):
    """A tiny model with layers of linear attention."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    return module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES, **HYBRIDS[name]}))


def make_model(name: str, seed: int = 0, **changes):
    """A seeded float32 model of the family `name`, with attention that is far from uniform."""
    module_name, arguments = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    args = module.ModelArgs.from_dict({"model_type": module_name, **SIZES, **arguments, **changes})
    model = module.Model(args)
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(x):
        scale = 1.5 * x.shape[-1] ** -0.5 if x.ndim > 1 else 0.1
        noise = scale * mx.random.normal(x.shape, key=next(keys))
        return noise if x.ndim > 1 else x + noise

    model.update(tree_map(draw, model.parameters()))
    if name == "qwen2":
        for layer in model.layers:
            bias = layer.self_attn.k_proj.bias
            layer.self_attn.k_proj.bias = 5 * mx.random.normal(bias.shape, key=next(keys))
    mx.eval(model.parameters())
    return model


def make_tokens(count: int, seed: int = 1) -> list[int]:
    return mx.random.randint(0, VOCABULARY, (count,), key=mx.random.key(seed)).tolist()


def save_llama(path, seed: int = 0, **changes):
    """Write a tiny Llama and a byte tokenizer to `path` as transformers 5 does; returns transformers' model."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = {**SIZES, "num_hidden_layers": 2, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1.5 * p.shape[-1] ** -0.5 * noise if p.ndim > 1 else 1 + 0.1 * noise)
    model.save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0]).save_pretrained(path)
    return model


class CharacterTokenizer:
    eos_token_ids = ()

    def encode(self, text):
        return [ord(c) for c in text]


def calibrate(model):
    texts = ["".join(map(chr, make_tokens(512, seed=100 + n))) for n in range(4)]
    profiler = SpectralProfiler(tokens=2048, document=512, progress=False)
    return profiler.profile_from_model(model, CharacterTokenizer(), texts)


def feed(model, cache, tokens, chunk=None):
    """Logits of all tokens, fed `chunk` at a time."""
    chunk = chunk or len(tokens)
    parts = [model(mx.array([tokens[i : i + chunk]]), cache=cache) for i in range(0, len(tokens), chunk)]
    return np.array(mx.concatenate(parts, axis=1))[0]


def close(a, b, tolerance):
    np.testing.assert_allclose(np.array(a), np.array(b), atol=tolerance, rtol=tolerance)


def greedy(model, tokens, cache, count=12):
    return generate(model, None, tokens, cache, count, True, lambda token: None).tokens

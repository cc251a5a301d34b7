"""Calibration of whatever mlx-lm has: linear layers, no RoPE, no attention at all."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx
from hosts import ByteTokenizer, tokens
from mlx.utils import tree_map
from tolerances import relative_rms

from spectral_kv_core.errors import UsageError
from spectral_kv_mlx import SpectralProfiler, host, make_prompt_cache
from spectral_kv_mlx.integration import plain_cache

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
LINEAR = {
    "num_hidden_layers": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
OLMO = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_allow_neg_eigval": True,
}
GPT2 = {"n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512, "layer_norm_epsilon": 1e-5}
FAMILIES = {
    "qwen3_5": {"text_config": {**SIZES, **LINEAR, "model_type": "qwen3_5"}},
    "qwen3_next": {**SIZES, **LINEAR, **EXPERTS},
    "olmo_hybrid": {**SIZES, **LINEAR, **OLMO},
    "gpt2": {**GPT2, "vocab_size": 256},
}


def family(name: str, fields: dict):
    """A tiny random model of one of mlx-lm's files."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **fields}))
    keys = iter(mx.random.split(mx.random.key(0), 1000))

    def draw(x):
        noise = mx.random.normal(x.shape, key=next(keys))
        return 1.5 * x.shape[-1] ** -0.5 * noise if x.ndim > 1 else x + 0.1 * noise

    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_calibrates_by_itself_and_generates(monkeypatch, tmp_path, name):
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "SpectralProfiler", partial(SpectralProfiler, tokens=256, document=128, progress=False))
    model, ids = family(name, FAMILIES[name]), tokens(204, seed=1)
    cache, plain = make_prompt_cache(model, bits=8, tokenizer=ByteTokenizer(), window=16), plain_cache(model)
    for part in (ids[:200], *([token] for token in ids[200:])):
        got, expected = (np.array(model(mx.array([part]), cache=held)) for held in (cache, plain))
        assert relative_rms(got, expected) < 0.05


def test_a_model_without_attention_is_one_line():
    fields = {"intermediate_size": 64, "state_size": 8, "conv_kernel": 4, "time_step_rank": 4}
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "use_bias": False, "use_conv_bias": True}
    model = family("mamba", {**fields, **sizes})
    with pytest.raises(UsageError, match=r"a model with attention, received a mamba.* Use it as it is\.$"):
        make_prompt_cache(model, bits=3, tokenizer=ByteTokenizer())

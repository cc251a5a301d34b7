"""Models whose keys are their values, weighted and rotated, as in the global layers of Gemma 4."""

from __future__ import annotations

import functools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hosts import ByteTokenizer, only, text, tokens
from torch_models import logits_of
from transformers import AutoModelForCausalLM

from spectral_kv_torch import SpectralProfiler, cache_nbytes, make_prompt_cache
from spectral_kv_torch.integration import model_shape, plain_cache

pytestmark = [only("torch", "mlx-lm's Gemma 4 is in the table of models"), pytest.mark.slow]
gemma4 = pytest.importorskip("transformers.models.gemma4")
HEAD_DIM = 64  # of the global layers


@functools.cache
def model_and_profile():
    """A tiny Gemma 4 of two windows and two global layers, and a profile of the latter."""
    config = gemma4.Gemma4TextConfig(
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=HEAD_DIM,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
        elif name.endswith("k_norm.weight"):  # keys are not simply rotated values
            parameter.data.uniform_(0.5, 1.5)
    texts = [text(1024, seed=20 + i) for i in range(8)]
    profiler = SpectralProfiler(tokens=8192, document=1024, progress=False)
    return model, profiler.profile_from_model(model, ByteTokenizer(), texts, name="gemma4")


def test_the_global_layers_are_those_that_are_compressed():
    shape, passed = model_shape(model_and_profile()[0])
    assert (shape.layers, shape.kv_heads, shape.head_dim) == ((1, 3), 1, HEAD_DIM)
    assert passed == {0: "sliding window", 2: "sliding window"}


def test_one_basis_of_both_has_no_more_components_than_one_of_them():
    variance = model_and_profile()[1].basis_set("layer.pre").variance  # [L, 1, 2 * D, bands]
    whole = variance.sum(-1)
    assert whole.shape[-1] == 2 * HEAD_DIM
    assert np.all((whole > 1e-4 * whole.max(-1, keepdims=True)).sum(-1) <= HEAD_DIM)


def test_one_stream_of_codes_serves_keys_and_values():
    """`spectral-dense` at 2 bits is as near as `spectral` at 4: half of the codes, as nothing is stored twice."""
    model, profile = model_and_profile()
    ids = torch.tensor([tokens(700)])
    expected = logits_of(model, ids, plain_cache(model))[0, 600:].log_softmax(-1)

    def measured(method: str, bits: float) -> tuple[float, int]:
        cache = make_prompt_cache(model, profile, bits, method=method, window=16)
        logits_of(model, ids[:, :600], cache)
        got = logits_of(model, ids[:, 600:], cache, 1)[0].log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean()), int(cache_nbytes(cache))

    joint, apart = measured("spectral-dense", 2), measured("spectral", 4)
    assert joint[0] < 1.2 * apart[0] and joint[1] < 0.8 * apart[1]

"""Calibration of whatever transformers has: linear layers, no RoPE, attention code of their own, no attention at all."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from hosts import ByteTokenizer
from tolerances import relative_rms
from torch_models import SIZES, logits_of, tiny_model, tokens
from transformers import AutoModelForCausalLM
from transformers.cache_utils import LinearAttentionLayer

from spectral_kv_core.calibration.text import load_default_texts
from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.store import warn_once
from spectral_kv_torch import SpectralProfiler, capture, host, make_prompt_cache
from spectral_kv_torch.capture import score_gradients
from spectral_kv_torch.integration import plain_cache

LINEAR = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
SMALL = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 1}
GPT = {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
USUAL = {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
FAMILIES = {
    "qwen3.5": ("Qwen3_5TextConfig", {**SIZES, **LINEAR}),
    "qwen3-next": ("Qwen3NextConfig", {**SIZES, **LINEAR, **EXPERTS}),
    "olmo-hybrid": ("OlmoHybridConfig", {**SIZES, **LINEAR}),
    "gpt2": ("GPT2Config", GPT),
    "opt": ("OPTConfig", {**USUAL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 8}),
    "bloom": ("BloomConfig", {**SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {**USUAL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("MptConfig", {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "xglm": ("XGLMConfig", {**USUAL, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
}


def family(name: str):
    """A tiny random model of one of `FAMILIES`."""
    torch.manual_seed(0)
    kind, fields = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    return model


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A machine without profiles, on which a calibration is small, and says again what it has said."""
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "SpectralProfiler", partial(SpectralProfiler, tokens=256, document=128, progress=False))
    warn_once.cache_clear()


def calibrate(model, **options):
    text = bytes(b - 3 for b in tokens(256, seed=3)[0].tolist()).decode("latin-1")
    profiler = SpectralProfiler(
        tokens=256, document=256, probes=False, progress=False, basis_sets=("head.post",), **options
    )
    return profiler.profile_from_model(model, ByteTokenizer(), [text])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_calibrates_by_itself_and_generates(small, caplog, name):
    model = family(name)
    cache = make_prompt_cache(model, bits=8, tokenizer=ByteTokenizer(), window=16)
    plain, ids = plain_cache(model), tokens(204, seed=1)
    for part in (ids[:, :200], *ids[:, 200:].split(1, dim=1)):
        got, expected = (logits_of(model, part, held)[0].numpy() for held in (cache, plain))
        assert relative_rms(got, expected) < 0.05
    assert "gives no gradients" not in caplog.text


def test_gradients_go_through_linear_layers_that_write_into_their_states(monkeypatch):
    model, ids = family("qwen3.5"), tokens(80)[0].tolist()

    def gradients():
        return score_gradients(model, capture(model, ids[:64]), ids[64:], 2, seed=0)

    found = gradients()

    def replaced(layer, recurrent_states, state_idx=0, **kwargs):
        layer.recurrent_states[state_idx] = recurrent_states
        layer.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    monkeypatch.setattr(LinearAttentionLayer, "update_recurrent_state", replaced)
    for sample, expected in zip(found, gradients(), strict=True):
        for side in (0, 1):
            torch.testing.assert_close(sample[1][side], expected[1][side])
            assert sample[1][side].abs().max() > 0


def test_a_model_without_gradients_is_calibrated_without(small, monkeypatch, caplog):
    model = tiny_model("llama")

    def refused(*_):
        raise RuntimeError("one of the variables needed for gradient computation has been modified\nby something")

    broken = SpectralProfiler.captures.__class__(**{**vars(SpectralProfiler.captures), "score_gradients": refused})
    monkeypatch.setattr(SpectralProfiler, "captures", broken)
    profile = calibrate(model)
    assert profile.calibration["gradients"] == "local"
    told = [r.getMessage() for r in caplog.records if "gives no gradients" in r.getMessage()]
    assert len(told) == 1 and "has been modified)" in told[0] and "\n" not in told[0]
    monkeypatch.undo()
    without = calibrate(model, gradients=False)
    np.testing.assert_array_equal(profile.basis_sets["head.post"].cost, without.basis_sets["head.post"].cost)
    assert calibrate(model).calibration["gradients"] == "score"


def test_what_is_not_about_gradients_is_not_called_so(monkeypatch, caplog):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        calibrate(model)
    assert "gradients" not in caplog.text


@pytest.mark.parametrize("gradients", [True, False])
def test_queries_that_nobody_sees_make_all_tokens_alike(small, caplog, gradients):
    profile = calibrate(family("bloom"), gradients=gradients)
    assert not profile.queries.mean.any() and not profile.queries.root.any()
    basis_set = profile.basis_sets["head.post"]
    assert (basis_set.sensitivity[..., 0] > 0).all()  # of keys too, which nothing looks at
    assert caplog.text.count("queries are not seen") == 1


def default_weights():
    """A Llama as transformers makes one, whose heads have as many channels as a real one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes})).eval()


def errors(model, cache, ids, reference) -> tuple[float, float]:
    """KL of the last 16 tokens beside `reference`, and the relative error of the values that are stored."""
    got = torch.cat([logits_of(model, part, cache)[0] for part in (ids[:, :-16], *ids[:, -16:].split(1, dim=1))])
    got, expected = (x[-16:].log_softmax(-1) for x in (got, reference[0]))
    plain = plain_cache(model)
    logits_of(model, ids, plain)
    held = [(layer.keys_and_values()[1], exact.values) for layer, exact in zip(cache.layers, plain.layers, strict=True)]
    return float((expected.exp() * (expected - got)).sum(-1).mean()), max(relative_rms(*pair) for pair in held)


@pytest.mark.parametrize("make, of_prose", [(partial(tiny_model, "llama"), False), (default_weights, True)])
@pytest.mark.parametrize("method", ["spectral", "spectral-dense"])
def test_thin_calibration_is_told_and_no_worse_than_none(caplog, make, of_prose, method):
    """Calibrated on prose, the prompt is noise, and the other way round."""
    model, noise, prose = (
        make(),
        tokens(600, seed=5),
        torch.tensor([ByteTokenizer().encode(load_default_texts()[7])[:600]]),
    )
    text, prompt = (prose, noise) if of_prose else (noise, prose)
    profiler = SpectralProfiler(tokens=512, document=256, progress=False, basis_sets=("head.post", "layer.pre"))
    profile = profiler.profile_from_model(
        model, ByteTokenizer(), [bytes(b - 3 for b in text[0, :512].tolist()).decode("latin-1")]
    )
    told = [r.getMessage() for r in caplog.records if "thin" in r.getMessage()]
    assert len(told) == 1 and "512 tokens" in told[0] and "Give 1,024 tokens or more" in told[0]
    reference = logits_of(model, prompt, plain_cache(model))
    found = {}
    for name, bits in [("turboquant", 8), *((method, bits) for bits in (3, 4, 6, 8))]:
        cache = make_prompt_cache(model, profile, method=name, bits=bits, window=16)
        found[name, bits] = errors(model, cache, prompt, reference)
    assert found[method, 8][0] <= found["turboquant", 8][0] + 1e-7
    by_bits = [found[method, bits][1] for bits in (3, 4, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "MambaConfig", "state_size": 8, "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1},
        {
            "kind": "RwkvConfig",
            "vocab_size": 256,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "num_hidden_layers": 2,
        },
    ],
    ids=lambda config: config["kind"],
)
def test_a_model_without_attention_is_one_line(config):
    fields = {**config}
    model = AutoModelForCausalLM.from_config(getattr(transformers, fields.pop("kind"))(**fields))
    with pytest.raises(UsageError, match=r"a model with attention, received a \w+ForCausalLM.* Use it as it is\.$"):
        make_prompt_cache(model, bits=3, tokenizer=ByteTokenizer())

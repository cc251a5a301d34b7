"""What a trial run tells of a transformers model, and that it leaves the model as it was."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path[:0] = [str(Path(__file__).parents[1] / "families")]

import torch_families  # noqa: E402
from hosts import ByteTokenizer  # noqa: E402
from tolerances import relative_rms  # noqa: E402
from torch_models import CONFIGS, SIZES, TEXT, logits_of, tiny_model, tokens  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from spectral_kv_core.errors import UsageError  # noqa: E402
from spectral_kv_core.profile import store as profile_store  # noqa: E402
from spectral_kv_core.profile.model_shape import ModelShape  # noqa: E402
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED  # noqa: E402
from spectral_kv_torch import (  # noqa: E402
    SpectralProfile,
    SpectralProfiler,
    cache_nbytes,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    survey,
)
from spectral_kv_torch.generation import plain_cache  # noqa: E402
from spectral_kv_torch.handles import Handle, RoutedName  # noqa: E402
from spectral_kv_torch.integration import install, model_shape  # noqa: E402


def tiny(name: str):
    """A tiny model of the table, where this version of transformers has its family."""
    try:
        return torch_families.tiny(name)
    except (ValueError, KeyError) as error:
        pytest.skip(f"no {name} in this transformers: {error}"[:100])


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every model is tried out anew."""
    monkeypatch.setattr(survey, "_surveys", {})


# --- the model is as it was


@pytest.mark.parametrize("before", ["eager", "sdpa", "spectralkv"])
def test_a_survey_leaves_no_trace(before):
    model = tiny("phi3, long RoPE")
    model.model.layers[1].resid_attn_dropout.p = 0.5
    model.train()
    model.model.layers[0].eval()
    install(model) if before == "spectralkv" else model.set_attn_implementation(before)
    names, training = model.config._attn_implementation, [module.training for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    buffers = [x.clone() for x in model.buffers()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [layer.way for layer in survey.survey(model)] == 3 * [CODES]
    assert torch.equal(torch.rand(3), expected)
    assert model.config._attn_implementation is names and [m.training for m in model.modules()] == training
    for module, was in zip(model.modules(), attributes):
        assert vars(module).keys() == was.keys() and all(vars(module)[name] is was[name] for name in was)
    assert all(torch.equal(x, value) for x, value in zip(model.buffers(), buffers))
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


def test_a_model_is_tried_out_once(monkeypatch):
    calls, tried = [], survey._tried
    monkeypatch.setattr(survey, "_tried", lambda model: calls.append(1) or tried(model))
    first, second = tiny_model("llama"), tiny_model("llama")
    assert survey.survey(first) is survey.survey(second) and len(calls) == 1
    for name in CONFIGS:
        model_shape(tiny_model(name))
    assert len(calls) == len(CONFIGS)


def test_what_stands_around_a_model_is_not_tried_out(monkeypatch):
    """A compiler would compile for every size of a trial."""
    compiled = torch.compile(tiny_model("llama"), backend=lambda graph, inputs: pytest.fail("compiled"))
    assert survey.survey(compiled) is survey.survey(tiny_model("llama"))
    model = tiny_model("qwen3")
    model.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    assert [layer.way for layer in survey.survey(model)] == 3 * [CODES]


def test_weights_that_give_no_number_are_tried_again():
    """What is seen of a broken model says nothing of the next one of its kind."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    assert survey.survey(model)[0].way == CODES and not survey._surveys


# --- what is seen


def test_names_in_the_configuration_do_not_count():
    """A configuration that speaks of other heads than the layers have."""
    model = tiny_model("llama")
    model.config.head_dim, model.config.num_key_value_heads = 99, 7
    shape, passed = model_shape(model)
    assert (shape.q_heads, shape.kv_heads, shape.head_dim, passed) == (4, 2, 16, {})


def test_a_layer_that_does_otherwise_with_handles_is_passed_through(monkeypatch):
    """It sees the new tokens alone, where it should see all: the layer keeps the host's cache, and logits are right."""
    forward = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(name, default):
        function = forward(name, default)

        def attend(module, query, key, value, mask, **options):
            if module.layer_idx == 1 and isinstance(key, Handle):
                key, value = key.pending.keys, value.pending.values
                mask = None
            return function(module, query, key, value, mask, **options)

        return attend

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    model, ids = tiny_model("llama"), tokens(100)
    layers = survey.survey(model)
    assert [layer.way for layer in layers] == [CODES, PASSED, CODES]
    assert layers[1].reason == "attention that a compressed cache changes"
    expected = logits_of(model, ids, plain_cache(model), 30)
    got = logits_of(model, ids, make_prompt_cache(model, method="identity"), 30)
    assert (got - expected).abs().max() < 1e-4


def test_a_layer_that_refuses_handles_is_passed_through(monkeypatch):
    forward = modeling_llama.LlamaAttention.forward

    def picky(self, *args, **options):
        if self.layer_idx == 2 and isinstance(self.config._attn_implementation, RoutedName):
            layers = options["cache"].layers if "cache" in options else options["past_key_values"].layers
            assert type(layers[2]).__name__ == "DynamicLayer"
        return forward(self, *args, **options)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", picky)
    assert [layer.way for layer in survey.survey(tiny_model("llama"))] == [CODES, CODES, PASSED]


@pytest.mark.parametrize(
    "name, ways",
    {
        "gemma2": (PASSED, DECODED, DECODED),
        "gemma4_text, shared": (PASSED, CODES, PASSED, PASSED),
        "qwen3_5_text": (PASSED, CODES, PASSED),
        "bloom": 3 * (DECODED,),
    }.items(),
)
def test_ways_of_layers(name, ways):
    model = tiny(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")  # older ones drop the cap elsewhere
    found = tuple(layer.way for layer in survey.survey(model))
    assert found == ways[: len(found)]  # older ones have no cache layer for one that shares
    assert model_shape(model)[0].num_layers == len(ways)


def test_reasons_are_words_of_users():
    for name in ("gemma3n_text", "nemotron_h", "falcon_h1", "deepseek_v32", "xlstm", "llama4_text"):
        for layer in survey.survey(tiny(name)):
            assert not any(word in layer.reason for word in ("Layer", "Cache", "Dynamic", "_")), layer.reason
            assert bool(layer.reason) == (layer.way != CODES)


def test_what_needs_other_inputs_is_read_and_said_once(caplog):
    class Seeing(type(tiny_model("llama"))):
        def forward(self, input_ids=None, **options):
            raise ValueError("pixel_values are needed.")

    model = Seeing(LlamaConfig(**SIZES)).eval()
    profile_store.warn_once.cache_clear()
    for _ in range(2):
        shape, passed = model_shape(model)
    assert (shape.kv_heads, shape.head_dim, shape.layers, passed) == (2, 16, (0, 1, 2), {})
    assert [record.message for record in caplog.records] == [
        "A Seeing cannot be tried out with text alone: pixel_values are needed. Its layers are taken as its configuration "
        "names them."
    ]


# --- rotations


def test_layers_are_rotated_one_by_one():
    shape, _ = model_shape(tiny("smollm3"))
    assert [bool(shape.rope_of(i)) for i in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(
    "name, rotary_dim, interleaved",
    [
        ("gpt2", 0, False),
        ("gptj", 8, True),
        ("codegen", 8, True),
        ("phi", 8, False),
        ("cohere", 16, True),
        ("glm", 8, True),
    ],
)
def test_a_rotation_that_functions_make(name, rotary_dim, interleaved):
    rope = model_shape(tiny(name))[0].rope
    assert (rope.rotary_dim, rope.interleaved) == (rotary_dim, interleaved) if rotary_dim else rope is None


def test_two_bases_are_told_apart():
    model = tiny_model("gemma3")
    local, full = (survey.survey(model)[i].rope.inv_freq[-1] for i in (0, 1))
    assert local > 10 * full


@pytest.mark.parametrize("name", ["llama, dynamic RoPE", "phi3, long RoPE"])
def test_a_rotation_that_switches_at_64_tokens(name):
    """Named, and exact across the switch; what is coded before the rotation comes out the same too."""
    model, ids = tiny(name), tokens(140)
    layers = survey.survey(model)
    assert all(layer.limit == "keys are rotated in another way in long texts" and layer.rope for layer in layers)
    expected = logits_of(model, ids, plain_cache(model), 40)
    got = logits_of(model, ids, make_prompt_cache(model, method="identity", window=16, sinks=4), 40)
    assert (got - expected).abs().max() < 1e-4
    assert not any(layer.limit for layer in survey.survey(tiny_model("llama")))


@pytest.mark.parametrize("name, reason", [("mistral, window", "sliding window"), ("llama4_text", "chunked attention")])
def test_a_window_of_8_and_a_chunk_of_32(name, reason):
    model, ids = tiny(name), tokens(120)
    layers = survey.survey(model)
    assert {layer.reason for layer in layers if layer.way == PASSED} == {reason}
    if all(layer.way == PASSED for layer in layers):
        return
    expected = logits_of(model, ids, plain_cache(model), 25)
    got = logits_of(model, ids, make_prompt_cache(model, method="identity", window=16, sinks=4), 25)
    assert (got - expected).abs().max() < 1e-4


def test_layers_without_a_rotation_are_coded_as_they_are(tmp_path):
    """Methods that code keys before their rotation, and scorers, on a model that rotates every second layer."""
    model, ids = tiny("smollm3"), tokens(300)
    profile = SpectralProfiler(tokens=2048, document=1024, progress=False).profile_from_model(
        model, ByteTokenizer(), TEXT
    )
    profile = SpectralProfile.load(profile.save(tmp_path / "profile"))
    assert profile.shape == model_shape(model)[0] and [i for i, _ in profile.shape.ropes] == [1, 3]
    expected = logits_of(model, ids, plain_cache(model))[:, 250:]
    for method in ("spectral", "spectral-dense"):
        cache = make_prompt_cache(model, profile, 8, method=method)
        logits_of(model, ids[:, :250], cache)
        got = logits_of(model, ids[:, 250:], cache, 1)
        assert (got - expected).norm() / expected.norm() < 0.02, method
    for method in ("triattention", "expected-attention"):
        cache = make_prompt_cache(model, profile, method=method, budget_tokens=150)
        logits_of(model, ids, cache, 100)
        cache.finalize()
        assert max(layer.store.positions().shape[-1] for layer in cache.layers) <= 150


def test_a_model_of_half_precision_is_seen_as_well():
    model = tiny_model("gemma3")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    exact = survey.survey(tiny_model("gemma3"))
    for layer, expected in zip(survey.survey(model), exact):
        assert layer.way == expected.way and layer.rope.matches(expected.rope)


# --- keys and values of other widths


def wider_values():
    """A model whose values have more channels than its keys."""
    sizes = {
        **torch_families.SIZES,
        **torch_families.FAMILIES["mimo_v2_flash"],
        "v_head_dim": 24,
        "layer_types": 3 * ["full_attention"],
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("mimo_v2_flash", **sizes, add_full_attention_sink_bias=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("make", [lambda: tiny("deepseek_v3"), wider_values], ids=["latent", "wider"])
def test_keys_and_values_of_other_widths(make, tmp_path):
    """Zeros fill the narrower side up: exact in pieces, after a crop, through a file and decoded; counted as they are."""
    model, ids = make(), tokens(220)
    shape, _ = model_shape(model)
    if shape.widths is None:
        pytest.skip("this transformers keeps keys and values of one width")
    width, layers = sum(shape.widths), len(shape.layers)
    assert shape.head_dim == max(shape.widths) and ModelShape.from_json(shape.to_json()) == shape
    expected = logits_of(model, ids, plain_cache(model), 70)
    for method, bits, limit in (("identity", None, 1e-5), ("turboquant", 10, 0.1)):
        cache = make_prompt_cache(model, bits=bits, method=method, window=16, sinks=4)
        assert relative_rms(logits_of(model, ids[:, :200], cache, 70), expected[:, :200]) < limit
        cache.crop(-60)
        size = cache_nbytes(cache)
        assert size.dense_nbytes == 2 * 140 * layers * shape.kv_heads * width
        path = save_prompt_cache(tmp_path / method, cache, model=model)
        loaded, _ = load_prompt_cache(path, model)
        plain, _ = load_prompt_cache(path, model, method="plain")
        assert [keys.shape[-1] for keys, *_ in plain] == [keys.shape[-1] for keys, *_ in cache]
        for one in (cache, loaded, plain):
            assert relative_rms(logits_of(model, ids[:, 140:], one, 1), expected[:, 140:]) < limit


def test_bits_are_those_of_channels_that_models_have():
    """Zeros take bits too: what is stored for both sides stays within what was asked for."""
    model = tiny("deepseek_v3")
    cache = make_prompt_cache(model, bits=8, method="turboquant", window=0, sinks=0)
    logits_of(model, tokens(256), cache)
    assert 5 < 8 * cache_nbytes(cache) / (256 * 3 * model_shape(model)[0].kv_heads * 24) <= 8
    with pytest.raises(UsageError, match="bits of at least .* 16 channels and values 8"):
        make_prompt_cache(model, bits=1.4, method="turboquant")

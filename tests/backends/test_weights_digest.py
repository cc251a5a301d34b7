"""A digest of weights sees every layer, costs next to nothing, and knows what it does not know."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from hosts import SMALL, only, tokens

from spectral_kv_core.errors import UsageError
from spectral_kv_core.hosts.weights import are_other_weights, digest_weights, layer_weights, sampled

PARTS = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]


def digest(host, model) -> str:
    return host.backend.weights_digest(model)


@pytest.mark.parametrize("name", PARTS + NORMS)
def test_every_projection_and_norm_of_every_layer_counts(host, name):
    model, before = host.new_model("llama"), digest(host, host.model("llama"))
    assert digest(host, model) == before and before.count("-") == 2
    for layer in range(len(host.profile("llama").shape.layers)):
        host.adapt(model, layer, name)
        assert are_other_weights(digest(host, model), before)
        before = digest(host, model)


def test_a_stored_prompt_notices_a_merged_adapter(host, tmp_path, caplog):
    model, profile = host.model("llama"), host.profile("llama")
    cache = host.make_prompt_cache(model, profile, 3.0, **SMALL)
    host.logits(model, tokens(100), cache)
    path = host.save_prompt_cache(tmp_path / "c.safetensors", cache, model=model)
    adapted = host.new_model("llama")
    for name in PARTS:
        host.adapt(adapted, 1, name)
    with caplog.at_level(logging.WARNING):
        host.load_prompt_cache(path, model, profile)
        assert not caplog.records
        host.load_prompt_cache(path, adapted, profile)
    assert [record.getMessage().count("other weights") for record in caplog.records] == [1]


def test_a_stored_prompt_of_weights_that_nobody_knows_is_told_by_its_name(host, tmp_path, caplog, monkeypatch):
    model, profile = host.model("llama"), host.profile("llama")
    cache = host.make_prompt_cache(model, profile, 3.0, **SMALL)
    host.logits(model, tokens(100), cache)
    models = host.backend.host.models
    monkeypatch.setattr(models, "weights_digest", lambda model: "")
    monkeypatch.setattr(models, "model_name", lambda model: "somebody/a-model")
    path = host.save_prompt_cache(tmp_path / "c.safetensors", cache, model=model)
    with caplog.at_level(logging.WARNING):
        for name in ("a-model", "another"):
            assert not caplog.records
            monkeypatch.setattr(models, "model_name", lambda model, name=name: name)
            host.load_prompt_cache(path, model, profile)
    assert [record.getMessage().count("is of somebody/a-model, the model is another") for record in caplog.records] == [
        1
    ]


def test_keys_of_other_sizes_are_not_blamed_on_a_profile(host):
    plain = host.make_prompt_cache(host.model("llama"), method="turboquant")
    coded = host.make_prompt_cache(host.model("llama"), host.profile("llama"))
    keys = host.ops.asarray(np.zeros((1, 5, 3, 16), np.float32))
    for cache, words in ((plain, "was made for other sizes"), (coded, "was made for llama")):
        with pytest.raises(UsageError, match=words):
            host.leading_layers(cache)[0].check(keys)


def test_precision_is_no_other_model(host):
    exact, half = (digest(host, host.cast(host.new_model("llama"), dtype)) for dtype in ("bfloat16", "float16"))
    assert not are_other_weights(exact, digest(host, host.model("llama")))
    assert exact.split("-")[1] != half.split("-")[1]  # rounded twice, its entries cannot be compared


def test_digests_of_older_files_are_compared_by_the_norm():
    assert not are_other_weights("ab", "ab-c-d") and are_other_weights("ab", "xx-c-d")
    assert are_other_weights("ab-c-d", "ab-c-e") and not are_other_weights("ab-c-d", "ab-x-e")
    assert not are_other_weights("", "ab-c-d") and not are_other_weights("ab-c-d", "ab-c-d")


def test_a_sample_meets_every_part_of_a_weight():
    for shape in [(576, 576), (192, 576), (64, 64), (7,), (1, 33)]:
        size = int(np.prod(shape))
        found = sampled(np.arange(size), size)
        assert len(found) == min(size, 32) and found[-1] >= 0.9 * (size - 33)
        if len(shape) == 2 and size > 1000:
            assert len({int(x) % shape[1] for x in found}) > 20
    names = ["model.layers.10.self_attn.q_proj.base_layer.weight", "vision_tower.layers.0.self_attn.q_proj.weight"]
    names += ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    assert layer_weights(names) == [("10.self_attn.q_proj.weight", names[0])]
    assert digest_weights(None) == ""


@only("torch", "modules on the device meta")
def test_what_is_offloaded_is_unknown(host):
    model = host.new_model("llama")
    whole = digest(host, model)
    model.model.layers[1].to("meta")
    assert digest(host, model) == whole.partition("-")[0]
    model.model.norm.to("meta")
    assert digest(host, model) == ""
    assert not are_other_weights(digest(host, model), whole)


def test_a_digest_takes_no_time(host):
    model, seconds = host.model("llama"), []
    for _ in range(5):
        start = time.perf_counter()
        digest(host, model)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01

"""The published methods in a live model: generation, files, and what they cost."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_codecs import LIVE  # noqa: E402
from torch_models import ByteTokenizer, tiny_model, tokens  # noqa: E402

from spectral_kv_core.codecs.registry import bits_range, make_plan  # noqa: E402
from spectral_kv_core.planning.budget import elements_per_token  # noqa: E402
from spectral_kv_torch import (  # noqa: E402
    SpectralProfiler,
    cache_nbytes,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from spectral_kv_torch.generation import plain_cache  # noqa: E402
from spectral_kv_torch.integration import model_shape  # noqa: E402

TEXT = [bytes(b - 3 for b in tokens(1024, seed=9 + i)[0].tolist()).decode("latin-1") for i in range(2)]
PROMPT = tokens(400)
GREEDY = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
every_method = pytest.mark.parametrize("name", LIVE)


@functools.cache
def model_and_profile():
    model = tiny_model("qwen3")  # heads of 32 channels: a group of KIVI
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False)
    return model, profiler.profile_from_model(model, ByteTokenizer(), TEXT, name="qwen3")


def read(cache, ids=PROMPT, **kwargs):
    """Logits [B, T, V] of `ids` fed to `cache` at once."""
    with torch.no_grad():
        return model_and_profile()[0](ids, past_key_values=cache, use_cache=True, **kwargs).logits


@every_method
def test_a_model_generates(name):
    model, profile = model_and_profile()
    cache = make_prompt_cache(model, profile, method=name)
    out = model.generate(PROMPT, past_key_values=cache, attention_mask=torch.ones_like(PROMPT), **GREEDY)
    assert out.shape == (1, 430) and cache.get_seq_length() == 429
    shape = model_shape(model)[0]
    plan = make_plan(shape, profile, name)
    lane = cache.layers[0].store.lanes[0]
    stored = sum(
        x.nbytes for layer in cache.layers for lane in layer.store.lanes for c in lane.chunks for x in c.arrays
    )
    masks = 8 * 3 * 2 * 4 if name == "think" else 0  # of its one chunk per layer, which is not full
    sealed = lane.sealed * elements_per_token(shape) * plan.bits_per_element
    assert lane.sealed >= 256 and 8 * stored == pytest.approx(sealed + masks, abs=masks)
    assert cache_nbytes(cache) > stored


@every_method
def test_most_bits_are_nearest_to_the_plain_cache(name):
    model, profile = model_and_profile()
    plain = plain_cache(model)
    read(plain)
    expected = read(plain, tokens(8, seed=3))
    low, high = bits_range(make_plan(model_shape(model)[0], profile, name).method, model_shape(model)[0])
    errors = []
    for bits in (high, low + 0.5):
        cache = make_prompt_cache(model, profile, method=name, bits=bits)
        read(cache)
        errors.append(float((read(cache, tokens(8, seed=3)) - expected).pow(2).mean().sqrt() / expected.std()))
    assert errors[0] < 0.05 and errors[0] < 0.5 * errors[1], errors


@every_method
def test_a_stored_prompt_goes_on_with_the_same_codes(name, tmp_path):
    model, profile = model_and_profile()
    cache = make_prompt_cache(model, profile, method=name)
    read(cache)
    path = save_prompt_cache(tmp_path / "prompt.safetensors", cache, PROMPT[0].tolist(), model=model)
    loaded, ids = load_prompt_cache(path, model, profile)
    assert ids == PROMPT[0].tolist()
    question = tokens(5, seed=4)
    torch.testing.assert_close(read(loaded, question), read(cache, question), atol=0, rtol=0)


@every_method
def test_padded_rows_and_crops(name):
    model, profile = model_and_profile()
    ids = torch.cat([tokens(300, seed=1), torch.cat([torch.full((1, 40), 2), tokens(260, seed=2)], dim=1)])
    mask = (torch.arange(300)[None] >= torch.tensor([[0], [40]])).long()
    cache = make_prompt_cache(model, profile, method=name)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    alone = make_prompt_cache(model, profile, method=name)
    expected = model.generate(ids[1:, 40:], attention_mask=mask[1:, 40:], past_key_values=alone, **GREEDY)
    assert torch.equal(got[1, 300:], expected[0, 260:])
    before = alone.layers[1].store.dense()
    alone.crop(-150)
    for now, then in zip(alone.layers[1].store.dense(), before):
        torch.testing.assert_close(now, then[:, :, :-150], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, high, low", [("xkv", 8.0, 2.0), ("kvtc", 8.0, 2.0), ("svdq-prompt", 14.0, 9.0)])
def test_a_prompt_is_stored_by_a_method_for_files(name, high, low, tmp_path):
    model = model_and_profile()[0]
    profile = joint_profile()
    plain = plain_cache(model)
    read(plain)
    held = [(layer.keys.clone(), layer.values.clone()) for layer in plain.layers]
    errors = []
    for bits in (high, low):
        path = save_prompt_cache(
            tmp_path / f"{bits}", plain, PROMPT[0].tolist(), model=model, method=name, bits=bits, profile=profile
        )
        loaded, ids = load_prompt_cache(path, model, profile)
        assert ids == PROMPT[0].tolist() and type(loaded) is type(plain)
        pairs = [pair for layer, sides in zip(loaded.layers, held) for pair in zip((layer.keys, layer.values), sides)]
        errors.append(sum(float((got - x).pow(2).sum() / x.pow(2).sum()) for got, x in pairs) / len(pairs))
        for got, x in pairs:
            torch.testing.assert_close(got[:, :, :4], x[:, :, :4])  # sinks
            torch.testing.assert_close(got[:, :, -64:], x[:, :, -64:])
    assert 0 < errors[0] < 0.5 * errors[1], errors


@functools.cache
def joint_profile():
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False, joint=True, basis_sets=())
    profile = profiler.profile_from_model(model_and_profile()[0], ByteTokenizer(), TEXT, name="qwen3")
    assert list(profile.basis_sets) == ["model.pre"]
    return profile

"""The published methods in a live model: generation, files, and what they cost."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hosts import check_padded, close, dense, relative_error, tokens
from test_codecs import LIVE

from spectral_kv_core.codecs.registry import bits_range, make_plan
from spectral_kv_core.planning.budget import elements_per_token

FAMILY = "qwen3"  # heads of 32 channels: a group of KIVI
PROMPT = tokens(400)
every_method = pytest.mark.parametrize("name", LIVE)


def new(host, name: str, **options):
    return host.make_prompt_cache(host.model(FAMILY), host.profile(FAMILY), method=name, **options)


@every_method
def test_a_model_generates(host, name):
    model, profile, cache = host.model(FAMILY), host.profile(FAMILY), new(host, name)
    assert len(host.greedy(model, PROMPT, cache, 30)) == 30 and host.seen(cache) in (429, 430)
    shape, stores = profile.shape, host.stores(cache)
    plan, group = make_plan(shape, profile, name), stores[0].padding_groups[0]
    stored = sum(x.nbytes for store in stores for group in store.padding_groups for c in group.chunks for x in c.arrays)
    # of its one chunk per layer, which is not full
    masks = len(shape.layers) * shape.kv_heads * shape.head_dim if name == "think" else 0
    sealed = group.sealed * elements_per_token(shape) * plan.bits_per_element
    assert group.sealed >= 256 and 8 * stored == pytest.approx(sealed + masks, abs=masks)
    size = host.cache_nbytes(cache)
    assert stored < size < size.dense_nbytes * 2  # the tiny model is float32


@every_method
def test_most_bits_are_nearest_to_the_plain_cache(host, name):
    model, profile, plain = host.model(FAMILY), host.profile(FAMILY), host.plain_cache(host.model(FAMILY))
    host.logits(model, PROMPT, plain)
    expected = host.logits(model, tokens(8, seed=3), plain)
    low, high = bits_range(make_plan(profile.shape, profile, name).method, profile.shape)
    errors = []
    for bits in (high, low + 0.5):
        cache = new(host, name, bits=bits)
        host.logits(model, PROMPT, cache)
        errors.append(relative_error(host.logits(model, tokens(8, seed=3), cache), expected))
    assert errors[0] < 0.05 and errors[0] < 0.5 * errors[1], errors


@every_method
def test_a_stored_prompt_goes_on_with_the_same_codes(host, name, tmp_path):
    model, cache = host.model(FAMILY), new(host, name)
    host.logits(model, PROMPT, cache)
    path = host.save_prompt_cache(tmp_path / "prompt.safetensors", cache, PROMPT, model=model)
    loaded, ids = host.load_prompt_cache(path, model, host.profile(FAMILY))
    assert ids == PROMPT
    question = tokens(5, seed=4)
    np.testing.assert_array_equal(host.logits(model, question, loaded), host.logits(model, question, cache))


@every_method
def test_padded_rows_and_crops(host, name):
    check_padded(host, FAMILY, [330, 290], range(300, 331), {"method": name}, {"method": "identity"})
    model, alone = host.model(FAMILY), new(host, name)
    host.logits(model, tokens(260), alone)
    before = dense(host.stores(alone)[1])
    host.crop(alone, 150)
    for now, then in zip(dense(host.stores(alone)[1]), before, strict=True):
        close(now, then[:, :, :-150], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, high, low", [("xkv", 8.0, 2.0), ("kvtc", 8.0, 2.0), ("svdq-prompt", 14.0, 9.0)])
def test_a_prompt_is_stored_by_a_method_for_files(host, name, high, low, tmp_path):
    model, profile = host.model(FAMILY), joint_profile(host)
    plain = host.plain_cache(model)
    host.logits(model, PROMPT, plain)
    held, errors = [x for layer in host.layers(plain) for x in host.keys_and_values(layer)], []
    for bits in (high, low):
        path = host.save_prompt_cache(
            tmp_path / f"{bits}", plain, PROMPT, model=model, method=name, bits=bits, profile=profile
        )
        loaded, ids = host.load_prompt_cache(path, model, profile)
        assert ids == PROMPT and type(loaded) is type(plain)
        assert [type(layer) for layer in host.layers(loaded)] == [type(layer) for layer in host.layers(plain)]
        got = [x for layer in host.layers(loaded) for x in host.keys_and_values(layer)]
        errors.append(np.mean([np.square(a - b).sum() / np.square(b).sum() for a, b in zip(got, held, strict=True)]))
        for a, b in zip(got, held, strict=True):
            for exact in (np.s_[:, :, :4], np.s_[:, :, -64:]):  # sinks and window
                np.testing.assert_array_equal(a[exact], b[exact])
    assert 0 < errors[0] < 0.5 * errors[1], errors


@functools.cache
def joint_profile(host):
    profile = host.calibrate(host.model(FAMILY), name=FAMILY, joint=True, basis_sets=())
    assert list(profile.basis_sets) == ["model.pre"]
    return profile

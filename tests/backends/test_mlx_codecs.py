"""The published methods in a live model of mlx-lm, and their prompts across the backends."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import functools

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_lm.generate import generate_step
from mlx_models import make_model, make_tokens
from test_codecs import LIVE

from spectral_kv_core.codecs.registry import bits_range, make_plan
from spectral_kv_mlx import SpectralProfiler, cache_nbytes, load_prompt_cache, make_prompt_cache, save_prompt_cache
from spectral_kv_mlx.generation import plain_cache
from spectral_kv_mlx.integration import model_shape

PROMPT = make_tokens(400)
every_method = pytest.mark.parametrize("name", LIVE)


class CharacterTokenizer:
    eos_token_ids = ()

    def encode(self, text):
        return [ord(c) for c in text]


@functools.cache
def model_and_profile():
    model = make_model("llama")  # heads of 32 channels: a group of KIVI
    texts = ["".join(map(chr, make_tokens(512, seed=100 + n))) for n in range(4)]
    profiler = SpectralProfiler(tokens=2048, document=512, progress=False)
    return model, profiler.profile_from_model(model, CharacterTokenizer(), texts)


def read(cache, tokens=PROMPT):
    """Logits [T, V] of `tokens` fed to `cache` at once."""
    return np.array(model_and_profile()[0](mx.array([tokens]), cache=cache))[0]


@every_method
def test_a_model_generates(name):
    model, profile = model_and_profile()
    cache = make_prompt_cache(model, profile, method=name)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=20, prompt_cache=cache)
    out = [token for token, _ in steps]
    assert len(out) == 20 and cache[0].offset >= 419
    assert 0 < cache_nbytes(cache) < cache_nbytes(cache).dense_nbytes * 2  # the tiny model is float32


@every_method
def test_most_bits_are_nearest_to_the_plain_cache(name):
    model, profile = model_and_profile()
    plain = plain_cache(model)
    read(plain)
    expected = read(plain, make_tokens(8, seed=3))
    shape = model_shape(model)[0]
    low, high = bits_range(make_plan(shape, profile, name).method, shape)
    errors = []
    for bits in (high, low + 0.5):
        cache = make_prompt_cache(model, profile, method=name, bits=bits)
        read(cache)
        difference = read(cache, make_tokens(8, seed=3)) - expected
        errors.append(float(np.sqrt(np.square(difference).mean()) / expected.std()))
    limit = 0.15 if name == "turboquant-qjl" else 0.05  # at most 6 bits, of which keys have one in the sketch
    assert errors[0] < limit and errors[0] < 0.5 * errors[1], errors


@every_method
def test_a_stored_prompt_goes_on_with_the_same_codes(name, tmp_path):
    model, profile = model_and_profile()
    cache = make_prompt_cache(model, profile, method=name)
    read(cache)
    path = save_prompt_cache(tmp_path / "prompt.safetensors", cache, PROMPT, model=model)
    loaded, ids = load_prompt_cache(path, model, profile)
    assert ids == PROMPT
    question = make_tokens(5, seed=4)
    np.testing.assert_array_equal(read(loaded, question), read(cache, question))


@pytest.mark.parametrize("name, high, low", [("xkv", 8.0, 2.0), ("svdq-prompt", 14.0, 9.0)])
def test_a_prompt_is_stored_by_a_method_for_files(name, high, low, tmp_path):
    def sides(cache):
        return [np.array(x)[:, :, : layer.offset] for layer in cache for x in (layer.keys, layer.values)]

    model, errors = model_and_profile()[0], []
    plain = plain_cache(model)
    read(plain)
    for bits in (high, low):
        path = save_prompt_cache(tmp_path / f"{bits}", plain, PROMPT, model=model, method=name, bits=bits)
        loaded, ids = load_prompt_cache(path, model)
        assert ids == PROMPT and type(loaded[0]) is type(plain[0])
        pairs = list(zip(sides(loaded), sides(plain), strict=True))
        errors.append(sum(np.square(got - x).sum() / np.square(x).sum() for got, x in pairs))
        for got, x in pairs:
            np.testing.assert_array_equal(got[:, :, -64:], x[:, :, -64:])
    assert 0 < errors[0] < 0.5 * errors[1], errors

"""What mlx-lm's own tests ask of its caches (tests/test_prompt_cache.py of mlx-lm 0.32), asked of ours.

Left out: what is about one kind of the host's own, such as a rotating cache's slots; and quantizing a cache, which ours is.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx
import mlx_host
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, trim_prompt_cache
from mlx_lm.models.cache import save_prompt_cache as host_save
from mlx_models import make_tokens

from spectral_kv_mlx import load_prompt_cache, make_prompt_cache, save_prompt_cache

HEADS, DIM = 2, 32  # of the tiny model
METHODS = {"identity": None, "spectral": 8, "turboquant": None}


@pytest.fixture(params=METHODS)
def new(request):
    """Makes caches of two layers."""
    model, profile = mlx_host.model("llama"), mlx_host.profile("llama")

    def make(left_padding=None) -> list:
        options = {"bits": METHODS[request.param], "method": request.param, "window": 16}
        return make_prompt_cache(model, profile, left_padding=left_padding, **options)

    make.model, make.profile, make.is_exact = model, profile, request.param == "identity"
    return make


def drawn(tokens: int, seed: int = 0, batch: int = 1) -> mx.array:
    return mx.random.normal((batch, HEADS, tokens, DIM), key=mx.random.key(seed))


def fed(cache: list, tokens: int, batch: int = 1) -> list:
    for number, layer in enumerate(cache):
        layer.update_and_fetch(drawn(tokens, number, batch), drawn(tokens, 10 + number, batch))
    return cache


def held(layer) -> list[np.ndarray]:
    """Decoded keys and values."""
    return [np.array(x) for x in layer.keys_and_values()]


def same(a, b) -> None:
    for x, y in zip(held(a), held(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_file_brings_back_what_was_saved(new, tmp_path):
    cache = fed(new(), 40)
    with pytest.raises(Exception, match=r"a cache of spectralkv\. Save it with save_prompt_cache of spectral_kv_mlx"):
        host_save(str(tmp_path / "host.safetensors"), cache)
    path = save_prompt_cache(tmp_path / "ours.safetensors", cache, model=new.model, metadata={"a": "b"})
    loaded, _ = load_prompt_cache(path, new.model, new.profile)
    for layer, again in zip(cache, loaded, strict=True):
        assert again.offset == layer.offset == 40
        same(layer, again)
    for one in (cache, loaded):
        fed(one, 1)
    same(cache[1], loaded[1])


def test_generation_goes_on_where_it_stopped(new):
    prompt = mx.array(make_tokens(41))
    found = list(generate_step(prompt, new.model, prompt_cache=new(), max_tokens=4))
    cache = new()
    steps = list(generate_step(prompt, new.model, prompt_cache=cache, max_tokens=2))
    assert cache[0].offset == 43  # mlx-lm reads one token ahead
    steps += list(generate_step(mx.array([found[2][0]]), new.model, prompt_cache=cache, max_tokens=1))
    for (token, scores), (expected, exact) in zip(steps, (*found[:2], found[3]), strict=True):
        assert token == expected
        np.testing.assert_allclose(np.array(scores), np.array(exact), atol=1e-4)


def test_no_more_is_trimmed_than_there_is(new):
    cache = fed(new(), 10)
    assert trim_prompt_cache(cache, 7) == 7 and trim_prompt_cache(cache, 4) == 3
    assert all(layer.offset == 0 for layer in cache)
    assert trim_prompt_cache([ArraysCache(size=2), *fed(new(), 10)], 1) == 0  # all of them, or none


def test_generation_after_a_trim_is_the_same(new):
    """No block is sealed meanwhile: sealed ones keep their codes when tokens behind them go."""
    cache, prompt = new(), mx.array(make_tokens(41))
    last = mx.array([next(token for token, _ in generate_step(prompt, new.model, prompt_cache=cache))])
    seen, runs = cache[0].offset, []
    for _ in range(2):
        steps = generate_step(last, new.model, prompt_cache=cache)
        runs.append([next(steps) for _ in range(2)])
        trim_prompt_cache(cache, cache[0].offset - seen)
    assert [token for token, _ in runs[0]] == [token for token, _ in runs[1]]
    for (_, scores), (_, again) in zip(*runs, strict=True):
        np.testing.assert_allclose(np.array(again), np.array(scores), atol=1e-4)


def test_a_copy_goes_its_own_way(new):
    cache = fed(new(), 10)
    last, other = drawn(1, 3), drawn(1, 4)
    cache[0].update_and_fetch(last, last)
    old = copy.deepcopy(cache)
    assert cache[0].trim(1) == 1
    assert (old[0].offset, cache[0].offset) == (11, 10)
    cache[0].update_and_fetch(other, other)
    np.testing.assert_allclose(held(old[0])[0][:, :, 10:], last, atol=1e-6)
    np.testing.assert_allclose(held(cache[0])[0][:, :, 10:], other, atol=1e-6)


def test_masks_are_those_of_a_plain_cache(new):
    for tokens in (0, 16, 40):
        ours, plain = new()[0], KVCache()
        if tokens:
            fed([ours], tokens)
            plain.update_and_fetch(drawn(tokens), drawn(tokens))
        for length in (1, 4):
            for options in ({}, {"return_array": True}, {"window_size": 3}, {"window_size": 3, "return_array": True}):
                masks = [create_attention_mask(mx.zeros((1, length, DIM)), cache=c, **options) for c in (ours, plain)]
                if isinstance(masks[1], mx.array):
                    assert mx.array_equal(*masks)
                else:
                    assert masks[0] == masks[1]
    window = create_attention_mask(mx.zeros((1, 1, DIM)), fed(new(), 32)[0], window_size=4)
    assert mx.array_equal(window, create_causal_mask(1, offset=32, window_size=4))


def test_a_batch_is_updated_filtered_and_extended(new):
    cache = new([2, 3, 4])[0]
    keys, _ = cache.update_and_fetch(drawn(6, batch=3), drawn(6, batch=3))
    assert keys.shape == (3, HEADS, 6, DIM)
    mx.eval(cache.state)
    cache.filter([0, 1])
    assert cache.left_padding == [0, 1] and cache.offset.tolist() == [4, 3]  # no slot that is padding in all rows
    mask = cache.make_mask(1)
    assert [row.squeeze().tolist() for row in mask] == [[True] * 5, [False] + [True] * 4]
    first, second = fed(new([2, 1, 2])[:1], 8, batch=3)[0], fed(new([3, 0])[:1], 4, batch=2)[0]
    first.extend(second)
    assert first.offset.tolist() == [6, 7, 6, 1, 4]
    assert first.left_padding == [2, 1, 2, 7, 4]
    assert held(first)[0].shape[0] == held(first)[1].shape[0] == 5


def test_caches_merge_also_where_one_is_empty_and_come_apart_again(new):
    for tokens in ((0, 4), (40, 7), (0, 0)):
        caches = [fed(new()[:1], count)[0] if count else new()[0] for count in tokens]
        merged = type(caches[0]).merge(caches)
        if any(tokens):
            assert held(merged)[0].shape == (2, HEADS, max(tokens), DIM)
        for number, (layer, count) in enumerate(zip(caches, tokens)):
            alone = merged.extract(number)
            assert alone.size() == count and alone.empty() == (not count)
            if count:
                same(alone, layer)


def test_a_list_of_caches_is_one(new):
    pair = CacheList(*new())
    assert pair.is_trimmable()
    fed([pair[0], pair[1]], 8)
    assert pair.trim(5) == 5 and pair[1].offset == 3
    assert not CacheList(ArraysCache(size=2), new()[0]).is_trimmable()
    states = [CacheList(ArraysCache(size=1), fed(new()[:1], count)[0]) for count in (5, 40)]
    for number, state in enumerate(states):
        state[0][0] = mx.random.normal((1, 2, 4, 4), key=mx.random.key(number))
    merged = CacheList.merge(states)
    for number, state in enumerate(states):
        alone = merged.extract(number)
        assert mx.array_equal(alone[0][0], state[0][0])
        same(alone[1], state[1])


def test_bytes_are_those_of_what_is_held(new):
    cache = new()
    assert all(layer.nbytes == 0 for layer in cache)
    fed(cache, 400)
    plain = 2 * 400 * HEADS * DIM * 4
    for layer in cache:
        layer.commit()
        assert layer.nbytes == plain if new.is_exact else 0 < layer.nbytes < 0.6 * plain

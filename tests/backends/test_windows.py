"""Layers with a sliding window whose tokens are codes, inside the hosts' own forward passes."""

from __future__ import annotations

import copy

import pytest
from hosts import close, of_families, only, relative_error, tokens

from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.store import cached_profile_path

pytestmark = of_families("gemma3")
TAIL = {"window": 4}  # the windows of these models have 24 and 32 tokens: a longer tail would leave nothing to pack


def packed(host, family, bits: float = 8.25):
    return host.make_prompt_cache(host.model(family), bits=bits, method="turboquant", windows="turboquant", **TAIL)


def windows(host, cache) -> list[WindowLayer]:
    return [layer for layer in host.layers(cache) if isinstance(layer, WindowLayer)]


def test_a_prompt_is_exact_until_it_ends(host, family):
    model, ids = host.model(family), tokens(150, seed=1)
    expected = host.logits(model, ids, host.plain_cache(model))
    for chunk in (None, 50):
        cache = host.make_prompt_cache(model, method="identity", windows="turboquant", **TAIL)
        close(host.logits(model, ids, cache, chunk), expected, atol=1e-4, rtol=1e-4)
        assert windows(host, cache) and not any(layer.store.chunks for layer in windows(host, cache))


def test_steps_attend_to_codes_and_more_bits_are_nearer_to_the_plain_cache(host, family):
    model, ids = host.model(family), tokens(150, seed=2)
    expected = host.logits(model, ids, host.plain_cache(model))[60:]
    errors = {}
    for bits in (8.25, 2.25):
        cache = packed(host, family, bits)
        host.logits(model, ids[:60], cache)
        errors[bits] = relative_error(host.logits(model, ids[60:], cache, 1), expected)
        assert all(layer.store.chunks for layer in windows(host, cache))
    assert errors[8.25] < errors[2.25] / 3 < 0.5


def test_the_host_attends_to_what_the_layer_holds(host, family):
    """A step after the codes gives what it gives on the host's own cache of the decoded tokens."""
    model, ids = host.model(family), tokens(200, seed=3)
    cache = packed(host, family, 4.25)
    host.logits(model, ids[:150], cache)
    host.logits(model, ids[150:190], cache, 1)
    plain = host.decode_cache(cache, model)
    assert not windows(host, plain)
    close(host.logits(model, ids[190:191], cache), host.logits(model, ids[190:191], plain), atol=1e-4, rtol=1e-4)


def test_bytes_are_counted_and_fewer(host, family):
    model, ids = host.model(family), tokens(150, seed=4)
    sizes = []
    for options in ({}, {"windows": "turboquant"}):
        cache = host.make_prompt_cache(model, bits=4.25, method="turboquant", **TAIL, **options)
        host.logits(model, ids[:100], cache)
        host.logits(model, ids[100:], cache, 1)
        sizes.append(host.cache_nbytes(cache))
    held = sum(x.nbytes for layer in windows(host, cache) for x in layer.arrays())
    assert sizes[1].by_kind["sliding window"] == held < sizes[0].by_kind["sliding window"]
    assert int(sizes[1]) < int(sizes[0]) and sizes[1].dense_nbytes > int(sizes[1])


def test_a_profile_of_the_windows_is_found_and_serves(host, family):
    model, ids = host.model(family), tokens(200, seed=5)
    profile = host.calibrate(model, windows=True)
    assert set(profile.shape.layers).isdisjoint(host.profile(family).shape.layers)
    profile.save(cached_profile_path(profile.shape, windows=True))
    expected = host.logits(model, ids, host.plain_cache(model))[100:]
    errors = {}
    for bits in (8.0, 2.0):
        cache = host.make_prompt_cache(model, host.profile(family), bits, windows="spectral", **TAIL)
        host.logits(model, ids[:100], cache)
        errors[bits] = relative_error(host.logits(model, ids[100:], cache, 1), expected)
        assert all(layer.store.chunks for layer in windows(host, cache))
    assert errors[8.0] < errors[2.0] / 3 and errors[8.0] < 0.1


def test_copies_go_on_by_themselves(host, family):
    model, ids = host.model(family), tokens(150, seed=6)
    cache = packed(host, family)
    host.logits(model, ids[:100], cache)
    other = copy.deepcopy(cache)
    ended = host.logits(model, ids[100:150], cache, 1)
    close(host.logits(model, ids[100:150], other, 1), ended, atol=1e-5, rtol=1e-5)


def test_windows_are_stored_decoded(host, family, tmp_path):
    model, ids = host.model(family), tokens(150, seed=7)
    cache = packed(host, family)
    host.logits(model, ids[:120], cache)
    host.logits(model, ids[120:149], cache, 1)
    path = host.save_prompt_cache(tmp_path / "windows.safetensors", cache, ids[:149], model=model)
    loaded, read = host.load_prompt_cache(path, model)
    assert read == ids[:149] and not windows(host, loaded)
    close(host.logits(model, ids[149:], loaded), host.logits(model, ids[149:], cache), atol=1e-4, rtol=1e-4)


def test_a_filled_cache_is_one_that_read_the_prompt(host, family):
    model, ids = host.model(family), tokens(150, seed=8)
    plain, read, filled = host.plain_cache(model), packed(host, family), packed(host, family)
    host.logits(model, ids[:120], plain)
    host.logits(model, ids[:120], read)
    host.fill(filled, plain)
    close(host.logits(model, ids[120:], filled, 1), host.logits(model, ids[120:], read, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"windows": "wavelettriattention", "budget_tokens": 100}, "drops no token"),
        ({"windows": "spectral-dense"}, "codes every layer alone|Expected"),
        ({"windows": "identity"}, "Expected a method"),
        ({"windows": "nonsense"}, "nonsense"),
        ({"windows": "turboquant", "budget_bytes": 10**9, "max_context": 1000}, "received budget_bytes"),
    ],
)
def test_what_cannot_code_a_window_is_refused(host, family, options, words):
    with pytest.raises(UsageError, match=words):
        host.make_prompt_cache(host.model(family), host.profile(family), **options)


@of_families("llama")
def test_a_model_without_windows_is_told(host, family):
    with pytest.raises(UsageError, match="layers with a sliding window"):
        host.make_prompt_cache(host.model(family), method="identity", windows="turboquant")


@only("mlx", "transformers tells padding by its mask, which hides it")
def test_left_padding_is_refused_on_mlx(host, family):
    with pytest.raises(UsageError, match="without left_padding"):
        host.padded_cache(host.model(family), [3, 0], method="identity", windows="turboquant", **TAIL)

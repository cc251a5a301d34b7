"""Two layers coded together in a live cache of each host, and in files made of it."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
from hosts import ByteTokenizer, check_padded, close, codes, dense, of_families, tokens, without_counters
from tolerances import assert_close, relative_rms

from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.codecs.chunk import join_layers
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.planning.budget import elements_per_token
from spectral_kv_core.planning.methods import BASIS_SETS, get_method, rounded_by
from spectral_kv_core.profile.basis_set import PAIRS

pytest.importorskip("constriction")

STORED, LIVE = "spectral-stored-pairs", "spectral-dense-pairs"
# an odd number of layers; biased keys; the first layer slides. mlx-lm's Gemma 3 has no neighbors to pair
every_kind = of_families("llama", "qwen2", torch=("gemma3",))


@functools.cache
def model_and_profile(host, family: str = "llama"):
    """A tiny model of three layers, and a profile with a pair and a lone layer."""
    model = host.model_of_three(family)
    return model, host.calibrate(model, name=family, pairs=True)


def new(host, bits: float = 3.0, family: str = "llama", **options):
    model, profile = model_and_profile(host, family)
    return host.make_prompt_cache(model, profile, bits, method=LIVE, **options)


def read(host, family: str = "llama", count: int = 300):
    """A plain cache after `count` tokens."""
    model, _ = model_and_profile(host, family)
    cache = host.plain_cache(model)
    host.logits(model, tokens(count), cache)
    return cache


def layers_of(host, cache) -> list[list[np.ndarray]]:
    return [host.keys_and_values(layer) for layer in host.layers(cache)]


def same(host, cache, other) -> None:
    for ours, theirs in zip(layers_of(host, cache), layers_of(host, other), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


# --- in files


@every_kind
@pytest.mark.usefixtures("text_is_known")
def test_round_trip(host, family, tmp_path):
    model, profile = model_and_profile(host, family)
    assert set(profile.basis_sets) == {*BASIS_SETS, PAIRS}
    plain, errors, elements = read(host, family), [], 224 * elements_per_token(profile.shape)
    for bits in (0.5, 1.0, 2.0, 5.0):
        options = {"model": model, "profile": profile, "method": STORED, "bits": bits}
        path = host.save_prompt_cache(tmp_path / "c", plain, tokens(300), **options)
        loaded, told = host.load_prompt_cache(path, model, profile)
        assert type(loaded) is type(plain) and told == tokens(300) and host.seen(loaded) == 300
        file = PromptFile.load(path)
        assert 0.98 * bits < 8 * file.bytes_by_kind()["codes"] / elements <= bits
        pairs = list(zip(layers_of(host, loaded), layers_of(host, plain), strict=True))
        errors.append([relative_rms(a, b) for i in profile.shape.layers for a, b in zip(*pairs[i], strict=True)])
        for layer_idx, (got, own) in enumerate(pairs):
            for a, b in zip(got, own, strict=True):
                np.testing.assert_array_equal(a[:, :, :4], b[:, :, :4])
                np.testing.assert_array_equal(a[:, :, 228:], b[:, :, 228:])
                assert layer_idx in profile.shape.layers or np.array_equal(a, b)
    assert np.all(np.diff(np.mean(errors, axis=1)) < 0) and np.max(errors[-1]) < 0.1, errors
    container = host.encode_cache(make_plan(profile.shape, profile, STORED, 5.0), plain, 4, 64)
    same(host, host.decode_cache(container, model), loaded)
    size = host.cache_nbytes(container)
    assert (
        file.size() == without_counters(size) == sum(file.bytes_by_kind().values()) and host.sealed_bits(container) <= 5
    )
    assert file.size().dense_nbytes == size.dense_nbytes == host.cache_nbytes(plain).dense_nbytes


@every_kind
@pytest.mark.usefixtures("text_is_known")
def test_more_bits_make_every_layer_nearer(host, family):
    """Of the nearest codes. Rounding in time moves error to tokens that matter less: a layer alone may have more of it."""
    model, profile = model_and_profile(host, family)
    plain, errors = read(host, family), []
    for bits in (0.5, 1.0, 2.0, 5.0, 6.0):
        plan = make_plan(profile.shape, profile, rounded_by(get_method(STORED), "nearest"), bits)
        container = host.encode_cache(plan, plain, 4, 64)
        assert 0.98 * bits < host.sealed_bits(container) <= bits
        pairs = zip(layers_of(host, host.decode_cache(container, model)), layers_of(host, plain), strict=True)
        errors.append(
            [relative_rms(a, b) for i, pair in enumerate(pairs) if i in profile.shape.layers for a, b in zip(*pair)]
        )
    assert np.all(np.diff(errors, axis=0) < 0), errors


def test_a_prompt_too_short_to_seal(host, tmp_path):
    model, profile = model_and_profile(host)
    plain = read(host, count=20)
    options = {"model": model, "profile": profile, "method": STORED, "bits": 2.0}
    path = host.save_prompt_cache(tmp_path / "c", plain, tokens(20), **options)
    same(host, host.load_prompt_cache(path, model, profile)[0], plain)


def test_a_live_cache_is_stored_and_goes_on(host, tmp_path):
    model, profile = model_and_profile(host)
    cache, ids, more = new(host), tokens(300), tokens(30, seed=8)
    host.logits(model, ids, cache)
    path = host.save_prompt_cache(tmp_path / "c", cache, ids, model=model)
    loaded, told = host.load_prompt_cache(path, model, profile)
    assert told == ids and len(host.leading_layers(loaded)) == 2
    np.testing.assert_array_equal(host.logits(model, more, loaded, 1), host.logits(model, more, cache, 1))


# --- alive


@every_kind
@pytest.mark.parametrize("step", [1, 5, 40], ids=["one by one", "few", "a prompt that goes on"])
def test_attention_is_that_over_what_is_decoded(host, family, step):
    model, _ = model_and_profile(host, family)
    cache, more = new(host, family=family), tokens(40 if step == 40 else 8, seed=4)  # before the next block is full
    host.logits(model, tokens(300), cache)
    plain = host.decode_cache(cache, model)
    assert any(
        len(layer.layers) == 2 and layer.store.padding_groups[0].sealed == 224 for layer in host.leading_layers(cache)
    )
    close(host.logits(model, more, cache, step), host.logits(model, more, plain, step), atol=1e-4, rtol=1e-3)


def test_codes_are_those_of_both_layers_together(host):
    """Of the very keys and values that came in: those of a second forward pass may differ in the last bit."""
    cache, plain = new(host), read(host)
    for layer_idx, (keys, values) in enumerate(layers_of(host, plain)):
        host.update(cache, layer_idx, keys[:, :, :300], values[:, :, :300])
    for layer in host.leading_layers(cache):
        xp = layer.store.xp
        held = [tuple(xp.asarray(x[:, :, 4:228]) for x in layers_of(host, plain)[i]) for i in layer.layers]
        expected = layer.store.codec.encode(*join_layers(xp, held), 4)
        for a, b in zip(codes(layer.store), expected.arrays, strict=True):
            np.testing.assert_array_equal(a, xp.to_numpy(b))
    size = host.cache_nbytes(cache)
    assert size == sum(x.nbytes for store in host.stores(cache) for x in store.arrays())
    assert size.dense_nbytes == host.cache_nbytes(plain).dense_nbytes
    assert 0.9 * 3 < host.sealed_bits(cache) < 1.005 * 3 and size.compression > 0.7  # exact tokens are float32


@pytest.mark.parametrize("step", [100, 1], ids=["staged", "one by one"])
@pytest.mark.usefixtures("text_is_known")
def test_tokens_are_sealed_as_they_come(host, step):
    model, _ = model_and_profile(host)
    cache = new(host, 6.0)
    got = host.logits(model, tokens(300), cache, step)
    expected = host.logits(model, tokens(300), host.plain_cache(model), step)
    assert 0 < relative_rms(got, expected) < 0.05
    for layer in host.leading_layers(cache):
        layer.finalize()
        (group,) = layer.store.padding_groups
        assert (group.sealed, group.exact, layer.store.seen, group.staged) == (224, 76, 300, [])
    assert 0.9 * 6 < host.sealed_bits(cache) <= 6 and host.seen(cache) == 300


def test_padded_rows_come_out_as_if_they_were_alone(host):
    _, profile = model_and_profile(host)
    cuts, exact = [50, 200, *range(201, 221)], {"method": "identity"}
    cache = check_padded(host, "llama", [220, 150, 220], cuts, {"bits": 3.0, "method": LIVE}, exact, profile)
    assert [group.sealed for group in host.stores(cache)[0].padding_groups] == [144, 80]


def test_trim_and_copy(host):
    model, _ = model_and_profile(host)
    cache, whole, tail = new(host, 8.0), new(host, 8.0), tokens(6, seed=6)
    for one in (cache, whole):
        host.logits(model, tokens(300), one)
    before = [dense(store) for store in host.stores(cache)]
    host.logits(model, tokens(30, seed=9), cache, 1)
    host.crop(cache, 30)
    assert host.seen(cache) == 300
    for store, then in zip(host.stores(cache), before, strict=True):
        assert relative_rms(dense(store)[0], then[0]) < 0.03  # 14 tokens were sealed and decoded again
    other = copy.deepcopy(cache)
    layers = host.layers(other)
    assert layers[1].first is layers[0] is not host.layers(cache)[0]
    assert host.cache_nbytes(other) == host.cache_nbytes(cache)
    got = host.logits(model, tail, other, 1)
    assert_close("trimmed", got, host.logits(model, tail, whole, 1), limit=0.03)
    assert (host.seen(cache), host.seen(other)) == (300, 306)
    np.testing.assert_array_equal(host.logits(model, tail, cache, 1), got)


def test_other_attention_gets_keys_of_its_own_layer(host):
    """Also while a block is sealed, after a prompt that both ways read from copies of one cache."""
    model, _ = model_and_profile(host)
    ids, ours, theirs = tokens(310), new(host), new(host)
    with host.own_attention(model):
        got = host.logits(model, ids[:300], theirs)
    close(got, host.logits(model, ids[:300], ours), atol=1e-4, rtol=1e-3)
    theirs = copy.deepcopy(ours)
    expected = host.logits(model, ids[300:], ours, 1)
    with host.own_attention(model):
        got = host.logits(model, ids[300:], theirs, 1)
    close(got, expected, atol=1e-4, rtol=1e-3)
    assert {store.padding_groups[0].sealed for store in host.stores(theirs)} == {240}


def test_decoded_chunks_stay_by_layer(host):
    model, profile = model_and_profile(host)
    chunk = 240 * 2 * 2 * profile.shape.kv_heads * profile.shape.head_dim  # tokens, sides, bytes
    caches = [new(host, working_set=n) for n in (0, 20 * chunk, 3 * chunk + chunk // 3)]
    for cache in caches:
        host.logits(model, tokens(300), cache)
    got = [host.logits(model, tokens(10, seed=7), cache, 1) for cache in caches]
    for other in got[1:]:
        close(other, got[0], atol=0.02, rtol=0.02)  # they stay in float16
    none, all_of_it, some = (int(host.cache_nbytes(cache)) for cache in caches)
    assert all_of_it - none == 3 * chunk and some - none == chunk
    (group,) = host.stores(caches[1])[0].padding_groups
    assert set(group.decoded) == {(group.chunks[0], n) for n in (0, 1)}


def test_generation(host):
    model, _ = model_and_profile(host)
    for window in (64, 32):
        cache = new(host, window=window)
        made = host.generate(model, ByteTokenizer(), tokens(120), cache, 10, True, lambda token: None)
        assert len(made.tokens) == 10 and host.stores(cache)[0].padding_groups[0].sealed >= 48
    small = new(host, window=16, sinks=4)
    assert len(host.greedy(model, tokens(100), small, 10)) == 10 and host.cache_nbytes(small).compression > 1.4
    exact = new(host, 8.0, window=128)
    expected = host.greedy(model, tokens(120), host.plain_cache(model), 12)
    assert host.greedy(model, tokens(120), exact, 12) == expected

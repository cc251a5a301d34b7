"""What caches hold is counted to the byte, by kind, in hybrids and windows as well: checked from outside."""

from __future__ import annotations

import numpy as np
import pytest
from hosts import SMALL, buffers_of, tokens

from spectral_kv_core.cache.prompt_cache_file import FORMAT, PromptFile
from spectral_kv_core.errors import UsageError

HYBRIDS = ("qwen3_next", "qwen3_5", "jamba", "falcon_h1")
TURBO = {"method": "turboquant", "bits": 4.0}


def read(host, model, cache, prompt: int = 150):
    host.raw_logits(model, tokens(prompt), cache)
    host.raw_logits(model, [7], cache)
    return host.cache_nbytes(cache)


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_array_of_a_plain_hybrid_is_counted(host, name):
    model = host.hybrid(name)
    cache = host.plain_cache(model)
    size = read(host, model, cache)
    assert int(size) == sum(size.by_kind.values()) == sum(buffers_of(host, host.layers(cache)).values())
    assert size.by_kind["state"] > 0 and size.by_kind["exact"] > 0 and size.by_kind["codes"] == 0
    assert size.dense_nbytes >= 2 * (size.by_kind["state"] // 4)  # whose elements count as those of tokens do


@pytest.mark.parametrize("name", HYBRIDS[:3])
def test_every_array_of_a_compressed_hybrid_is_counted(host, name):
    model = host.hybrid(name)
    cache = host.make_prompt_cache(model, **TURBO, **SMALL)
    size = read(host, model, cache)
    assert sum(buffers_of(host, host.layers(cache)).values()) == int(size) + size.table_nbytes
    assert int(size) == sum(size.by_kind.values())
    plain = host.plain_cache(model)
    assert size.by_kind["state"] == read(host, model, plain).by_kind["state"] > 0
    assert size.by_kind["codes"] > 0 and size.exact_tokens == 4 + 16 + (151 - 20) % 16


def test_windows_count_apart(host):
    """Of the tiny Gemma 3: layers that forget, sinks and windows of ours, codes, and the plain cache of the same."""
    model = host.model("gemma3")
    cache = host.make_prompt_cache(model, host.profile("gemma3"), 3.0, **SMALL)
    size, kinds = read(host, model, cache), host.cache_nbytes(cache).by_kind
    assert int(size) == sum(kinds.values()) and kinds["state"] == 0 and kinds["codes"] > 0
    passed = [x for i in host.PASSED for x in (host.layers(cache)[i].keys, host.layers(cache)[i].values)]
    assert kinds["sliding window"] == sum(host.backend.host.buffers(passed).values())
    assert kinds["exact"] == sum(host.backend.host.buffers(exact_of(host, cache)).values())


def exact_of(host, cache) -> list:
    groups = [group for store in host.stores(cache) for group in store.padding_groups]
    return [x for group in groups for x in (group.exact_keys, group.exact_values)]


def test_decoded_chunks_are_a_kind_of_their_own(host):
    model, profile, options = host.model("llama"), host.profile("llama"), {"method": "spectral-dense", **SMALL}
    size, more = (
        read(host, model, host.make_prompt_cache(model, profile, 1.5, working_set=working_set, **options))
        for working_set in (0, 1 << 20)
    )
    assert size.by_kind["decoded"] == 0 < more.by_kind["decoded"] == int(more) - int(size)
    assert size.by_kind["codes"] == more.by_kind["codes"]


def test_what_layers_share_counts_once(host):
    model = host.model("llama")
    cache = host.plain_cache(model)
    size = read(host, model, cache)
    layers = host.layers(cache)
    layers[1].keys = layers[0].keys
    assert int(host.cache_nbytes(cache)) == int(size) - host.backend.host.buffers([layers[0].keys]).popitem()[1]


@pytest.mark.parametrize("name", HYBRIDS[:3])
@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "plain"])
def test_a_stored_hybrid_goes_on_as_if_nothing_had_been_saved(host, tmp_path, name, compressed):
    model = host.hybrid(name)
    cache = host.make_prompt_cache(model, **TURBO, **SMALL) if compressed else host.plain_cache(model)
    size = read(host, model, cache)
    path = host.save_prompt_cache(tmp_path / "c", cache, [*tokens(150), 7], model=model)
    file = PromptFile.load(path)
    assert file.bytes_by_kind()["state"] == size.by_kind["state"] > 0
    assert file.size().dense_nbytes == size.dense_nbytes and file.size().exact_tokens >= size.exact_tokens
    loaded, told = host.load_prompt_cache(path, model)
    assert told == [*tokens(150), 7]
    for _ in range(2):
        got, expected = (host.logits(model, tokens(3, seed=5), one) for one in (loaded, cache))
        np.testing.assert_array_equal(got, expected)


def test_a_half_precision_state_keeps_its_bits(host, tmp_path):
    model = host.cast(host.hybrid.__wrapped__("qwen3_next"), "bfloat16")
    cache = host.plain_cache(model)
    read(host, model, cache)
    loaded, _ = host.load_prompt_cache(host.save_prompt_cache(tmp_path / "c", cache, model=model), model)
    states = [
        [x for layer in host.layers(one) if not host.is_compressed(layer) for x in states_of(host, layer)]
        for one in (cache, loaded)
    ]
    for a, b in zip(*states, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(host.ops.to_numpy(a), host.ops.to_numpy(b))
    assert {host.dtype_of(x) for x in states[0]} == {"bfloat16", "float32"}


def states_of(host, layer) -> list:
    return host.backend.host.held(layer)[0].get("state", [])


@pytest.mark.parametrize("change, message", [
    (lambda layer: layer["states"].update({"../x": ["float32", [1]]}), "every state"),
    (lambda layer: layer["states"].update({"y": ["float64", [1]]}), "every state"),
    (lambda layer: layer["states"].update({"y": ["float32", [-1]]}), "every state"),
    (lambda layer: layer["states"].update({"y": ["float32", [1]]}), "received|has nothing|layers/0/y"),
    (lambda layer: layer.update(host="another"), "states of another"),
    (lambda layer: layer.update(host=3), "host"),
])  # fmt: skip
def test_altered_states_are_refused(host, tmp_path, change, message):
    model = host.hybrid("jamba")
    cache = host.make_prompt_cache(model, **TURBO, **SMALL)
    read(host, model, cache)
    path = host.save_prompt_cache(tmp_path / "c", cache, model=model)
    arrays, header = FORMAT.load(path)
    change(header["layers"][0])
    FORMAT.save(path, arrays, {key: x for key, x in header.items() if key not in ("format", "version", "sha256")})
    with pytest.raises(UsageError, match=message):
        host.load_prompt_cache(path, model)


def test_a_layer_that_no_file_can_have_is_named_in_words(host):
    with pytest.raises(UsageError, match="(?i)attention and full attention|cache list"):
        host.backend.host.models.exact_layer(host.layers(host.plain_cache(host.hybrid("falcon_h1")))[0])

"""What caches hold is counted to the byte, by kind, in hybrids and windows as well: checked from outside."""

from __future__ import annotations

import pytest
from hosts import SMALL, buffers_of, tokens

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

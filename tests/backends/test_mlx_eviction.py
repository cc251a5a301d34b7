"""What only mlx-lm asks of caches that drop tokens: `test_live_eviction.py` has the rest."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx_host
from hosts import only
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_models import close, feed, make_tokens
from test_eviction import positions_of

from spectral_kv_mlx import make_prompt_cache
from spectral_kv_mlx.cache import SpectralKVCache

BUDGET = 60
SMALL = {"window": 16, "sinks": 4, "budget_tokens": BUDGET}


def stores(cache) -> list:
    return [layer.store for layer in cache if isinstance(layer, SpectralKVCache)]


def places(cache, layer: int = 0) -> np.ndarray:
    store = stores(cache)[layer]
    return positions_of(store, heads=store.padding_groups[0].exact_keys.shape[1])


@only("mlx", "generate_step reads a prompt in pieces of a given size")
def test_mlx_lm_generates_with_it():
    """Through the host's own loop, prompt in pieces."""
    model, profile = mlx_host.model("llama"), mlx_host.profile("llama")
    cache = make_prompt_cache(model, profile, method="triattention", **SMALL)
    prompt = mx.array(make_tokens(150))
    steps = generate_step(prompt, model, prompt_cache=cache, max_tokens=20, prefill_step_size=40)
    text = [int(token) for token, _ in steps]
    assert len(text) == 20 and cache[0].offset == 170 and cache[0].store.has_dropped


@only("mlx", "caches of transformers have no state to read and set")
def test_state_of_a_cache_that_dropped_tokens():
    model, profile, tokens = mlx_host.model("llama"), mlx_host.profile("llama"), make_tokens(170)
    for method, bits in (("random", None), ("random+spectral", 4.0)):
        options = {"method": method, **SMALL}
        cache = make_prompt_cache(model, profile, bits, **options)
        assert not can_trim_prompt_cache(cache), "the host must not count on it: later it could not"
        feed(model, cache, tokens[:140])
        feed(model, cache, tokens[140:150], 1)
        assert not can_trim_prompt_cache(cache)
        again = make_prompt_cache(model, profile, bits, **options)
        for old, new in zip(cache, again):
            new.state = old.state
        np.testing.assert_array_equal(places(cache), places(again))
        close(feed(model, again, tokens[150:], 1), feed(model, cache, tokens[150:], 1), 1e-6)
        assert cache[0].trim(5) == 5 and cache[0].offset == 165

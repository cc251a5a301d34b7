"""Caches that drop tokens, in mlx-lm's own forward passes and generation."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import copy

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_models import make_model, make_tokens
from test_eviction import positions_of
from test_mlx_backend import calibrate, checkpoint, close, family, feed, greedy, tiny  # noqa: F401 (fixtures)

from spectral_kv_core.scorers import SCORERS
from spectral_kv_mlx import cache_nbytes, make_prompt_cache, restore
from spectral_kv_mlx.cache import SpectralKVCache
from spectral_kv_mlx.integration import install

BUDGET = 60
SMALL = {"window": 16, "sinks": 4, "budget_tokens": BUDGET}


def stores(cache) -> list:
    return [layer.store for layer in cache if isinstance(layer, SpectralKVCache)]


def places(cache, layer: int = 0) -> np.ndarray:
    store = stores(cache)[layer]
    return positions_of(store, heads=store.lanes[0].exact_keys.shape[1])


def test_scorers_that_need_no_profile_take_none():
    model = make_model("llama")
    cache = make_prompt_cache(model, method="waveletkv", **SMALL)
    feed(model, cache, make_tokens(120))
    assert all(store.lanes[0].stored == BUDGET for store in stores(cache))


def test_the_wavelet_decides_who_stays():
    """Through the host's own generation; budget and bytes are the same with every wavelet."""
    model, held, sizes = make_model("llama"), {}, set()
    for wavelet in (None, "db2", "haar", "bior2.2"):
        cache = make_prompt_cache(model, method="waveletkv", wavelet=wavelet, **SMALL)
        assert len(greedy(model, make_tokens(150), cache, 20)) == 20
        assert all(store.lanes[0].stored <= BUDGET for store in stores(cache))
        held[wavelet] = places(cache).tolist()
        sizes.add(int(cache_nbytes(cache)))
    assert held[None] == held["db2"] and len(sizes) == 1
    assert held["haar"] != held["db2"] != held["bior2.2"] != held["haar"]
    with pytest.raises(ValueError, match="random has none"):
        make_prompt_cache(model, method="random", wavelet="haar", **SMALL)


@pytest.mark.parametrize("name", SCORERS)
def test_generation_stays_within_the_budget(tiny, name):  # noqa: F811
    prompt = make_tokens(150)
    for method, bits in ((name, None), (f"{name}+spectral", 4.0)):
        cache = make_prompt_cache(tiny.model, tiny.profile, bits, method=method, **SMALL)
        assert len(greedy(tiny.model, prompt, cache, 40)) == 40
        assert all(store.lanes[0].stored <= BUDGET for store in stores(cache))
        assert (places(cache)[:, :, -16:] == np.arange(cache[0].offset - 16, cache[0].offset)).all()
        size = cache_nbytes(cache)
        assert size == sum(x.nbytes for store in stores(cache) for x in store.arrays())
        assert size.compression > 1


def test_mlx_lm_generates_with_it(tiny):  # noqa: F811
    """Through the host's own loop, prompt in pieces; the same text again from a copy of the cache."""
    cache = make_prompt_cache(tiny.model, tiny.profile, method="triattention", **SMALL)
    prompt = mx.array(make_tokens(150))
    steps = generate_step(prompt, tiny.model, prompt_cache=cache, max_tokens=20, prefill_step_size=40)
    text = [int(token) for token, _ in steps]
    assert len(text) == 20 and cache[0].offset == 170 and cache[0].store.has_dropped


def test_logits_are_those_of_a_plain_cache_with_a_mask(family):  # noqa: F811
    """The same tokens by another way: the host's attention over what the cache gives back."""
    tokens = make_tokens(150)
    cache = make_prompt_cache(family.model, family.profile, method="knorm", **SMALL)
    feed(family.model, cache, tokens[:120])
    other = copy.deepcopy(cache)
    expected = [feed(family.model, cache, tokens[120:140]), feed(family.model, cache, tokens[140:], 1)]
    restore(family.model)
    try:
        got = [feed(family.model, other, tokens[120:140]), feed(family.model, other, tokens[140:], 1)]
    finally:
        install(family.model)
    assert all(store.has_dropped for store in stores(cache))
    for a, b in zip(got, expected):
        close(a, b, 2e-4)


def test_padded_rows_are_as_if_alone(tiny):  # noqa: F811
    rows, pads = [make_tokens(140), make_tokens(100, seed=3)], [0, 40]
    ids = mx.array([rows[0], [0] * 40 + rows[1]])
    for method, bits in (("expected-attention", None), ("expected-attention+spectral", 8.0)):
        options = {"method": method, **SMALL}
        together = make_prompt_cache(tiny.model, tiny.profile, bits, left_padding=pads, **options)
        got = [tiny.model(ids[:, part], cache=together) for part in (slice(0, 120), slice(120, 130), slice(130, 140))]
        for row, (tokens, pad) in enumerate(zip(rows, pads)):
            alone = make_prompt_cache(tiny.model, tiny.profile, bits, **options)
            for part, logits in zip(((0, 120), (120, 130), (130, 140)), got):
                own = tokens[max(part[0] - pad, 0) : part[1] - pad]
                close(logits[row, -len(own) :], feed(tiny.model, alone, own), 2e-4)
            assert stores(alone)[0].has_dropped


def test_state_of_a_cache_that_dropped_tokens(tiny):  # noqa: F811
    tokens = make_tokens(170)
    for method, bits in (("random", None), ("random+spectral", 4.0)):
        options = {"method": method, **SMALL}
        cache = make_prompt_cache(tiny.model, tiny.profile, bits, **options)
        assert not can_trim_prompt_cache(cache), "the host must not count on it: later it could not"
        feed(tiny.model, cache, tokens[:140])
        feed(tiny.model, cache, tokens[140:150], 1)
        assert not can_trim_prompt_cache(cache)
        again = make_prompt_cache(tiny.model, tiny.profile, bits, **options)
        for old, new in zip(cache, again):
            new.state = old.state
        np.testing.assert_array_equal(places(cache), places(again))
        close(feed(tiny.model, again, tokens[150:], 1), feed(tiny.model, cache, tokens[150:], 1), 1e-6)
        assert cache[0].trim(5) == 5 and cache[0].offset == 165

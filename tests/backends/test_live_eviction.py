"""Caches that drop tokens, in the hosts' own forward passes and generation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hosts import SMALL, ByteTokenizer, check_padded, close, dense, tokens
from test_eviction import positions_of

from spectral_kv_core.scorers import SCORERS

BUDGET = 150
TIGHT = {**SMALL, "budget_tokens": 60}


def new(host, method: str, bits: float | None = None, family: str = "llama", **options):
    options = options or {"budget_tokens": BUDGET}
    return host.make_prompt_cache(host.model(family), host.profile(family), bits, method=method, **options)


def places(host, cache, layer: int = 0) -> np.ndarray:
    return positions_of(host.stores(cache)[layer])


def test_scorers_that_need_no_profile_take_none(host):
    model = host.new_model("llama")
    cache = host.make_prompt_cache(model, method="waveletkv", **TIGHT)
    host.logits(model, tokens(120), cache)
    assert all(store.padding_groups[0].stored == TIGHT["budget_tokens"] for store in host.stores(cache))


@pytest.mark.parametrize("name", SCORERS)
def test_generation_stays_within_the_budget(host, name):
    model, shape = host.model("qwen3"), host.profile("qwen3").shape
    per_token = len(shape.layers) * 2 * shape.kv_heads * shape.head_dim
    for method, bits in ((name, None), (f"{name}+spectral", 4.0)):
        for count, more, options in ((400, 80, {"budget_tokens": BUDGET}), (150, 40, TIGHT)):
            cache = new(host, method, bits, "qwen3", **options)
            out = host.generate(model, ByteTokenizer(), tokens(count), cache, more, True, lambda token: None)
            seen, window = host.seen(cache), options.get("window", 64)
            assert len(out.tokens) == more and seen in (count + more - 1, count + more)
            assert all(store.padding_groups[0].stored <= options["budget_tokens"] for store in host.stores(cache))
            assert (places(host, cache)[:, :, -window:] == np.arange(seen - window, seen)).all()
            size = host.cache_nbytes(cache)
            held = dict(host.storage(x) for store in host.stores(cache) for x in store.arrays())
            assert size == sum(held.values()) and size.dense_nbytes == seen * per_token * 2
            if count == 400:
                assert size.compression > (1.5 if bits is None else 2)  # exact tokens are float32 here
            assert size.compression > 1


def test_a_prompt_may_come_in_pieces(host):
    model, ids = host.model("llama"), tokens(700)
    cache = new(host, "triattention+spectral", 8, budget_tokens=200)
    for start in range(0, 650, 100):
        host.logits(model, ids[start : start + 100], cache)
        assert all(
            store.padding_groups[0].stored <= 200 and not store.padding_groups[0].sealed for store in host.stores(cache)
        )
    host.logits(model, ids[:1], cache)
    assert all(store.padding_groups[0].sealed and store.padding_groups[0].stored <= 200 for store in host.stores(cache))


@pytest.mark.parametrize("options", [{"budget_tokens": BUDGET}, TIGHT], ids=["usual", "small"])
def test_other_attention_sees_the_same_tokens(host, family, options):
    """A model that attends by itself gets the tokens that are left, and a mask of their number."""
    model, ids = host.model(family), tokens(330)
    cache = new(host, "knorm", family=family, **options)
    host.logits(model, ids[:300], cache)
    other = copy.deepcopy(cache)
    expected = [host.logits(model, ids[300:320], cache), host.logits(model, ids[320:], cache, 1)]
    with host.own_attention(model):
        got = [host.logits(model, ids[300:320], other), host.logits(model, ids[320:], other, 1)]
    assert all(store.has_dropped for store in host.stores(cache))
    for a, b in zip(got, expected, strict=True):
        close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("options", [{"budget_tokens": BUDGET}, TIGHT], ids=["usual", "small"])
@pytest.mark.parametrize("method, bits", [("expected-attention", None), ("expected-attention+spectral", 8.0)])
def test_padded_rows_are_as_if_alone(host, method, bits, options):
    given, exact = ({"bits": b, "method": m, **options} for b, m in ((bits, method), (None, "expected-attention")))
    cache = check_padded(host, "llama", [330, 240], [300, 320, 330], given, exact)
    assert all(group.dropped for group in host.stores(cache)[0].padding_groups)


def test_padding_may_end_in_a_later_piece_of_the_prompt(host):
    model, profile, padding = host.model("llama"), host.profile("llama"), [0, 90]
    ids = [tokens(200), [2] * 90 + tokens(110, seed=3)]
    for method, options in (("identity", {}), ("streaming", {"budget_tokens": BUDGET})):
        whole, cache = (host.padded_cache(model, padding, profile, method=method, **options) for _ in range(2))
        expected = host.batch_logits(model, ids, padding, whole, 0, 200)[:, -1]
        for piece in ((0, 50), (50, 100), (100, 200)):
            got = host.batch_logits(model, ids, padding, cache, *piece)[:, -1]
        assert host.stores(cache)[0].padding == padding
        assert np.abs(got - expected).max() < (1e-3 if method == "identity" else 1.0) * np.abs(expected).max()


def test_what_dropped_tokens_cannot_be_stored(host, tmp_path):
    model, profile = host.model("llama"), host.profile("llama")
    cache, path = new(host, "knorm"), tmp_path / "x.safetensors"
    host.logits(model, tokens(300), cache)
    with pytest.raises(ValueError, match="keeps every token with"):
        host.save_prompt_cache(path, cache, model=model)
    with pytest.raises(ValueError, match="keeps every token"):
        host.save_prompt_cache(path, host.plain_cache(model), model=model, method="knorm")
    with pytest.raises(ValueError, match="holds every token"):
        host.fill(host.make_prompt_cache(model, profile), cache)
    assert not list(tmp_path.iterdir())


def test_snapkv_needs_the_queries_of_the_prompt(host):
    shape, cache = host.profile("llama").shape, new(host, "snapkv")
    x = np.random.default_rng(0).standard_normal((1, shape.kv_heads, 300, shape.head_dim), np.float32)
    with pytest.raises(ValueError, match="recent"):
        host.update(cache, 0, x, x)
        host.stores(cache)


def test_the_wavelet_decides_who_stays(host):
    """Through generation by the host; budget and bytes are the same with every wavelet."""
    model, held, sizes = host.model("llama"), {}, set()
    for wavelet in (None, "db2", "haar", "bior2.2"):
        cache = new(host, "waveletkv", budget_tokens=BUDGET, wavelet=wavelet)
        out = host.generate(model, ByteTokenizer(), tokens(300), cache, 20, True, lambda token: None)
        assert len(out.tokens) == 20 and all(store.padding_groups[0].stored <= BUDGET for store in host.stores(cache))
        held[wavelet] = places(host, cache).tolist()
        sizes.add(int(host.cache_nbytes(cache)))
    assert held[None] == held["db2"] and len(sizes) == 1
    assert held["haar"] != held["db2"] != held["bior2.2"] != held["haar"]
    with pytest.raises(ValueError, match="random has none"):
        new(host, "random", budget_tokens=BUDGET, wavelet="haar")


def test_any_scorer_may_weigh_the_rounding(host):
    model, profile, held = host.model("qwen2"), host.profile("qwen2"), {}
    for scorer in (None, "expected-attention", "triattention", "nearest"):
        cache = host.make_prompt_cache(model, profile, bits=2, rounding_scores=scorer)
        host.logits(model, tokens(300), cache)
        held[scorer] = dense(host.stores(cache)[0])[0]
    assert np.array_equal(held[None], held["expected-attention"])
    assert not np.array_equal(held[None], held["triattention"]) and not np.array_equal(held[None], held["nearest"])
    with pytest.raises(ValueError, match="rounds by scores"):
        host.make_prompt_cache(model, profile, method="identity", rounding_scores="triattention")


def test_layers_agree_on_how_many_tokens_they_hold(host):
    """One mask serves all of them, and one crop."""
    model, ids, cache = host.model("llama"), tokens(420), new(host, "triattention+spectral", 8)
    host.logits(model, ids[:300], cache)
    for start in range(300, 400, 4):
        host.logits(model, ids[start : start + 4], cache)
        assert len({store.padding_groups[0].stored for store in host.stores(cache)}) == 1
    host.crop_layers(cache, 5)
    assert {store.seen for store in host.stores(cache)} == {395}
    other = copy.deepcopy(cache)
    expected = host.logits(model, ids[395:401], cache)
    with host.own_attention(model):
        got = host.logits(model, ids[395:401], other)
    assert np.abs(got - expected).max() < 1e-2 * np.abs(expected).max()


def test_a_second_crop_forgets_nothing_in_between(host):
    model, cache = host.model("llama"), new(host, "random")
    host.logits(model, tokens(300), cache)
    host.crop_layers(cache, 60)
    with pytest.raises(ValueError, match="at most"):
        host.crop_layers(cache, 60)
    assert (places(host, cache)[..., -1] == 239).all() and host.seen(cache) == 240


def test_a_cache_without_a_budget_is_refused(host):
    for method in ("knorm", "triattention+spectral"):
        with pytest.raises(ValueError, match="budget"):
            host.make_prompt_cache(host.model("llama"), host.profile("llama"), method=method)

"""Caches that drop tokens: who stays, where they stand, and what attention then sees."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import ToyModel, attention, toy_profile_of
from test_cache import SCALE, append, attend
from tolerances import ATTENTION_RMS, assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import unrotate
from spectral_kv_core.cache.eviction import EVERY, Eviction
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.codecs.registry import make_codec
from spectral_kv_core.planning.methods import METHODS, get_method
from spectral_kv_core.scorers import SCORERS

MODEL = ToyModel()
SCORED = [scorer.name for scorer in SCORERS.values() if not scorer.needs_recent]


def make_caches(xp, name: str, budget: int, bits: float | None = None, layers: int = 1, **options) -> list[LayerCache]:
    """The layers of a cache with the method `name`, which share one `Eviction`."""
    method = get_method(name)
    group = method.group if method.codec == "spectral" else "head"
    profile = toy_profile_of(MODEL, group, method.rope if method.codec == "spectral" else "post")
    plan, eviction = CacheRequest(method, bits, budget_tokens=budget, **options).plan(MODEL.shape, profile)
    window = options.get("window", 64)
    return [LayerCache(xp, make_codec(xp, plan, row), 4, window, None, eviction, row) for row in range(layers)]


def positions_of(cache, group: int = 0, heads: int = MODEL.kv_heads) -> np.ndarray:
    """Positions [b, H, stored] of all tokens that a group holds, in the order of `dense`."""
    places = cache.padding_groups[group].all_places()
    return np.broadcast_to(places, (places.shape[0], heads, places.shape[2]))


def taken(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The tokens of `x` [B, H, T, D] at `places` [B, H, n]."""
    return np.take_along_axis(x, places[..., None], axis=2)


def steps(tokens: int, *sizes: int) -> list[slice]:
    """Slices of `sizes` tokens, then of one."""
    starts = np.cumsum([0, *sizes, *[1] * (tokens - sum(sizes))])
    return [slice(a, b) for a, b in pairwise(starts)]


@pytest.mark.parametrize("name", SCORED)
def test_a_prompt_is_cut_to_the_budget_and_generation_stays_below_it(xp, name):
    (cache,) = make_caches(xp, name, 150)
    keys, values = MODEL.sample(1, 400, batch=2)
    for part in steps(400, 300):
        append(cache, keys[:, :, part], values[:, :, part])
        if part.stop == 300:
            assert cache.padding_groups[0].stored == 150
        assert cache.padding_groups[0].stored <= 150
    places = positions_of(cache)
    assert (np.diff(places) > 0).all(), "tokens stay in the order of the text"
    np.testing.assert_array_equal(places[:, :, :4], np.broadcast_to(np.arange(4), (2, 2, 4)))
    np.testing.assert_array_equal(places[:, :, -64:], np.broadcast_to(np.arange(336, 400), (2, 2, 64)))
    for got, whole in zip(cache.dense(), (keys, values)):
        np.testing.assert_array_equal(xp.to_numpy(got), taken(whole, places))
    held = sum(a.nbytes for a in cache.arrays())
    stored = places.shape[-1]
    assert held <= 2 * 2 * stored * (2 * 64 * 4 + 4), "what was dropped has left memory; a position is an int32"
    assert cache.seen == 400 and cache.tokens() == 800, "compression is told against all tokens that came in"


@pytest.mark.parametrize(
    "name, options", [("streaming", {}), ("triattention", {}), ("triattention", {"evict_every": 9})]
)
def test_eviction_works_in_batches(xp, name, options):
    """Scoring at every step would cost more than the attention that it saves."""
    (cache,) = make_caches(xp, name, 300, **options)
    every = options.get("evict_every", EVERY)
    keys, values = MODEL.sample(1, 500)
    dropped = []
    for part in steps(500, 300):
        append(cache, keys[:, :, part], values[:, :, part])
        dropped.append(cache.padding_groups[0].dropped)
    changes = np.flatnonzero(np.diff(dropped))
    assert len(changes) == -(-200 // (every + 1)) and (np.diff(changes) == every + 1).all()


def test_attention_sees_what_was_kept(xp):
    (cache,) = make_caches(xp, "expected-attention", 150)
    keys, values = MODEL.sample(1, 480)
    queries = MODEL.queries(1, 480)
    for part in steps(480, 300, 40, 7, 100):
        before = [xp.to_numpy(x) for x in cache.dense()] if cache.seen else [keys[:, :, :0], values[:, :, :0]]
        new = queries[:, :, part], keys[:, :, part], values[:, :, part]
        expected = attention(new[0], *(np.concatenate([a, b], 2) for a, b in zip(before, new[1:])), SCALE)
        assert_close("output", attend(cache, *new), expected)


@pytest.mark.parametrize("codec, bits", [("spectral", 8), ("spectral-dense", 8), ("affine", 8.5)])
def test_codec_keeps_the_tokens_that_it_is_told_to(xp, codec, bits):
    (cache,) = make_caches(xp, f"triattention+{codec}", 330, bits)
    keys, values = MODEL.sample(1, 700)
    queries = MODEL.queries(1, 700)
    for number, part in enumerate(steps(700, 400, 90, 1, 30, 40)):
        attend(cache, queries[:, :, part], keys[:, :, part], values[:, :, part])
        group = cache.padding_groups[0]
        assert group.stored <= 330 and group.seen == part.stop
        if number in (0, 1):
            assert not group.sealed, "a prompt stays exact until it ends"
    cache.finalize()
    places = positions_of(cache)
    assert cache.padding_groups[0].sealed > 150 and cache.padding_groups[0].dropped >= 370
    assert (np.diff(places) > 0).all()
    if codec == "spectral-dense":
        assert (places == places[:, :1]).all(), "heads that are coded together keep the same tokens"
    else:
        assert (places[:, 0] != places[:, 1]).any()
    limit = (
        0.06 if codec == "spectral-dense" else 0.02
    )  # the toy's keys are made after RoPE; at wrong positions it is 1
    for got, whole in zip(cache.dense(), (keys, values)):
        assert relative_rms(xp.to_numpy(got), taken(whole, places)) < limit
    held = [xp.to_numpy(x) for x in cache.dense()]
    last = [x[:, :, -1:] for x in (queries, keys, values)]
    expected = attention(last[0], *(np.concatenate([a, b], 2) for a, b in zip(held, last[1:])), SCALE)
    assert_close("output", attend(cache, *last), expected, limit=ATTENTION_RMS)


@pytest.mark.parametrize("codec", ["spectral", "spectral-dense", "affine"])
def test_sealed_tokens_are_dropped_without_a_second_loss(xp, codec):
    """What stays decodes to what it decoded to before, bit for bit: codes move, nothing is quantized twice."""
    (cache,) = make_caches(xp, f"random+{codec}", 1500, 4.5)
    keys, values = MODEL.sample(1, 1600)
    append(cache, keys[:, :, :1400], values[:, :, :1400])
    cache.finalize()
    before = [np.zeros_like(keys) for _ in range(2)]
    for x, got in zip(before, cache.dense()):
        np.put_along_axis(x, positions_of(cache)[..., None], xp.to_numpy(got), axis=2)
    for part in steps(1520, 1400)[1:]:
        append(cache, keys[:, :, part], values[:, :, part])
    assert cache.padding_groups[0].dropped
    places = positions_of(cache)
    assert len(cache.padding_groups[0].chunks) == 2, "what is left is packed into whole chunks again"
    old = (places < 1328).all((0, 1))  # sealed from the beginning
    assert old.sum() > 1000
    for got, x in zip(cache.dense(), before):
        assert_close("kept", xp.to_numpy(got)[:, :, old], taken(x, places)[:, :, old], limit=1e-6)


def test_what_stays_is_the_same_on_every_library(xp):
    for name in ("wavelettriattention", "triattention+spectral"):
        found = []
        for library in (ops, xp):
            (cache,) = make_caches(library, name, 200, 4 if "+" in name else None, protect=[(90, 110)])
            keys, values = MODEL.sample(3, 420)
            for part in steps(420, 300, 60):
                append(cache, keys[:, :, part], values[:, :, part])
            found.append(positions_of(cache))
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name, bits", [("knorm", None), ("random+spectral", 4)])
def test_protected_tokens_stay(xp, name, bits):
    (cache,) = make_caches(xp, name, 260, bits, protect=[(10, 40), (200, 210)])
    keys, values = MODEL.sample(1, 900)
    for part in steps(900, 300, 100):
        append(cache, keys[:, :, part], values[:, :, part])
    for head in positions_of(cache)[0]:
        assert {*range(10, 40), *range(200, 210)} <= set(head.tolist())


def test_heads_keep_the_same_tokens_in_all_layers_on_request(xp):
    layers = make_caches(xp, "triattention", 150, layers=2, selection="per_head")
    samples = [MODEL.sample(1, 400, layer=layer) for layer in range(2)]
    for part in steps(400, 300):
        for cache, (keys, values) in zip(layers, samples):
            append(cache, keys[:, :, part], values[:, :, part])
        assert all(cache.padding_groups[0].stored <= 150 for cache in layers)
    places = [positions_of(cache) for cache in layers]
    np.testing.assert_array_equal(*places)
    assert (places[0][:, 0] != places[0][:, 1]).any()
    for cache, (keys, _) in zip(layers, samples):
        np.testing.assert_array_equal(xp.to_numpy(cache.dense()[0]), taken(keys, places[0]))
    own = make_caches(xp, "triattention", 150, layers=2)
    for cache, (keys, values) in zip(own, samples):
        append(cache, keys[:, :, :300], values[:, :, :300])
    assert (positions_of(own[0]) != positions_of(own[1])).any()


@pytest.mark.parametrize("name, bits", [("expected-attention", None), ("expected-attention+spectral", 4)])
def test_padded_rows_are_as_if_alone(xp, name, bits):
    """Rows of different length in one batch: the same tokens, positions and outputs as every row by itself."""
    pads, tokens = [0, 150], 420
    keys, values = MODEL.sample(1, tokens, batch=2)
    queries = MODEL.queries(1, tokens, batch=2)
    (together,) = make_caches(xp, name, 200, bits)
    together.start(2, pads)
    parts = steps(tokens, 300, 40)
    outputs = [attend(together, *(x[:, :, part] for x in (queries, keys, values))) for part in parts]
    for row, pad in enumerate(pads):
        (alone,) = make_caches(xp, name, 200, bits)
        group = next(i for i, group in enumerate(together.padding_groups) if row in group.sequences)
        for part, output in zip(parts, outputs):
            own = slice(max(part.start, pad), max(part.stop, pad))
            if own.stop > own.start:
                got = attend(alone, *(x[row : row + 1, :, own] for x in (queries, keys, values)))
                assert_close("output", output[row : row + 1, :, own.start - part.stop or None :], got)
        np.testing.assert_array_equal(positions_of(together, group), positions_of(alone))
        assert alone.padding_groups[0].dropped


def test_rows_are_selected_with_their_positions(xp):
    (cache,) = make_caches(xp, "random+spectral", 200, 4)
    keys, values = MODEL.sample(1, 420, batch=2)
    append(cache, keys[:, :, :300], values[:, :, :300])
    append(cache, keys[:, :, 300:301], values[:, :, 300:301])
    before = positions_of(cache), [xp.to_numpy(x) for x in cache.dense()]
    cache.select([1, 1, 0])
    np.testing.assert_array_equal(positions_of(cache), before[0][[1, 1, 0]])
    for got, x in zip(cache.dense(), before[1]):
        np.testing.assert_array_equal(xp.to_numpy(got), x[[1, 1, 0]])


def test_recent_tokens_can_be_forgotten(xp):
    (cache,) = make_caches(xp, "random", 150)
    keys, values = MODEL.sample(1, 400)
    append(cache, keys[:, :, :300], values[:, :, :300])
    append(cache, keys[:, :, 300:310], values[:, :, 300:310])
    places = positions_of(cache)
    cache.crop(20)
    np.testing.assert_array_equal(positions_of(cache), places[:, :, :-20])
    append(cache, keys[:, :, 290:320], values[:, :, 290:320])
    assert (positions_of(cache)[:, :, -30:] == np.arange(290, 320)).all()
    with pytest.raises(ValueError, match="at most 74 tokens to forget"):
        cache.crop(200)
    cache.crop(320)
    assert cache.dense() is None and not cache.has_dropped


def test_a_copy_goes_its_own_way(xp):
    layers = make_caches(xp, "triattention", 150, layers=2, selection="per_head")
    samples = [MODEL.sample(1, 400, layer=layer) for layer in range(2)]
    for cache, (keys, values) in zip(layers, samples):
        append(cache, keys[:, :, :300], values[:, :, :300])
    before = positions_of(layers[0])
    copies = copy.deepcopy(layers)
    assert copies[0].eviction is copies[1].eviction is not layers[0].eviction
    for part in steps(400, 300)[1:]:
        for cache, (keys, values) in zip(copies, samples):
            append(cache, keys[:, :, part], values[:, :, part])
    np.testing.assert_array_equal(positions_of(layers[0]), before)
    assert copies[0].seen == 400 and layers[0].seen == 300


def test_a_scorer_sees_what_it_is_defined_on(monkeypatch):
    """True positions, keys before RoPE, the newest position: for tokens with gaps as for the whole text."""
    seen = []
    scorer = SCORERS["random"]

    def spy(xp, pre_rope, positions, now, seed=0):
        seen.append((pre_rope, np.array(positions), now))
        return xp.zeros(pre_rope.shape[:3]) + np.random.default_rng(len(seen)).random(pre_rope.shape[:3])

    needs = ("pre_rope", "positions", "now")
    monkeypatch.setitem(SCORERS, "random", replace(scorer, scores=spy, needs=needs))
    (cache,) = make_caches(ops, "random", 150)
    keys, values = MODEL.sample(1, 500)
    whole = unrotate(ops, keys, MODEL.rope, 0)
    for part in steps(500, 300, 100):
        append(cache, keys[:, :, part], values[:, :, part])
    assert len(seen) > 2
    for pre_rope, positions, now in seen:
        assert now == positions.max()
        assert_close("pre_rope", pre_rope, taken(whole, positions), limit=1e-4)


@pytest.mark.parametrize("name", [name for name, scorer in SCORERS.items() if "wavelet" in scorer.options])
def test_the_wavelet_reaches_the_scorer(xp, name):
    """Also in a copy of the cache. The plan, and so its hash, has no part in it."""
    keys, values = MODEL.sample(1, 300)
    recent = xp.asarray(MODEL.queries(1, 5))
    found, hashes = {}, set()
    for wavelet in (None, "db2", "haar", "bior2.2"):
        (cache,) = make_caches(xp, name, 150, wavelet=wavelet)
        eviction = copy.deepcopy(cache.eviction)
        hashes.add(eviction.plan.hash)
        places, arrays = np.arange(300), (xp.asarray(keys), xp.asarray(values))
        found[wavelet] = xp.to_numpy(eviction.scores(xp, 0, *arrays, places, 299, recent))
    np.testing.assert_array_equal(found[None], found["db2"])
    assert len(hashes) == 1
    assert not np.array_equal(found["haar"], found["db2"]) and not np.array_equal(found["haar"], found["bior2.2"])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("triattention", {}, "either budget_tokens or budget_bytes"),
        ("triattention", {"budget_tokens": 200, "budget_bytes": 100}, "received both"),
        ("triattention", {"budget_tokens": 68}, "above 68"),
        ("triattention", {"budget_tokens": 2.5}, "number of tokens"),
        ("triattention", {"budget_tokens": 200, "protect": [(5, 5)]}, "start < end"),
        ("triattention", {"budget_tokens": 100, "protect": [(0, 50)]}, "above 114"),
        ("triattention", {"budget_tokens": 200, "selection": "global"}, "selection among"),
        ("triattention", {"budget_tokens": 200, "evict_every": 0}, "evict_every to be a number"),
        ("spectral", {"evict_every": 64}, "drops tokens for evict_every, spectral keeps"),
        ("triattention", {"budget_tokens": 200, "bits": 3.0}, "bits between 16 and 16"),
        ("triattention", {"budget_tokens": True}, "number of tokens"),
        ("triattention", {"budget_tokens": 200, "protect": (0, 10)}, "start < end"),
        ("triattention", {"budget_tokens": 200, "protect": [(0.5, 20)]}, "start < end"),
        ("triattention", {"budget_tokens": 200, "protect": [(0, 10**12)]}, "budget_tokens above"),
        ("spectral", {"budget_tokens": 200}, "keeps every token"),
        ("spectral", {"wavelet": "haar"}, "drops tokens for wavelet, spectral keeps"),
        ("triattention", {"budget_tokens": 200, "wavelet": "haar"}, "waveletkv, .* for wavelet, triattention has none"),
        ("waveletkv", {"budget_tokens": 200, "wavelet": "morl"}, "discrete wavelet .*, received 'morl'"),
        ("waveletkv+spectral", {"tiers": [(0.5, 3), (0.5, 1)], "wavelet": "haar"}, "tiers alone, .* wavelet too"),
        ("spectral", {"protect": [(0, 9)]}, "wavelettriattention\\+spectral"),
    ],
)
def test_requests_that_cannot_work(toy_profile, name, options, message):
    with pytest.raises(ValueError, match=message):
        CacheRequest(name, **options).plan(MODEL.shape, toy_profile)


@pytest.mark.parametrize(
    "name", ["triattention+identity", "triattention+spectral-stored", "nothing+spectral", "spectral+"]
)
def test_compositions_that_do_not_exist(name):
    with pytest.raises(ValueError, match="SCORER\\+METHOD"):
        get_method(name)


def test_every_scorer_is_a_method_and_composes():
    for name in SCORERS:
        assert METHODS[name].scorer == name and METHODS[name].codec == "none"
        composed = get_method(f"{name}+spectral-dense")
        assert (composed.scorer, composed.basis_set) == (name, "layer.pre")


@pytest.mark.parametrize("name, bits", [("streaming", None), ("streaming+spectral", 4)])
def test_bytes_are_turned_into_tokens(toy_profile, name, bits):
    """A budget in bytes is kept, positions included, and used."""
    limit = 400_000
    plan, eviction = CacheRequest(name, bits, budget_bytes=limit).plan(MODEL.shape, toy_profile, element_bytes=4)
    caches = [LayerCache(ops, make_codec(ops, plan, row), 4, 64, None, eviction, row) for row in range(MODEL.layers)]
    for layer, cache in enumerate(caches):
        keys, values = MODEL.sample(1, 2000, layer=layer)
        append(cache, keys[:, :, :1999], values[:, :, :1999])
        cache.finalize()
    held = sum(a.nbytes for cache in caches for a in cache.arrays())
    assert 0.9 * limit < held <= limit
    assert isinstance(eviction, Eviction)

"""Bits by rank: the tokens that matter most of every group get more."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ToyModel, attention, codes_of, toy_profile_of
from tolerances import ATTENTION_RMS, assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import unrotate
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.codecs.registry import make_codec
from spectral_kv_core.codecs.tiers import GROUP, make_tiered_plan
from spectral_kv_core.planning.methods import get_method

MODEL = ToyModel(rotated=True)
TIERS = ((0.25, 6.0), (0.75, 2.0))
METHODS = pytest.mark.parametrize("name", ["triattention+spectral", "knorm+spectral-dense"])


def plan_of(name: str, tiers=TIERS):
    method = get_method(name)
    profile = toy_profile_of(MODEL, method.group, method.rope)
    return make_tiered_plan(MODEL.shape, profile, method, tiers)


def codec_of(xp, name: str, tiers=TIERS):
    return make_codec(xp, plan_of(name, tiers), 0)


def encoded(codec, keys, values, start: int = 0):
    return codec.encode(codec.xp.asarray(keys), codec.xp.asarray(values), start)


def decoded(codec, chunk) -> list[np.ndarray]:
    return [codec.xp.to_numpy(x) for x in codec.decode(chunk)]


@METHODS
def test_tokens_come_back_in_order_the_best_ones_with_less_error(xp, name):
    codec = codec_of(xp, name)
    keys, values = MODEL.sample(1, 512, batch=2)
    got = decoded(codec, encoded(codec, keys, values))
    assert all(relative_rms(a, b) < 0.3 for a, b in zip(got, (keys, values))), "in another order it is above 1"
    scores = codec.scores(xp.asarray(unrotate(ops, keys, MODEL.rope, 0)), xp.asarray(values))
    scores = xp.to_numpy(scores)
    scores = scores.mean(1, keepdims=True).repeat(2, 1) if codec.shares_tokens else scores
    groups = scores.reshape(2, 2, -1, GROUP)
    best = (groups >= np.sort(groups, -1)[..., -GROUP // 4, None]).reshape(scores.shape)
    for a, b in zip(got, (keys, values)):
        assert relative_rms(a[best], b[best]) < 0.7 * relative_rms(a[~best], b[~best])


@METHODS
@pytest.mark.parametrize("tiers", [TIERS, ((0.25, 4.0), (0.25, 2.0), (0.5, 1.0))])
def test_bits_are_those_of_the_arrays(name, tiers):
    plan = plan_of(name, tiers)
    codecs = [make_codec(ops, plan, row) for row in range(2)]
    keys, values = MODEL.sample(1, 1024)
    held = sum(a.nbytes for codec in codecs for a in encoded(codec, keys, values).held)
    assert 8 * held / (2 * 2 * keys.size) == pytest.approx(plan.bits_per_element, rel=0.01)
    assert plan.bits_per_element <= plan.bits + 0.02


@METHODS
def test_pieces_cuts_and_rows(xp, name):
    codec = codec_of(xp, name)
    keys, values = MODEL.sample(1, 512, batch=2)
    whole = encoded(codec, keys, values)
    chunk = encoded(codec, keys[:, :, :128], values[:, :, :128])
    chunk = codec.append(chunk, xp.asarray(keys[:, :, 128:]), xp.asarray(values[:, :, 128:]))
    np.testing.assert_array_equal(xp.to_numpy(chunk.arrays[0]), xp.to_numpy(whole.arrays[0]))  # who is in which tier
    for tier, a, b in zip(codec.codecs, codec._parts(chunk), codec._parts(whole)):
        # a product of fewer rows may round otherwise: a coefficient on a threshold then takes the code beside it, and
        # rounding in time hands its error to others of the same block
        differing = (codes_of(tier, a) != codes_of(tier, b)).any(1)
        assert np.count_nonzero(differing) <= 1, differing
    for a, b in zip(decoded(codec, codec.cut(whole, 192)), decoded(codec, whole)):
        assert_close("cut", a, b[:, :, :192])
    rows = whole.of_sequences(xp, xp.asarray(np.array([1], np.int32)))
    for a, b in zip(decoded(codec, rows), decoded(codec, whole)):
        assert_close("rows", a, b[1:])


@METHODS
def test_codes_are_those_of_the_reference(xp, name):
    keys, values = MODEL.sample(1, 512)
    got, expected = (decoded(c, encoded(c, keys, values)) for c in (codec_of(xp, name), codec_of(ops, name)))
    for a, b in zip(got, expected):
        assert (np.abs(a - b) > 1e-3).mean() < 1e-3


@METHODS
def test_a_cache_of_tiers_attends_to_what_it_holds(xp, name):
    plan = plan_of(name)
    cache = LayerCache(xp, make_codec(xp, plan, 0), 4, 64, lambda: make_codec(xp, plan.staging, 0))

    def fused(q, k, v, scale):
        return xp.asarray(attention(*map(xp.to_numpy, (q, k, v)), scale).astype(np.float32))

    keys, values = MODEL.sample(1, 800)
    queries = MODEL.queries(1, 800)
    start = 0
    for tokens in (300, 200, 100, *[1] * 150):
        part = slice(start, start + tokens)
        new = [x[:, :, part] for x in (queries, keys, values)]
        if tokens == 1:
            cache.finalize()
        held = [xp.to_numpy(x) for x in cache.dense()] if start else [new[1][:, :, :0]] * 2
        expected = attention(new[0], *(np.concatenate([a, b], 2) for a, b in zip(held, new[1:])), 0.125)
        got = xp.to_numpy(cache.attend(*map(xp.asarray, new), 0.125, fused))
        assert_close("output", got, expected, limit=ATTENTION_RMS)
        start += tokens
    group = cache.padding_groups[0]
    assert group.sealed % GROUP == 0 and group.exact < 4 + 64 + GROUP and not group.staged
    cache.crop(200)
    assert cache.padding_groups[0].stored == 550


@pytest.mark.parametrize(
    "name, tiers, options, message",
    [
        ("spectral", TIERS, {}, "a scorer with spectral"),
        ("triattention", TIERS, {}, "a scorer with spectral"),
        ("triattention+affine", TIERS, {}, "a scorer with spectral"),
        ("triattention+spectral", ((0.3, 2.0), (0.7, 1.0)), {}, "quarters"),
        ("triattention+spectral", ((0.25, 2.0), (0.5, 1.0)), {}, "add up to 1"),
        ("triattention+spectral", ((1.0, 2.0),), {}, "add up to 1"),
        ("triattention+spectral", TIERS, {"budget_tokens": 300}, "budget_tokens too"),
        ("triattention+spectral", ((0.25, 2.0), (0.75, 0.1)), {}, "bits between"),
        ("snapkv+spectral", TIERS, {}, "looks at keys alone"),
        ("triattention+spectral", (0.25, 0.75), {}, "add up to 1"),
    ],
)
def test_tiers_that_cannot_be(name, tiers, options, message):
    with pytest.raises(ValueError, match=message):
        CacheRequest(name, tiers=tiers, **options).plan(MODEL.shape, toy_profile_of(MODEL))

"""Keys with a large constant part: which methods suffer, and that they say so."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from cases import ToyModel

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import rotate
from spectral_kv_core.cache.key_means import LOUD, KeyMeans, loudness
from spectral_kv_core.calibration.basis_fit import fit_basis_set
from spectral_kv_core.calibration.moments import QueryMoments
from spectral_kv_core.calibration.spool import Spool
from spectral_kv_core.codecs.registry import make_codec, make_plan
from spectral_kv_core.planning.cache_plan import cache_plan
from spectral_kv_core.planning.methods import METHODS
from spectral_kv_core.profile.profile import Profile, QueryStatistics
from spectral_kv_core.profile.store import warn_once

MODEL, STILL = ToyModel(rotated=True), ToyModel()
BIAS = 5 * np.random.default_rng(5).standard_normal((1, 2, 1, 64)).astype(np.float32)
SUFFERS = 3.0  # times the error without a bias


def sample(seed: int, layer: int, biased: bool, tokens: int = 512):
    """Keys after RoPE, biased before it or not, and values."""
    keys, values = STILL.sample(seed, tokens, layer=layer)
    return rotate(ops, keys + BIAS if biased else keys, MODEL.rope, 0), values


@cache
def profile(biased: bool) -> Profile:
    with Spool() as spool:
        for d in range(4):
            gradients = np.random.default_rng(d).standard_normal((2, 2, 512, 64)).astype(np.float32)
            for layer in range(MODEL.layers):
                keys, values = sample(d, layer, biased)
                spool.add(layer, d, keys[0], values[0], gradients, gradients)
        names = ("head.post", "layer.pre", "layer2.pre")
        sets = {name: fit_basis_set(spool, MODEL.shape, *name.split(".")) for name in names}
    moments = [QueryMoments(MODEL.kv_heads, MODEL.rope) for _ in range(MODEL.layers)]
    for layer, moment in enumerate(moments):
        moment.update((MODEL.queries(layer, 500)[0] + 1) * MODEL.head_dim**-0.5)
    queries = QueryStatistics(*map(np.stack, zip(*(m.result() for m in moments))))
    return Profile(MODEL.shape, "toy", {"target_energy": 0.95}, sets, queries)


def error(method, biased: bool) -> float:
    """Of the keys that a method gives back, beside what changes in them."""
    codec = make_codec(ops, make_plan(MODEL.shape, profile(biased), method, None), 0)
    layers = [sample(77, layer, biased) for layer in range(getattr(codec, "layers", 1))]
    keys, values = (np.concatenate(sides, axis=1) for sides in zip(*layers))
    decoded, _ = codec.decode(codec.encode(keys, values, 0))
    return float(np.sqrt(np.square(decoded - keys).mean() / sample(77, 0, False)[0].var()))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.compresses and method.live])
def test_the_methods_that_suffer_are_marked(name):
    method = METHODS[name]
    assert (error(method, True) > SUFFERS * error(method, False)) == method.suffers_from_key_means


@pytest.fixture
def told(caplog):
    warn_once.cache_clear()
    return lambda: caplog.text.count("a constant part that outweighs")


@pytest.mark.parametrize("biased", [False, True])
def test_the_first_prompt_tells_whether_keys_are_so(told, biased):
    assert (loudness(ops.to_numpy(STILL.sample(77, 512)[0] + biased * BIAS)) > LOUD) == biased
    for start in (0, 3000):  # what a rotation hides is seen
        warn_once.cache_clear()
        means, before = KeyMeans(cache_plan(make_plan(MODEL.shape, None, "turboquant", None))), told()
        moved = rotate(ops, STILL.sample(77, 512)[0] + biased * BIAS, MODEL.rope, start)
        assert not means.saw(ops, moved[:, :, :16], start) and told() == before
        assert means.saw(ops, moved, start) and told() == before + biased
        assert means.saw(ops, moved, start) and told() == before + biased  # once of a model

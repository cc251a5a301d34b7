"""Costs of layers, set to what coding each alone is measured to do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of

from spectral_kv_core.arrays.divergence import compare_logits, divergence, log_softmax
from spectral_kv_core.calibration.layer_probing import PROBED, probed
from spectral_kv_core.codecs.registry import make_plan

MODEL = ToyModel(layers=3)
TOKENS, PREDICTED, WORDS = 300, 8, 32
NOISE = 2e-4  # of logits, in a model of little precision


def held():
    return [MODEL.sample(9, TOKENS, layer=layer) for layer in range(MODEL.layers)]


def predictions(strength, noise=0.0):
    """A model whose logits move with the errors of its layers, `strength` [layers, sides] times as much; and calls of it."""
    rng = np.random.default_rng(1)
    exact = held()
    read = [[rng.standard_normal((x.size, PREDICTED * WORDS)).astype(np.float32) for x in layer] for layer in exact]
    start, calls = rng.standard_normal((PREDICTED, WORDS)), []

    def log_p(changed):
        calls.append(sorted(changed))
        logits = start.copy()
        for n, layer in changed.items():
            for side in (0, 1):
                error = (layer[side] - exact[n][side]).reshape(-1)
                logits += strength[n][side] * (error @ read[n][side]).reshape(logits.shape) * 1e-4
            logits += noise * np.random.default_rng(len(calls)).standard_normal(logits.shape)
        return log_softmax(logits).astype(np.float32)

    return log_p, calls


def factors(before, after):
    """What costs were multiplied by [L, G], after a check that it is one number for all coefficients of a group."""
    ratio = after.sensitivity / before.sensitivity
    first = ratio[..., :1, :1]
    np.testing.assert_allclose(ratio, first + np.zeros_like(ratio), rtol=1e-5)
    np.testing.assert_allclose(after.cost, before.cost * first[..., None], rtol=2e-3)  # shares in 16 bits
    return first[..., 0, 0]


def run(strength, noise=0.0):
    profile = toy_profile_of(MODEL)
    mine = replace(profile, basis_sets=dict(profile.basis_sets))
    log_p, calls = predictions(np.array(strength), noise)
    probed(MODEL.shape, mine, [(held(), log_p)] * 4)
    return factors(profile.basis_sets[PROBED], mine.basis_sets[PROBED]), calls, mine


EVEN = [[1, 1], [1, 1], [1, 1]]


@pytest.mark.slow
def test_what_moves_predictions_more_gets_more_bits():
    (even, calls, plain), (found, _, mine) = run(EVEN), run([[3, 1], [1, 1], [1, 0.5]])
    heads = MODEL.kv_heads
    relative = found / even
    relative /= relative[1, 0]
    np.testing.assert_allclose(relative[0, :heads], 9, rtol=0.05)  # KL goes with the square of an error
    np.testing.assert_allclose(relative[2, heads:], 0.25, rtol=0.05)
    np.testing.assert_allclose(relative[1], 1, rtol=0.05)
    assert np.exp(np.log(found).mean()) == pytest.approx(1, rel=1e-3)
    assert max(map(len, calls)) == 1
    before, after = (make_plan(MODEL.shape, p, "spectral", 2.0).widths.mean((2, 3)) for p in (plain, mine))
    assert (after[0, :heads] > before[0, :heads]).all() and (after[2, heads:] < before[2, heads:]).all()


@pytest.mark.slow
def test_noise_of_the_model_is_no_cost():
    strength = [[0.1, 0.1], [1, 1], [1, 1]]
    quiet, loud = run(strength)[0], run(strength, noise=NOISE)[0]
    quiet, loud = quiet / quiet[2, 0], loud / loud[2, 0]
    np.testing.assert_allclose(loud[1:], quiet[1:], rtol=0.3)
    assert loud[0].max() < 6 * quiet[0].max()


def test_a_model_that_does_not_care_keeps_its_costs():
    found, _, _ = run(np.zeros((3, 2)))
    np.testing.assert_array_equal(found, 1)


def test_divergence_is_that_of_compared_logits_and_never_negative():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 100))
    for size in (1.0, 1e-2):
        y = x + size * rng.standard_normal(x.shape)
        p, q = (log_softmax(z).astype(np.float32) for z in (x, y))
        assert divergence(p, q) == pytest.approx(compare_logits(x, y, [0] * 5)["kl"], rel=1e-3)
    y = x + 1e-5 * rng.standard_normal(x.shape)
    p, q = (log_softmax(z).astype(np.float32) for z in (x, y))
    assert 0 <= divergence(p, q) < 1e-9 and divergence(p, p) == 0

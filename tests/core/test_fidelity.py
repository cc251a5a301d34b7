"""Errors of attention outputs, keys and values, and their spectra: against plain formulas and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from spectral_kv_core.arrays.divergence import compare_tokens
from spectral_kv_core.evaluation.fidelity import (
    at_positions,
    output_errors,
    output_perturbation,
    relative_error,
    sealed_span,
    spectral_fidelity,
)

RNG = np.random.default_rng(0)
EXACT = RNG.normal(size=(2, 40, 6)).astype(np.float32)


def test_output_errors_are_relative_by_head_and_query():
    exact = RNG.normal(size=(3, 5, 8)).astype(np.float32)
    scale = np.linspace(0, 0.4, 15).reshape(3, 5, 1)
    errors = output_errors(exact, exact * (1 - scale))
    np.testing.assert_allclose(errors, scale[..., 0], atol=1e-6)
    zero = np.zeros((1, 1, 2))
    assert output_errors(zero, zero) == 0 and output_errors(zero, zero + 1) == np.inf
    with pytest.raises(ValueError, match="finite attention outputs"):
        output_errors(exact, exact * np.nan)
    with pytest.raises(ValueError, match=r"shape \(3, 5, 8\), received \(3, 4, 8\)"):
        output_errors(exact, exact[:, :4])


def test_perturbation_over_layers():
    layers = [np.array([[0.1, 0.3]]), np.array([[0.0, 1.0]])]
    numbers = output_perturbation(layers)
    assert numbers["aop"] == pytest.approx(0.35) and numbers["aop_max"] == 1
    assert numbers["aop_layers"] == pytest.approx([0.2, 0.5])
    assert numbers["aop_p95"] == pytest.approx(np.quantile([0.1, 0.3, 0, 1], 0.95))


@pytest.mark.parametrize("tokens, sealed", [(10, 0), (79, 0), (84, 16), (1024, 944), (1023, 944)])
def test_sealed_tokens_lie_between_sinks_and_window(tokens, sealed):
    span = sealed_span(tokens, 4, 64)
    assert span.start == 4 and len(range(tokens)[span]) == sealed


def test_the_span_is_what_a_cache_seals():
    from cases import ToyModel, toy_profile_of

    from spectral_kv_core.arrays import ops
    from spectral_kv_core.cache.layer_cache import LayerCache
    from spectral_kv_core.codecs.registry import make_codec, make_plan
    from spectral_kv_core.planning.methods import get_method

    model = ToyModel()
    shape = model.shape
    plan = make_plan(shape, toy_profile_of(model), get_method("spectral"), 3.0)
    exact = RNG.normal(size=(1, shape.kv_heads, 200, shape.head_dim)).astype(np.float32)
    cache = LayerCache(ops, make_codec(ops, plan, 0), 4, 64)
    cache.append(exact, exact)
    changed = (cache.dense()[0][0] != exact[0]).any((0, 2))
    span = sealed_span(200, 4, 64)
    assert changed[span].all() and not changed[: span.start].any() and not changed[span.stop :].any()


def test_relative_error_in_a_span():
    held = EXACT.copy()
    held[:, 8:16] *= 0.5
    assert relative_error(EXACT, held, span=slice(8, 16)) == pytest.approx(0.25)
    share = np.square(EXACT[:, 8:16]).sum() / np.square(EXACT).sum()
    assert relative_error(EXACT, held) == pytest.approx(0.25 * share)
    assert relative_error(EXACT, held, span=slice(16, 40)) == relative_error(EXACT, held, span=slice(4, 4)) == 0


def test_tokens_that_are_not_held_count_as_zero():
    positions = np.stack([np.arange(0, 40, 2), np.arange(1, 40, 2)])  # every head has its own
    held = np.take_along_axis(EXACT, positions[:, :, None], axis=1)
    whole = at_positions(held, positions, 40)
    assert np.array_equal(whole[0, ::2], EXACT[0, ::2]) and not whole[0, 1::2].any()
    assert np.array_equal(whole[1, 1::2], EXACT[1, 1::2]) and not whole[1, ::2].any()
    lost = np.square(EXACT[0, 1::2]).sum() + np.square(EXACT[1, ::2]).sum()
    assert relative_error(EXACT, held, positions) == pytest.approx(lost / np.square(EXACT).sum())
    assert spectral_fidelity(EXACT, held, positions) == pytest.approx(spectral_fidelity(EXACT, whole))
    assert spectral_fidelity(EXACT, held, positions) < 0.9
    with pytest.raises(ValueError, match="positions of 20 tokens out of 40"):
        relative_error(EXACT, held)


def test_spectral_fidelity_is_an_energy_weighted_cosine():
    time = np.arange(64)
    slow, fast = (np.cos(2 * np.pi * f * time / 64) for f in (2, 9))
    exact = np.stack([3 * slow, slow], axis=-1)[None]  # two channels; the first has nine times the energy
    assert spectral_fidelity(exact, np.roll(exact, 5, axis=1) * 2) == pytest.approx(1)  # phases and size do not matter
    assert spectral_fidelity(exact, np.stack([3 * slow, fast], axis=-1)[None]) == pytest.approx(0.9)
    mixed = np.stack([3 * slow, slow + fast], axis=-1)[None]
    assert spectral_fidelity(exact, mixed) == pytest.approx(0.9 + 0.1 / np.sqrt(2))
    assert spectral_fidelity(exact, 0 * exact) == 0 and spectral_fidelity(0 * exact, exact) == 1
    expected = []
    for h in range(2):
        for d in range(6):
            p, q = (np.abs(np.fft.rfft(x[h, :, d])) ** 2 for x in (EXACT, EXACT[:, ::-1] + 0.3))
            expected.append((p.sum(), p @ q / np.sqrt((p @ p) * (q @ q))))
    weights, cosines = zip(*expected)
    assert spectral_fidelity(EXACT, EXACT[:, ::-1] + 0.3) == pytest.approx(
        np.average(cosines, weights=weights), rel=1e-5
    )


def test_greedy_tokens_are_compared_from_the_first():
    assert compare_tokens([1, 2, 3, 4], [1, 2, 9, 4]) == {"first_divergence": 2, "token_match": 0.75}
    assert compare_tokens([1, 2], [1, 2]) == {"first_divergence": 2, "token_match": 1.0}
    assert compare_tokens([1, 2], [3, 2])["first_divergence"] == 0

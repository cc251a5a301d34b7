"""Scorers and selection on MLX: native all the way, lazily, in its half-precision types."""

from __future__ import annotations

import numpy as np
import pytest
from test_scorers import NAMES, ROPES, text, tokens_of
from tolerances import assert_scores_close

mx = pytest.importorskip("mlx.core")

from spectral_kv_core.arrays import ops as reference  # noqa: E402
from spectral_kv_core.scorers import SCORERS, Tokens  # noqa: E402
from spectral_kv_core.scorers.selection import select  # noqa: E402
from spectral_kv_mlx import ops  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_scores_stay_on_the_device(name, monkeypatch):
    """No array goes through NumPy on the way."""
    tokens = tokens_of(ops, text(150))
    monkeypatch.setattr(ops, "to_numpy", None)
    scores = SCORERS[name](tokens)
    assert isinstance(scores, mx.array) and scores.dtype == mx.float32
    assert isinstance(select(ops, scores, 40, 4, 16), mx.array)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_scored_in_float32(name, dtype):
    whole = tokens_of(ops, text(150))
    halves = {key: getattr(whole, key).astype(dtype) for key in ("post_rope", "values", "recent")}
    low = Tokens(**{**whole.__dict__, **halves})
    same = Tokens(**{**whole.__dict__, **{key: x.astype(mx.float32) for key, x in halves.items()}})
    got, expected = SCORERS[name](low), SCORERS[name](same)
    assert got.dtype == mx.float32
    np.testing.assert_array_equal(np.array(got), np.array(expected))


@pytest.mark.parametrize("name", NAMES)
def test_long_text_with_gaps_scores_as_in_numpy(name):
    positions = np.sort(np.random.default_rng(0).permutation(20_000)[: 2 * 2 * 700].reshape(2, 2, 700), axis=-1)
    keys = text(700)
    got = SCORERS[name](tokens_of(ops, keys, ROPES["interleaved"], positions))
    expected = SCORERS[name](tokens_of(reference, keys, ROPES["interleaved"], positions))
    assert_scores_close(name, np.array(got), expected)

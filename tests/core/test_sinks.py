"""Sink logits: one more term in every softmax, over sealed tokens and exact ones."""

from __future__ import annotations

import numpy as np
import pytest

from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.codecs.exact import ExactPlan
from spectral_kv_core.profile.model_shape import ModelShape

SCALE, Q_HEADS, KV_HEADS, DIM = 0.3, 6, 2, 16


def naive(queries, keys, values, sinks=None) -> np.ndarray:
    """Causal attention of the last tokens in float64, with the logits `sinks` [Hq] beside the scores."""
    length, group = queries.shape[2], Q_HEADS // KV_HEADS
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (keys, values))
    scores = queries.astype(np.float64) @ keys.swapaxes(-1, -2) * SCALE
    total = keys.shape[2]
    scores = np.where(np.arange(total - length, total)[:, None] >= np.arange(total), scores, -np.inf)
    logits = np.zeros(Q_HEADS) - np.inf if sinks is None else sinks
    column = np.broadcast_to(logits[None, :, None, None], (*scores.shape[:3], 1))
    p = np.exp(np.concatenate([scores, column], axis=-1))
    return (p / p.sum(-1, keepdims=True))[..., :-1] @ values


@pytest.mark.parametrize("padding", [None, [0, 21]], ids=["alone", "padded"])
def test_they_take_their_share_of_every_softmax(xp, padding):
    shape = ModelShape(1, 96, Q_HEADS, KV_HEADS, DIM, (0,), None)
    cache = LayerCache(xp, ExactPlan.of(shape).make_codec(xp, 0), 2, 5)
    cache.start(2, padding)
    rng = np.random.default_rng(0)
    sinks = rng.standard_normal(Q_HEADS).astype(np.float32) + 2
    pieces = (40, 20, 1, 1, 7)
    q, k, v = (rng.standard_normal((2, heads, sum(pieces), DIM)).astype(np.float32) for heads in (Q_HEADS, 2, 2))

    def fused(*arrays):  # of the host, which knows them
        *given, scale = arrays
        assert scale == SCALE
        return xp.asarray(naive(*map(xp.to_numpy, given), sinks).astype(np.float32))

    done = 0
    for count in pieces:
        here = slice(done, done + count)
        got = cache.attend(
            *(xp.asarray(x[:, :, here]) for x in (q, k, v)), SCALE, fused, 0, xp.asarray(sinks.astype(np.float32))
        )
        for row, pad in enumerate(padding or [0, 0]):
            first, own = max(pad, done), [x[row : row + 1, :, pad : done + count] for x in (k, v)]
            expected = naive(q[row : row + 1, :, first : done + count], *own, sinks)
            np.testing.assert_allclose(
                xp.to_numpy(got)[row : row + 1, :, first - done :], expected, atol=2e-5, rtol=2e-4
            )
        done += count
    assert all(group.sealed for group in cache.padding_groups)

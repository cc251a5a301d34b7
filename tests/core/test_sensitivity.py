"""Gradients without a backward pass, against autograd."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_close

from spectral_kv_core.calibration.local_gradients import local_gradients


class FixedProbe:
    """In place of a generator: the same probe at every call."""

    def __init__(self, probe):
        self.probe = probe

    def standard_normal(self, shape, dtype):
        assert shape == self.probe.shape and dtype == np.float32
        return self.probe


@pytest.mark.parametrize("q_heads, kv_heads, tokens, length", [(1, 1, 9, 1), (6, 2, 40, 7), (4, 4, 33, 32)])
def test_local_gradients_are_those_of_autograd(q_heads, kv_heads, tokens, length):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    dim, group = 8, q_heads // kv_heads
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((q_heads, length, dim), (kv_heads, tokens, dim), (kv_heads, tokens, dim))
    )
    keys, values = (torch.tensor(x, requires_grad=True) for x in (k, v))
    mask = torch.ones(length, tokens, dtype=torch.bool).tril(tokens - length)
    output = torch.nn.functional.scaled_dot_product_attention(
        torch.tensor(q)[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        attn_mask=mask,
        scale=1.0,
    )[0]
    probe = rng.standard_normal((kv_heads, group * length, dim)).astype(np.float32)
    scaled = torch.tensor(probe).reshape(output.shape) / output.detach().pow(2).mean().sqrt()
    (output * scaled).sum().backward()
    got = local_gradients(q, k, v, 2, FixedProbe(probe))
    for name, mine, leaf in zip(("keys", "values"), got, (keys, values)):
        assert mine.shape == (2, kv_heads, tokens - length, dim)
        assert_close(name, mine[0], leaf.grad[:, : tokens - length].numpy())
        np.testing.assert_array_equal(mine[0], mine[1])

"""Rotary embedding: its inverse, and the hosts' own implementations."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import HOST_ROPE, assert_close

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import (
    Rope,
    mean_rotation,
    pair_lengths,
    rotate,
    rotate_at,
    shift,
    unrotate,
    unrotate_at,
)


def frequencies(dim: int, base: float = 10000.0) -> tuple[float, ...]:
    return tuple(base ** (-np.arange(0, dim, 2) / dim))


ROPES = {
    "half": Rope(frequencies(64)),
    "interleaved": Rope(frequencies(64), interleaved=True),
    "partial": Rope(frequencies(32)),
    "partial interleaved": Rope(frequencies(16), interleaved=True),
    "scaled": Rope(frequencies(64), scaling=1.2),
}
every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())


def vectors(tokens: int = 63, dim: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, tokens, dim)).astype(np.float32)


@every_rope
@pytest.mark.parametrize("start", [0, 5, 100_000])
def test_unrotate_inverts_rotate(xp, rope, start):
    x = vectors()
    turned = rotate(xp, xp.asarray(x), rope, start)
    assert_close("round trip", xp.to_numpy(unrotate(xp, turned, rope, start)), x)
    np.testing.assert_array_equal(xp.to_numpy(turned)[..., rope.rotary_dim :], x[..., rope.rotary_dim :])
    assert_close("norm", np.linalg.norm(xp.to_numpy(turned)[..., : rope.rotary_dim], axis=-1),
                 rope.scaling * np.linalg.norm(x[..., : rope.rotary_dim], axis=-1))  # fmt: skip


@every_rope
def test_rotation_is_complex_multiplication(xp, rope):
    x, start = vectors(), 17
    half = rope.rotary_dim // 2
    part = x[..., : rope.rotary_dim].astype(np.float64)
    real, imaginary = (part[..., 0::2], part[..., 1::2]) if rope.interleaved else (part[..., :half], part[..., half:])
    angle = (start + np.arange(63))[:, None] * np.array(rope.inv_freq)
    z = (real + 1j * imaginary) * np.exp(1j * angle) * rope.scaling
    expected = np.stack([z.real, z.imag], -1).reshape(part.shape) if rope.interleaved else np.concatenate(
        [z.real, z.imag], -1)  # fmt: skip
    got = xp.to_numpy(rotate(xp, xp.asarray(x), rope, start))
    assert_close("rotated", got[..., : rope.rotary_dim], expected)


@every_rope
def test_start_continues_a_sequence(xp, rope):
    x = vectors()
    whole = xp.to_numpy(rotate(xp, xp.asarray(x), rope, 3))
    tail = xp.to_numpy(rotate(xp, xp.asarray(x[:, :, 20:]), rope, 23))
    np.testing.assert_array_equal(whole[:, :, 20:], tail)


def test_result_is_float32(xp):
    x = xp.astype(xp.asarray(vectors()), xp.float16)
    assert rotate(xp, x, ROPES["half"], 0).dtype == xp.float32


def test_llama_rotates_alike():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, rope, start = vectors(), ROPES["half"], 1000
    angle = torch.arange(start, start + 63).float()[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float32)
    angle = torch.cat([angle, angle], -1)[None]
    expected, _ = llama.apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), angle.cos(), angle.sin())
    from spectral_kv_torch import ops

    assert_close("keys", ops.to_numpy(rotate(ops, torch.from_numpy(x), rope, start)), expected, limit=HOST_ROPE)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [32, 64])
def test_mlx_rotates_alike(traditional, dims):
    mx = pytest.importorskip("mlx.core")
    from spectral_kv_core.arrays import ops

    x, start = vectors(), 1000
    expected = mx.fast.rope(mx.array(x), dims, traditional=traditional, base=10000.0, scale=1.0, offset=start)
    got = rotate(ops, x, Rope(frequencies(dims), interleaved=traditional), start)
    assert_close("keys", got, np.array(expected), limit=HOST_ROPE)


def test_matches_and_json():
    rope = ROPES["scaled"]
    assert Rope.from_json(rope.to_json()) == rope
    in_float32 = Rope(tuple(float(np.float32(f)) for f in rope.inv_freq), rope.interleaved, rope.scaling)
    assert rope.matches(in_float32)
    others = [Rope(frequencies(64)), Rope(frequencies(64, 5e5), scaling=1.2), Rope(frequencies(32), scaling=1.2),
              Rope(frequencies(64), True, 1.2)]  # fmt: skip
    assert not any(rope.matches(other) for other in others)


def test_shift_moves_rotated_vectors_on():
    rope = Rope(tuple(100.0 ** (-np.arange(0, 8, 2) / 8)), interleaved=True, scaling=1.5)
    x = np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
    moved = shift(ops, rotate(ops, x, rope, 3), rope, 70)
    np.testing.assert_allclose(moved, rotate(ops, x, rope, 73), atol=1e-5)


@every_rope
def test_a_row_of_positions_is_a_start(xp, rope):
    """Bit by bit: what a cache stores must not depend on which of the two is called."""
    x = xp.asarray(vectors())
    for start in (0, 5, 100_000):
        expected = xp.to_numpy(rotate(xp, x, rope, start))
        np.testing.assert_array_equal(xp.to_numpy(rotate_at(xp, x, rope, start + np.arange(63))), expected)
        each = np.broadcast_to(start + np.arange(63), (2, 3, 63))
        np.testing.assert_array_equal(xp.to_numpy(rotate_at(xp, x, rope, each)), expected)


@every_rope
def test_every_head_has_its_own_positions(xp, rope):
    rng = np.random.default_rng(0)
    positions = np.sort(rng.integers(0, 200_000, (2, 3, 63)), axis=-1)  # with gaps, and a few twice
    x = vectors()
    expected = np.empty_like(x)
    for index in np.ndindex(positions.shape):
        expected[index] = rotate(ops, x[index][None], rope, int(positions[index]))[0]
    turned = rotate_at(xp, xp.asarray(x), rope, positions)
    assert_close("rotated", xp.to_numpy(turned), expected)
    assert_close("round trip", xp.to_numpy(unrotate_at(xp, turned, rope, positions)), x)


@every_rope
def test_mean_rotation_is_the_mean_of_rotations(rope):
    x, places = vectors(5), np.array([3, 17, 18, 4000])
    expected = np.mean([[rotate(ops, x[:, :, [t]], rope, int(p))[:, :, 0] for t in range(5)] for p in places], axis=0)
    got = np.moveaxis(mean_rotation(x, rope, places), 2, 0)
    assert_close("rotated channels", got[..., : rope.rotary_dim] * rope.scaling, expected[..., : rope.rotary_dim])
    assert_close("other channels", got[..., rope.rotary_dim :], expected[..., rope.rotary_dim :])
    assert_close("one position", mean_rotation(x, None, places), x)


@every_rope
def test_no_rotation_changes_the_length_of_a_pair(xp, rope):
    x = xp.asarray(vectors())
    before = xp.to_numpy(pair_lengths(xp, x, rope))
    assert before.shape[-1] == rope.rotary_dim // 2
    after = xp.to_numpy(pair_lengths(xp, rotate(xp, x, rope, 9), rope))
    assert_close("lengths", after, before * rope.scaling)
    assert_close("sum", np.square(before).sum(-1), np.square(vectors()[..., : rope.rotary_dim]).sum(-1))


def test_empty_positions(xp):
    assert rotate_at(xp, xp.zeros((2, 3, 0, 64)), ROPES["half"], np.zeros((2, 3, 0), int)).shape == (2, 3, 0, 64)

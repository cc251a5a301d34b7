"""Rotary position embedding, applied and undone; its numbers are read from the host's model, never defaulted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import ops


@dataclass(frozen=True)
class Rope:
    """Su et al. 2021 (arXiv 2104.09864), eq. 34, with whatever scaling the model's frequencies already contain.

    inv_freq: radians per token of every rotated pair, [rotary_dim / 2].
    interleaved: pairs are (2i, 2i + 1) as in GPT-J ("traditional" in MLX), else (i, i + rotary_dim / 2).
    scaling: factor on rotated vectors (the `attention_scaling` of yarn and longrope), 1 for plain RoPE.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False
    scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Channels that are rotated; the others pass through unchanged."""
        return 2 * len(self.inv_freq)

    def matches(self, other: Rope) -> bool:
        """Whether two models rotate alike, to the precision that hosts store frequencies in."""
        return (
            self.rotary_dim == other.rotary_dim
            and self.interleaved == other.interleaved
            and np.allclose(self.inv_freq, other.inv_freq, rtol=1e-3, atol=0)
            and abs(self.scaling - other.scaling) < 1e-3
        )

    def to_json(self) -> dict:
        return {"inv_freq": list(self.inv_freq), "interleaved": self.interleaved, "scaling": self.scaling}

    @classmethod
    def from_json(cls, fields: dict) -> Rope:
        return cls(tuple(fields["inv_freq"]), bool(fields["interleaved"]), float(fields["scaling"]))


def pair_slices(rope: Rope) -> tuple[slice, slice]:
    """Where the first and the second channels of all rotated pairs stand among the channels of a head."""
    if rope.interleaved:
        return slice(0, rope.rotary_dim, 2), slice(1, rope.rotary_dim, 2)
    return slice(0, rope.rotary_dim // 2), slice(rope.rotary_dim // 2, rope.rotary_dim)


def pair_indices(rope: Rope) -> tuple[np.ndarray, np.ndarray]:
    """As `pair_slices`, as numbers of channels [rotary_dim / 2]: for rows and columns of a matrix at once."""
    first, second = pair_slices(rope)
    return np.arange(rope.rotary_dim)[first], np.arange(rope.rotary_dim)[second]


def rotate(xp, x, rope: Rope, start, inverse: bool = False):
    """Rotate `x` [..., T, D], whose tokens stand at positions `start`, `start` + 1, ...; float32 result.

    `start` may be an integer array of `xp`, the position of every token, that broadcasts to [..., T].
    """
    if xp.kernels and (out := xp.kernels.rotate(x, rope, start, inverse)) is not None:
        return out
    if not getattr(start, "ndim", 0):
        return rotate_at(xp, x, rope, np.arange(start, start + x.shape[-2]), inverse)
    return rotate_at(xp, x, rope, xp.to_numpy(start), inverse)


def unrotate(xp, x, rope: Rope, start):
    """Inverse of `rotate`: post-RoPE vectors back to pre-RoPE ones."""
    return rotate(xp, x, rope, start, inverse=True)


def rotate_at(xp, x, rope: Rope, positions: np.ndarray, inverse: bool = False):
    """`rotate` for tokens at any `positions`, NumPy integers [T] or as many axes as `x` has but the last.

    What is left after eviction has gaps, and other ones in every head. Angles are computed in float64 on the host, once
    for every position that occurs, and looked up on the device.
    """
    places, index = positions, None
    if positions.ndim > 1:
        places, index = np.unique(positions, return_inverse=True)
    angle = places.astype(np.float64)[:, None] * np.array(rope.inv_freq)
    sign, factor = (-1.0, 1.0 / rope.scaling) if inverse else (1.0, rope.scaling)
    cos = xp.asarray((np.cos(angle) * factor).astype(np.float32), like=x)
    sin = xp.asarray((np.sin(angle) * factor * sign).astype(np.float32), like=x)
    if index is not None:
        index = xp.asarray(index.reshape(-1).astype(np.int32), like=x)
        cos, sin = (xp.take(table, index, axis=0).reshape(*positions.shape, len(rope.inv_freq)) for table in (cos, sin))
    return _turn(xp, x, rope, cos, sin)


def unrotate_at(xp, x, rope: Rope, positions: np.ndarray):
    """Inverse of `rotate_at`."""
    return rotate_at(xp, x, rope, positions, inverse=True)


def mean_rotation(x: np.ndarray, rope: Rope | None, positions: np.ndarray) -> np.ndarray:
    """Mean over `positions` [P] of what `x` [..., D] becomes there, float32; `scaling` left out. NumPy."""
    if rope is None:
        return np.asarray(x, np.float32)
    angle = np.asarray(positions, np.float64)[:, None] * np.array(rope.inv_freq)
    return _turn(ops, x, rope, *(f(angle).mean(0).astype(np.float32) for f in (np.cos, np.sin)))


def shift(xp, x, rope: Rope, tokens: int):
    """Post-RoPE vectors `x` [..., D] as they would be `tokens` positions later; float32 result."""
    angle = tokens * np.array(rope.inv_freq)
    cos, sin = (xp.asarray(f(angle).astype(np.float32), like=x) for f in (np.cos, np.sin))
    return _turn(xp, x, rope, cos, sin)


def _turn(xp, x, rope: Rope, cos, sin):
    """Every rotated pair of `x` [..., D] turned by an angle whose `cos` and `sin` end in [rotary_dim / 2]."""
    x = xp.astype(x, xp.float32)
    first, second = (x[..., place] for place in pair_slices(rope))
    turned, rest = [first * cos - second * sin, second * cos + first * sin], x[..., rope.rotary_dim :]
    if rope.interleaved:
        out = xp.stack(turned, axis=-1).reshape(*x.shape[:-1], rope.rotary_dim)
    else:
        out = xp.concat(turned, axis=-1)
    return xp.concat([out, rest], axis=-1) if rest.shape[-1] else out


def pair_lengths(xp, x, rope: Rope):
    """Length of every rotated pair of `x` [..., D] -> [..., rotary_dim / 2]; no rotation changes it, `scaling` does."""
    first, second = (xp.square(x[..., place]) for place in pair_slices(rope))
    return xp.sqrt(first + second)

"""The rotation that a model gives its keys, found from keys of the same tokens at other positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from . import ops
from .rope import Rope, pair_slices, shift

SHIFTS = (1, 8, 64, 509)  # tokens: every angle tells which turn of the next one is meant
NEAR = 0.2  # of the next best a rotation may miss where keys are known to few digits
FAR = 0.1  # share of a key's length that float32 loses far behind the first token, with room
CLOSE = 1e-3  # share of a key's length by which a rotation may miss it in float32


def fit_rope(
    keys: np.ndarray, shifted: Mapping[int, np.ndarray], known: Sequence[Rope] = (), close: float = CLOSE
) -> tuple[Rope | None, bool]:
    """How `keys` [..., T, D] turn into `shifted`, the keys of the same tokens so many positions later.

    known: rotations that a model holds numbers of, which are more precise than what is found here. Returns the rotation,
    None for keys that stay as they are, and whether it explains the keys: to the share `close` of their length, or far better
    than the next one of `known`.
    """
    own = [None, *(rope for rope in known if rope.rotary_dim <= keys.shape[-1])]
    errors = [_error(keys, shifted, rope) for rope in own]
    best = int(np.argmin(errors))
    if errors[best] < close:
        return own[best], True
    for rotary_dim in _rotary_dims(keys.shape[-1]):
        for interleaved in (False, True):
            rope = Rope(_frequencies(keys, shifted, rotary_dim, interleaved), interleaved)
            if _error(keys, shifted, rope) < close:
                return rope, True
    others = (error for error, rope in zip(errors, own) if not _alike(rope, own[best]))
    if errors[best] < NEAR * min(others, default=0.0):
        return own[best], True
    return None, False


def is_rotated_by(rope: Rope, keys: np.ndarray, shifted: Mapping[int, np.ndarray]) -> bool:
    """Whether `rope` turns `keys` into `shifted`, at positions so large that angles have few digits."""
    return _error(keys, shifted, rope) < FAR


def _alike(rope: Rope | None, other: Rope | None) -> bool:
    return rope is other or (rope is not None and other is not None and rope.matches(other))


def _rotary_dims(head_dim: int) -> list[int]:
    """Even numbers of channels that models rotate: eighths of a head."""
    return sorted({head_dim * share // 16 * 2 for share in range(1, 9)} - {0})


def _error(keys: np.ndarray, shifted: Mapping[int, np.ndarray], rope: Rope | None) -> float:
    """Largest share of the keys' length that `rope` misses at any of the shifts; 0 for keys without length."""
    errors = []
    for tokens, expected in shifted.items():
        got = keys if rope is None else shift(ops, keys, rope, tokens)
        errors.append(float(np.linalg.norm(got - expected)) / max(float(np.linalg.norm(expected)), 1e-30))
    return max(errors, default=0.0)


def _frequencies(
    keys: np.ndarray, shifted: Mapping[int, np.ndarray], rotary_dim: int, interleaved: bool
) -> tuple[float, ...]:
    """Radians per token [rotary_dim / 2] of every pair, by least squares: the widest shift gives the most digits."""
    pairs = Rope((0.0,) * (rotary_dim // 2), interleaved)
    before, frequencies = _complex(keys, pairs), np.zeros(rotary_dim // 2)
    for tokens in sorted(shifted):
        angle = np.angle((_complex(shifted[tokens], pairs) * before.conj()).sum(0))
        turns = np.round((frequencies * tokens - angle) / (2 * np.pi))
        frequencies = (angle + 2 * np.pi * turns) / tokens
    return tuple(float(w) for w in frequencies)


def _complex(x: np.ndarray, rope: Rope) -> np.ndarray:
    """The pairs of `x` [..., D] as complex numbers [N, rotary_dim / 2]."""
    first, second = (np.asarray(x[..., place], np.float64) for place in pair_slices(rope))
    return (first + 1j * second).reshape(-1, len(rope.inv_freq))

"""Second moments that a profile implies: of a layer's keys before RoPE and values, and of its queries. All NumPy."""

from __future__ import annotations

import numpy as np

from ..arrays.basis import orthonormalize
from ..arrays.rope import Rope, pair_indices
from ..errors import UsageError
from .profile import Profile

SHARED = "layer.pre"  # full-rank PCA of all keys and values of a layer: their covariance in another form


def covariance(profile: Profile, layer_group: int, first: int, stop: int) -> np.ndarray:
    """Covariance [n D, n D] float64 of members `first` to `stop` of `layer_group`: keys of all heads, then values.

    The profile has W (x - mean) = U y with y uncorrelated: the covariance of x is W^-1 U diag(var y) U' W^-1.
    """
    basis_set = profile.basis_set(SHARED)
    dim = profile.shape.head_dim
    weight = np.repeat(basis_set.weight[layer_group, 0, first:stop].astype(np.float64), dim)[:, None]
    half = orthonormalize(basis_set.basis[layer_group, 0])[first * dim : stop * dim] / weight
    half = half * np.sqrt(basis_set.channel_variance()[layer_group, 0])
    return half @ half.T


def means(profile: Profile, layer_group: int) -> np.ndarray:
    """Means [2H, D] float64 of keys before RoPE, then of values, of `layer_group`."""
    return profile.basis_set(SHARED).mean[layer_group, 0].reshape(-1, profile.shape.head_dim).astype(np.float64)


def head_moments(profile: Profile, layer_group: int) -> np.ndarray:
    """Uncentered second moments [2H, D, D] float64 of keys before RoPE, then of values, of `layer_group`."""
    mean = means(profile, layer_group)
    blocks = np.stack([covariance(profile, layer_group, i, i + 1) for i in range(len(mean))])
    return blocks + mean[:, :, None] * mean[:, None, :]


def query_moment(profile: Profile, layer_group: int) -> np.ndarray:
    """Uncentered second moment [H, D, D] float64 of queries before RoPE, times the squared attention scale.

    Mean over the query heads of a KV head. Raises UsageError for a profile without query statistics.
    """
    if profile.queries is None:
        raise UsageError(
            f"Expected a profile with statistics of queries, {profile.path or 'this one'} is older. Calibrate again: "
            f"spectralkv profile --model {profile.model}"
        )
    root, mean = (np.asarray(x[layer_group], np.float64) for x in (profile.queries.root, profile.queries.mean))
    mean = mean.reshape(len(root), -1, root.shape[-1])
    return root @ root + np.swapaxes(mean, -1, -2) @ mean / mean.shape[1]


def rotated_energy(moment: np.ndarray, rope: Rope | None, positions: int) -> np.ndarray:
    """Mean square [..., D] of channels after RoPE, over `positions` tokens from 0 on, for a `moment` [..., D, D] before."""
    energy = np.diagonal(moment, axis1=-2, axis2=-1).copy()
    if rope is None:
        return energy
    angle = np.arange(positions)[:, None] * np.array(rope.inv_freq)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = pair_indices(rope)
    a, b, cross = energy[..., first], energy[..., second], moment[..., first, second]
    cos2, sin2, both = (cos * cos).mean(0), (sin * sin).mean(0), (cos * sin).mean(0)
    energy[..., first] = cos2 * a + sin2 * b - 2 * both * cross
    energy[..., second] = sin2 * a + cos2 * b + 2 * both * cross
    return energy

"""Eigen Attention (Saxena et al. 2024, arXiv 2408.05646): keys and values of low rank, nothing quantized.

Section 3: per KV head, keys before RoPE in the leading directions of keys and queries stacked, values in their own;
neither is centered; keys are expanded and rotated to attend. A rank is that of the head of its layer that needs most for a
share of the sum of singular values. Departures: keys and queries weigh alike in their common basis, since the profile has the
attention scale in its queries; one share for all layers, from the bits, in place of an error budget per layer; latents are
float16, and stay beside the model instead of being folded into its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..arrays.basis import fit_basis
from ..arrays.rope import rotate, unrotate
from ..planning.methods import Method
from ..planning.plan import needed
from ..profile.derived import head_moments, query_moment
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from .base import ArrayCodec, ArrayPlan, ranks_within


class EigenCodec(ArrayCodec):
    """Latents of keys and of values, [B, H, T, R] float16."""

    def __init__(self, xp, plan: EigenPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        bases = np.split(_bases(needed(plan.profile), layer_group)[0], 2)
        self.bases = [self.table(u[..., :r]) for u, r in zip(bases, plan.ranks[layer_group].tolist())]  # [H, D, R]

    def store(self, keys, values, start: int) -> tuple:
        xp = self.xp
        keys = unrotate(xp, keys, self.rope, start) if self.rope else keys
        return tuple(xp.astype(xp.matmul(x, basis), xp.float16) for x, basis in zip((keys, values), self.bases))

    def decode(self, chunk) -> tuple:
        xp = self.xp
        keys, values = (
            xp.matmul(xp.astype(z, xp.float32), xp.permute_dims(basis, (0, 2, 1)))
            for z, basis in zip(chunk.arrays, self.bases)
        )
        return rotate(xp, keys, self.rope, chunk.start) if self.rope else keys, values


@dataclass(frozen=True, eq=False)
class EigenPlan(ArrayPlan):
    """ranks [L, 2]: of keys and of values in every layer."""

    ranks: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), int))
    CODEC = EigenCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 9.6  # 60 % of the cache, as the paper reaches

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return 16 / shape.head_dim, 16.0

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> EigenPlan:
        cls.check_bits(shape, method, bits)
        variance = np.stack(
            [_bases(needed(profile), layer_group)[1] for layer_group in range(len(shape.layers))]
        )  # [L, 2H, D]
        singular = np.sqrt(variance).reshape(len(variance), 2, -1, shape.head_dim)
        ranks = ranks_within(singular, bits / 16 * shape.head_dim, range(1, shape.head_dim + 1))
        return cls(method, bits, shape, profile=profile, ranks=ranks)

    def decides(self) -> dict:
        basis_set, queries = self.read_set, needed(needed(self.profile).queries)
        return {
            "ranks": self.ranks,
            **{name: getattr(basis_set, name) for name in ("mean", "weight", "basis", "variance")},
            "query_mean": queries.mean,
            "query_root": queries.root,
        }

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        return [((batch, self.shape.kv_heads, tokens, rank), "float16") for rank in self.ranks[layer_group].tolist()]


def _bases(profile: Profile, layer_group: int) -> tuple[np.ndarray, np.ndarray]:
    """Bases [2H, D, D] of keys with queries, then of values, and the squares of their singular values [2H, D]."""
    moments = head_moments(profile, layer_group)
    keys, values = np.split(moments, 2)
    shared = sum(m / np.trace(m, axis1=-2, axis2=-1)[:, None, None] for m in (keys, query_moment(profile, layer_group)))
    return fit_basis(np.concatenate([shared, values]))

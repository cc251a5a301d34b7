"""JarvisKV: SVD latents per head after RoPE, rotated, in b-bit codes with a sign bit for the residual.

No paper was found under this name: derived from the description in the package spectral-kv 1.0 ("rotation + b-bit + sign
correction"). y = rotation of U'(x - mean); scale s = max|y| / (2^(b-1) - 1/2), code round(y / s); one more bit per
coordinate is the sign of what is left, all of one vector moved by its mean magnitude: b + 1 bits and two float16.
The rank of a layer's keys or values is that of its most demanding head for a share of the energy (squared singular
values), one share for the model; the share and b follow from the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..arrays.basis import orthonormalize
from ..arrays.hadamard import random_rotation
from ..planning.methods import Method
from ..planning.plan import read_set
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from .base import ArrayPlan, LatentCodec, pack_tokens, ranks_within, unpack_tokens

CODE_BITS = (2, 3, 4, 5, 6, 7)  # without the sign bit
RANK_STEP = 8  # ranks are multiples of this: the rotation has a Hadamard matrix of at least so many rows


class JarvisCodec(LatentCodec):
    """Per side: codes [B, H, T / 8, R, b], signs [B, H, T / 8, R, 1], scales and magnitudes [B, H, T] float16."""

    def __init__(self, xp, plan: JarvisPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self.bits = plan.code_bits
        basis_set = plan.read_set
        basis = orthonormalize(basis_set.basis[layer_group])
        bases = np.split(basis, 2)
        self.set_bases(
            [u[..., :r] @ random_rotation(r) for u, r in zip(bases, plan.ranks[layer_group].tolist())],
            np.split(basis_set.mean[layer_group], 2),
        )

    def store(self, keys, values, start: int) -> tuple:
        xp, half, arrays = self.xp, 2 ** (self.bits - 1), []
        for y in self.project(keys, values):
            peak = xp.max(xp.maximum(y, -y), axis=-1, keepdims=True)
            scale = xp.astype(xp.maximum(peak / (half - 0.5), 1e-6), xp.float16)  # the floor guards a vector of zeros
            step = xp.astype(scale, xp.float32)
            codes = xp.clip(xp.round(y / step), -half, half - 1)
            left = y - codes * step
            magnitude = xp.astype(xp.mean(xp.maximum(left, -left), axis=-1), xp.float16)
            signs = xp.astype(left >= 0, xp.uint8)
            codes = xp.astype(codes + half, xp.uint8)
            arrays += [pack_tokens(xp, codes, self.bits), pack_tokens(xp, signs, 1), scale[..., 0], magnitude]
        return tuple(arrays)

    def latents(self, chunk) -> tuple:
        xp, half, sides = self.xp, 2 ** (self.bits - 1), []
        for codes, signs, scale, magnitude in (chunk.arrays[:4], chunk.arrays[4:]):
            codes = xp.astype(unpack_tokens(xp, codes, self.bits), xp.float32) - half
            signs = xp.astype(unpack_tokens(xp, signs, 1), xp.float32) * 2 - 1
            scale, magnitude = (xp.astype(x, xp.float32)[..., None] for x in (scale, magnitude))
            sides.append(codes * scale + signs * magnitude)
        return tuple(sides)


@dataclass(frozen=True, eq=False)
class JarvisPlan(ArrayPlan):
    """ranks [L, 2]: of keys and of values in every layer; code_bits: b."""

    ranks: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), int))
    code_bits: int = 0
    CODEC = JarvisCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 4.0

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        dim = shape.head_dim
        low, high = (r * (b + 1) / dim for r, b in ((_ranks(dim)[0], CODE_BITS[0]), (dim, CODE_BITS[-1])))
        return low + 32 / dim, high + 32 / dim

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> JarvisPlan:
        cls.check_bits(shape, method, bits)
        variance = read_set(profile, method).channel_variance()
        variance = variance.reshape(len(variance), 2, -1, shape.head_dim)  # [L, 2, H, D]
        plans = []
        for b in CODE_BITS:
            budget = (bits - 32 / shape.head_dim) * shape.head_dim / (b + 1)  # mean rank
            if budget >= _ranks(shape.head_dim)[0]:
                ranks = ranks_within(variance, budget, _ranks(shape.head_dim))
                plans.append((_distortion(variance, ranks, b), b, ranks))
        _, b, ranks = min(plans, key=lambda plan: plan[:2])
        return cls(method, bits, shape, profile=profile, ranks=ranks, code_bits=b)

    def decides(self) -> dict:
        basis_set = self.read_set
        return {"code_bits": self.code_bits, "ranks": self.ranks, "mean": basis_set.mean, "basis": basis_set.basis}

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        lead = batch, self.shape.kv_heads
        arrays: list[tuple] = []
        for rank in self.ranks[layer_group].tolist():
            arrays += [((*lead, tokens // 8, rank, b), "uint8") for b in (self.code_bits, 1)]
            arrays += 2 * [((*lead, tokens), "float16")]
        return arrays


def _ranks(dim: int) -> list[int]:
    return sorted({min(r, dim) for r in range(RANK_STEP, dim + RANK_STEP, RANK_STEP)})


def _distortion(variance: np.ndarray, ranks: np.ndarray, bits: int) -> float:
    """Expected squared error as a share of the energy, mean over all heads, to nine digits.

    What is cut off, and s^2 / 48 for every coordinate, their largest being about sqrt(2 ln R) standard deviations.
    """
    share = np.cumsum(variance, -1) / np.maximum(variance.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    kept = np.take_along_axis(share, (ranks - 1)[..., None, None], -1)[..., 0]  # [L, 2, H]
    noise = 2 * np.log(ranks)[..., None] / (48 * (2.0 ** (bits - 1) - 0.5) ** 2)
    return float(f"{np.mean(1 - kept + kept * noise):.9g}")

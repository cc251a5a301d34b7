"""SVDq (Hong et al. 2025, arXiv 2502.15304) in the basis of the prompt's own keys, for files.

Section 3, as in `svdq.py`, whose groups, codes and ranges these are: keys before RoPE, all heads of a layer together, less
their mean; the axes come from the SVD of the prompt itself, so no profile is needed. Mean and axes are stored with the codes
in float16 and counted: 8 R / T bits per element for R axes and T tokens. Departures: the bits include them, so the schedule
follows from the bits and the length of the prompt, that of least squared error if every group has half the energy of the one
before, as the groups of SmolLM2's keys about have; the rest as in `svdq.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..arrays.basis import fit_basis
from ..arrays.rope import rotate, unrotate
from ..planning.allocation import allocate_bits
from ..planning.methods import Method
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.quantizer import BIT_WIDTHS
from .base import FileCodec, PromptPlan
from .chunk import Chunk, check_finite
from .svdq import (
    GROUPS,
    SvdqPlan,
    check_groups,
    coded_channels,
    dequantize_groups,
    group_arrays,
    quantize_groups,
    width_errors,
)

ENERGY = 0.5  # of a group, relative to the one before


class SvdqPromptCodec(FileCodec):
    """Mean [B, 1, H D] and axes [B, R, H D] float16, `quantize_groups` of the latents, values [B, H, T, D] float16.

    A prompt is one chunk, which cannot grow.
    """

    chunk_tokens = 2**31

    def __init__(self, xp, plan: SvdqPromptPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self.block, self.budget = plan.method.block, plan.bits

    def store(self, keys, values, start: int) -> tuple:
        xp = self.xp
        keys = self.flatten(unrotate(xp, keys, self.rope, start) if self.rope else keys)
        check_finite(xp, keys)  # others may keep `eigh` from converging
        _, tokens, channels = keys.shape
        widths = schedule(self.budget, channels, tokens, self.block)
        mean, axes = (
            xp.astype(xp.asarray(np.ascontiguousarray(x, np.float32), like=keys), xp.float16)
            for x in principal_axes(xp.to_numpy(keys), coded_channels(widths, channels))
        )
        near = keys - xp.astype(mean, xp.float32)  # the latents have what rounding moves
        z = xp.matmul(near, xp.permute_dims(xp.astype(axes, xp.float32), (0, 2, 1)))
        return (mean, axes, *quantize_groups(xp, z, widths, self.block), xp.astype(values, xp.float16))

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`, a multiple of `block`, in the axes of all."""
        mean, axes, *grown = chunk.arrays
        cut = super().cut(replace(chunk, arrays=tuple(grown)), tokens)
        return replace(cut, arrays=(mean, axes, *cut.arrays))

    def decode(self, chunk: Chunk) -> tuple:
        xp, (mean, axes, *coded, values) = self.xp, chunk.arrays
        mean, axes, values = (xp.astype(x, xp.float32) for x in (mean, axes, values))
        keys = self.unflatten(xp.matmul(dequantize_groups(xp, coded, self.block), axes) + mean)
        return rotate(xp, keys, self.rope, chunk.start) if self.rope else keys, values


def principal_axes(x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [B, 1, p] and the `rank` leading right singular vectors [B, rank, p] of `x` [B, T, p] less it, float64."""
    x = np.asarray(x, np.float64)
    mean = x.mean(1, keepdims=True)
    x = x - mean
    axes, _ = fit_basis(np.swapaxes(x, -1, -2) @ x)
    return mean, np.swapaxes(axes, -1, -2)[:, :rank]


def schedule(bits: float, channels: int, tokens: int, block: int) -> tuple[int, ...]:
    """Widths of the 8 groups, falling, with which a prompt takes `bits` per element at most; at least one bit of one group.

    A channel takes codes, ranges and an axis; values and the mean are paid before.
    """
    rates = [width * tokens + 32 * tokens // block + 16 * channels if width else 0 for width in BIT_WIDTHS]
    budget = int(GROUPS * ((2 * bits - 16) * tokens - 16))
    cost = ENERGY ** np.arange(GROUPS)[:, None] * np.array(width_errors())
    choices = allocate_bits(cost, np.ones(GROUPS, int), budget, np.array(rates))
    widths = sorted((BIT_WIDTHS[i] for i in choices), reverse=True)
    return max(widths[0], 1), *widths[1:]


@dataclass(frozen=True, eq=False)
class SvdqPromptPlan(PromptPlan):
    """Widths follow from `bits` when the length of the prompt is known."""

    CODEC = SvdqPromptCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 10.0  # the 9.1 of svdq and five groups of axes, for five or six tokens per key channel

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        """A bit in one group of a prompt without end; all there is of a prompt of one block."""
        low, high = SvdqPlan.bits_range(shape, method)
        return low, high + 8 * (shape.kv_heads * shape.head_dim + 1) / method.block

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> SvdqPromptPlan:
        check_groups(shape)
        cls.check_bits(shape, method, bits)
        return cls(method, bits, shape)

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        heads, dim, block = self.shape.kv_heads, self.shape.head_dim, self.method.block
        widths = schedule(self.bits, heads * dim, tokens, block)
        axes = [((batch, n, heads * dim), "float16") for n in (1, coded_channels(widths, heads * dim))]
        return [
            *axes,
            *group_arrays(widths, heads * dim, batch, tokens, block),
            ((batch, heads, tokens, dim), "float16"),
        ]

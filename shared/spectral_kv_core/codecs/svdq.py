"""SVDq (Hong et al. 2025, arXiv 2502.15304): keys as SVD latents, whose channels get fewer bits as they fall in variance.

Section 3: keys before RoPE, all heads of a layer together, latents in 8 equal groups of falling singular value, one bit
schedule for the model, uniform asymmetric codes per channel, 0 bits drop a group; values are kept. Departures: the basis
is the profile's, not the prompt's; the schedule for a budget is that of least squared error on the profile's spectrum; a
channel's range is that of 128 tokens, which cost 0.25 bit; codes stand for the middle of their cell, without which one bit
would be worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..arrays.basis import fit_basis
from ..arrays.rope import rotate, unrotate
from ..errors import UsageError
from ..planning.allocation import allocate_bits
from ..planning.methods import Method
from ..planning.plan import needed
from ..profile.derived import covariance, means
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.quantizer import BIT_WIDTHS
from .base import ArrayCodec, ArrayPlan, pack_tokens, unpack_tokens

GROUPS = 8
REACH = 2.6  # standard deviations that the range of 128 tokens covers to either side


class SvdqCodec(ArrayCodec):
    """`quantize_groups` of the latents of keys, and values [B, H, T, D] float16."""

    def __init__(self, xp, plan: SvdqPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        self.block, self.widths = plan.method.block, plan.widths
        basis, _ = fit_basis(covariance(needed(plan.profile), layer_group, 0, self.kv_heads))
        self.basis = self.table(basis[:, : coded_channels(plan.widths, len(basis))])  # [H D, R]
        self.mean = self.table(means(needed(plan.profile), layer_group)[: self.kv_heads].reshape(-1))

    def store(self, keys, values, start: int) -> tuple:
        xp = self.xp
        keys = unrotate(xp, keys, self.rope, start) if self.rope else keys
        z = xp.matmul(self.flatten(keys) - self.mean, self.basis)
        return (*quantize_groups(xp, z, self.widths, self.block), xp.astype(values, xp.float16))

    def decode(self, chunk) -> tuple:
        xp, (*coded, values) = self.xp, chunk.arrays
        z = dequantize_groups(xp, coded, self.block)
        keys = self.unflatten(xp.matmul(z, xp.permute_dims(self.basis, (1, 0))) + self.mean)
        return rotate(xp, keys, self.rope, chunk.start) if self.rope else keys, xp.astype(values, xp.float32)


def quantize_groups(xp, z, widths: tuple[int, ...], block: int) -> tuple:
    """Codes [B, 1, T / 8, channels, bits] uint8 of every width, scales and minima [B, 1, T / block, R] float16.

    `z` [B, T, R] float32: latents of the groups that have bits in `widths`, which fall; T a multiple of `block`.
    """
    batch, tokens, rank = z.shape
    used = [b for b in widths if b]
    cells = np.repeat(2.0 ** np.array(used), rank // len(used))
    cells = xp.asarray(cells.astype(np.float32), like=z)  # [R]
    z = z.reshape(batch, 1, tokens // block, block, rank)
    low, high = xp.min(z, axis=3), xp.max(z, axis=3)
    scale = xp.astype(xp.maximum((high - low) / cells, 1e-6), xp.float16)  # the floor guards a constant channel
    low = xp.astype(low, xp.float16)
    step, bias = (xp.astype(x, xp.float32)[:, :, :, None] for x in (scale, low))
    codes = xp.clip((z - bias) / step, 0.0, 255.0)
    codes = xp.where(codes < cells - 1, codes, cells - 1)
    codes = xp.astype(codes, xp.uint8).reshape(batch, 1, tokens, rank)
    packed, done = [], 0
    for bits in _used(widths):
        count = rank // len(used) * widths.count(bits)
        packed.append(pack_tokens(xp, codes[..., done : done + count], bits))
        done += count
    return (*packed, scale, low)


def dequantize_groups(xp, arrays, block: int):
    """Middles of the cells [B, T, R] float32 that `quantize_groups` gave `arrays` for."""
    *packed, scale, low = arrays
    codes = xp.concat([unpack_tokens(xp, x, x.shape[-1]) for x in packed], axis=-1)  # [B, 1, T, R]
    batch, _, tokens, rank = codes.shape
    codes = xp.astype(codes, xp.float32).reshape(batch, 1, tokens // block, block, rank)
    step, bias = (xp.astype(x, xp.float32)[:, :, :, None] for x in (scale, low))
    return ((codes + 0.5) * step + bias).reshape(batch, tokens, rank)


def group_arrays(widths: tuple[int, ...], channels: int, batch: int, tokens: int, block: int) -> list[tuple]:
    """(shape, dtype name) of the arrays of `quantize_groups` for keys of `channels` channels."""
    per_group = channels // GROUPS
    codes = [((batch, 1, tokens // 8, per_group * widths.count(b), b), "uint8") for b in _used(widths)]
    return [*codes, *2 * [((batch, 1, tokens // block, coded_channels(widths, channels)), "float16")]]


def coded_channels(widths: tuple[int, ...], channels: int) -> int:
    """Latent channels, of `channels`, in groups that have bits."""
    return channels // GROUPS * sum(b > 0 for b in widths)


def check_groups(shape: ModelShape) -> None:
    """Raise UsageError unless the key channels of a layer fall into groups."""
    if shape.kv_heads * shape.head_dim % GROUPS:
        raise UsageError(
            f"Expected a number of key channels that {GROUPS} groups divide, received {shape.kv_heads} heads of "
            f"{shape.head_dim}. Use eigen-attention, which has no groups."
        )


@dataclass(frozen=True, eq=False)
class SvdqPlan(ArrayPlan):
    """widths: bits of the 8 groups of latent channels, falling."""

    widths: tuple[int, ...] = ()
    CODEC = SvdqCodec

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 9.1  # 2 bits for keys, as (8, 4, 2, 1, 1, 0, 0, 0) has

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return _bits((1,) + 7 * (0,), method), _bits(8 * (8,), method)

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> SvdqPlan:
        cls.check_bits(shape, method, bits)
        check_groups(shape)
        spectra = []
        for layer_group in range(len(shape.layers)):
            _, variance = fit_basis(covariance(needed(profile), layer_group, 0, shape.kv_heads))
            spectra.append(variance.reshape(GROUPS, -1).sum(-1) / variance.sum())
        cost = np.mean(spectra, axis=0)[:, None] * np.array(width_errors())
        cost = np.array([[float(f"{x:.9g}") for x in row] for row in cost])  # last bits differ between machines
        widths: tuple[int, ...] = ()
        for total in range(8 * GROUPS, 0, -1):
            chosen = allocate_bits(cost, np.ones(GROUPS, int), total)
            widths = tuple(sorted(chosen.tolist(), reverse=True))
            if _bits(widths, method) <= bits:
                break
        widths = (max(widths[0], 1), *widths[1:])  # the lowest bits of `range`
        return cls(method, bits, shape, profile=profile, widths=widths)

    def decides(self) -> dict:
        basis_set = self.read_set
        names = "mean", "weight", "basis", "variance"
        return {"widths": self.widths, **{name: getattr(basis_set, name) for name in names}}

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        coded = group_arrays(self.widths, heads * dim, batch, tokens, self.method.block)
        return [*coded, ((batch, heads, tokens, dim), "float16")]


def _used(widths: tuple[int, ...]) -> list[int]:
    return sorted({b for b in widths if b}, reverse=True)


def _bits(widths: tuple[int, ...], method: Method) -> float:
    """Stored bits per element of keys and values, values at 16."""
    keys = sum(b + (b > 0) * 32 / method.block for b in widths) / GROUPS
    return (16 + keys) / 2


@lru_cache(maxsize=1)
def width_errors() -> tuple[float, ...]:
    """Squared error on the standard normal density by width of `BIT_WIDTHS`, for a range of `REACH` to either side."""
    x = np.linspace(-6, 6, 4001)
    density = np.exp(-(x**2) / 2)
    errors = [1.0]
    for bits in BIT_WIDTHS[1:]:
        step = 2 * REACH / 2**bits
        decoded = (np.clip(np.floor((x + REACH) / step), 0, 2**bits - 1) + 0.5) * step - REACH
        errors.append(float(f"{((x - decoded) ** 2 * density).sum() / density.sum():.9g}"))
    return tuple(errors)

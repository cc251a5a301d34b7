"""KVTC (Staniszewski and Łańcucki 2025, arXiv 2511.01815): PCA over the whole model, groups of falling width, DEFLATE.

Section 3: keys with RoPE undone, all layers and heads joined, keys and values apart; principal components in order form
groups of 1, 16, 64, 256 or 1024, each with 8, 4, 2 or 0 bits that only fall, a scale and an offset of 16 bits per token and
group; everything is deflated. Departures: a group of one component is one float16; groups are found by dynamic programming
at one price per bit for the side's budget (the paper keeps a frontier); the error of a group is that of uniform steps over
the range that so many normal coefficients of the profile's held-out spectrum have, not measured again; the basis comes from a
bounded sample. The bits of a plan are those before DEFLATE; files are made as large as asked by planning more.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..arrays.basis import orthonormalize
from ..arrays.rope import rotate, unrotate
from ..errors import UsageError
from ..planning.methods import Method
from ..planning.plan import read_set
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.packing import UNIT, pack, unpack
from ..quantization.quantizer import dequantize_affine, quantize_affine
from .base import ArrayPlan, FileCodec
from .chunk import Chunk, check_finite

SIZES = {
    1: 0.0,
    16: 3.53,
    64: 4.68,
    256: 5.64,
    1024: 6.49,
}  # components of a group, and the range of so many normal numbers
WIDTHS = (8, 4, 2)
ROUNDS = 40  # of the search for the price of a bit


class KvtcCodec(FileCodec):
    """A chunk holds one array: the deflated bytes of, per side and run of like groups, codes, scales and offsets."""

    def __init__(self, xp, plan: KvtcPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        basis_set = plan.read_set
        self.runs = plan.runs
        basis = [u[:, : sum(s * n for s, _, n in runs)] for u, runs in zip(plan.axes, self.runs)]
        self.bases, self.means = [self.table(u) for u in basis], [self.table(m) for m in basis_set.mean[0]]

    def store(self, keys, values, start: int) -> tuple:
        xp = self.xp
        keys = unrotate(xp, keys, self.rope, start) if self.rope else keys
        parts = []
        for x, mean, basis, runs in zip((keys, values), self.means, self.bases, self.runs):
            z = xp.matmul(self.flatten(x) - mean, basis)
            check_finite(xp, z)
            done = 0
            for size, bits, count in runs:
                part, done = z[..., done : done + size * count], done + size * count
                if size == 1:
                    parts.append(xp.astype(part, xp.float16))
                    continue
                codes, scale, offset = quantize_affine(xp, part, bits, size)
                parts += [pack(xp, codes, bits), scale, offset]
        self._checked(*parts)
        data = zlib.compress(b"".join(np.ascontiguousarray(xp.to_file(x)[0]).tobytes() for x in parts), 9)
        return (xp.asarray(np.frombuffer(data, np.uint8), like=keys),)

    def decode(self, chunk: Chunk) -> tuple:
        """Keys and values [B, H, T, D] float32; raises UsageError for bytes that are not of this plan."""
        xp, lead = self.xp, (chunk.batch, chunk.tokens)
        tokens = chunk.batch * chunk.tokens
        most = tokens * sum(count * _group_nbytes(size, bits) for runs in self.runs for size, bits, count in runs)
        data, done, sides = _inflate(xp.to_numpy(chunk.arrays[0]).tobytes(), most), 0, []

        def array(shape, dtype):
            nonlocal done
            count = int(np.prod(shape))
            if done + count * np.dtype(dtype).itemsize > len(data):
                raise UsageError("Expected deflated bytes of this plan, received fewer. Make the file again.")
            x = np.frombuffer(data, dtype, count, done).reshape(shape)
            done += x.nbytes
            return xp.asarray(x, like=self.means[0])

        for mean, basis, runs in zip(self.means, self.bases, self.runs):
            parts = [xp.zeros((*lead, 0), dtype=xp.float32, like=mean)]
            for size, bits, count in runs:
                if size == 1:
                    parts.append(xp.astype(array((*lead, count), np.float16), xp.float32))
                    continue
                packed = array((*lead, size * count // UNIT, bits), np.uint8)
                scale, offset = (array((*lead, count), np.float16) for _ in range(2))
                parts.append(dequantize_affine(xp, unpack(xp, packed, bits, size * count), scale, offset))
            x = xp.matmul(xp.concat(parts, axis=-1), xp.permute_dims(basis, (1, 0))) + mean
            sides.append(self.unflatten(x))
        if done != len(data):
            raise UsageError("Expected deflated bytes of this plan, received more. Make the file again.")
        keys, values = sides
        return rotate(xp, keys, self.rope, chunk.start) if self.rope else keys, values


def _group_nbytes(size: int, bits: int) -> int:
    """Bytes of a token's group of `size` components before deflation, and one for what padding takes."""
    return 2 if size == 1 else size * bits // 8 + 5


def _inflate(data: bytes, most: int) -> bytes:
    """`data` inflated, of more than `most` bytes a part only: few bytes can stand for more than there is memory."""
    try:
        inflating = zlib.decompressobj()
        inflated = inflating.decompress(data, most + 1)
        if len(inflated) <= most and not inflating.eof:
            raise zlib.error("they end too early")
        return inflated
    except zlib.error as error:
        raise UsageError(f"Expected deflated bytes, cannot read them: {error}. Make the file again.") from None


@dataclass(frozen=True, eq=False)
class KvtcPlan(ArrayPlan):
    """runs: per side, (components of a group, bits, groups) in the order of the components; what follows is dropped."""

    runs: tuple[tuple[tuple[int, int, int], ...], ...] = ((), ())
    CODEC = KvtcCodec

    @cached_property
    def axes(self) -> list[np.ndarray]:
        """Bases [p, R] float32 of keys and of values, orthonormal again after the file's 8 bits."""
        return [orthonormalize(u).astype(np.float32) for u in self.read_set.basis[0]]

    @property
    def bits_per_element(self) -> float:
        """Before DEFLATE."""
        bits = sum(n * _cost(s, b) for runs in self.runs for s, b, n in runs)
        return bits / (2 * len(self.shape.layers) * self.shape.kv_heads * self.shape.head_dim)

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return 1.0

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return 0.02, 8.0

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> KvtcPlan:
        cls.check_bits(shape, method, bits)
        variance = read_set(profile, method).variance[0, :, :, 0].astype(np.float64)
        budget = bits * len(shape.layers) * shape.kv_heads * shape.head_dim
        runs = tuple(_runs(best_groups(v / v.sum(), budget)) for v in variance)
        return cls(method, bits, shape, profile=profile, runs=runs)

    def decides(self) -> dict:
        basis_set = self.read_set
        runs = {f"{side}_runs": np.array(runs) for side, runs in zip(("key", "value"), self.runs)}
        return runs | {"mean": basis_set.mean, "basis": basis_set.basis}

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        return [(None, "uint8")]


def best_groups(variance: np.ndarray, budget: float) -> list[tuple[int, int]]:
    """Groups (components, bits) from the first component on that minimize squared error within `budget` bits per token.

    `variance` [R] of the components, which fall. At every price of a bit the best groups are found by dynamic programming;
    the price is searched that uses the budget best. What it leaves takes further groups of the fewest bits, larger ones
    first.
    """
    tail = np.concatenate([np.cumsum(variance[::-1])[::-1], [0.0]])  # [R + 1]
    options = _options(tail)
    best: list[tuple[int, int]] = []
    low, high = -60.0, 0.0  # log2 of the price
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        groups = _groups_at(tail.tolist(), options, 2.0**middle)
        if sum(_cost(*group) for group in groups) <= budget:
            best, high = groups, middle
        else:
            low = middle
    used, left = sum(size for size, _ in best), budget - sum(_cost(*group) for group in best)
    for size in sorted(SIZES, reverse=True)[:-1]:  # one component alone would have the most bits
        while used + size <= len(variance) and _cost(size, WIDTHS[-1]) <= left:
            best, used, left = [*best, (size, WIDTHS[-1])], used + size, left - _cost(size, WIDTHS[-1])
    return best


def _options(tail: np.ndarray) -> list[tuple]:
    """Groups to choose from: components, bits, cost, and error from every start on; `tail` [R + 1]: energy from there."""
    options = []
    for size, reach in SIZES.items():
        for bits in WIDTHS if size > 1 else WIDTHS[:1]:
            starts = max(len(tail) - size, 0)
            energy = tail[:starts] - tail[size : size + starts]
            options.append((size, bits, _cost(size, bits), ((reach / (2**bits - 1)) ** 2 / 12 * energy).tolist()))
    return options


def _groups_at(tail: list[float], options: list[tuple], price: float) -> list[tuple[int, int]]:
    """Groups that minimize error + price * bits, widths never rising along the components."""
    rank = len(tail) - 1
    # per width allowed at most: (value, option taken) from every component on; the last entry drops everything
    value = {bits: [0.0] * (rank + 1) for bits in (*WIDTHS, 0)}
    taken: dict[int, list[tuple[int, int] | None]] = {bits: [None] * (rank + 1) for bits in (*WIDTHS, 0)}
    value[0] = tail
    for at in range(rank - 1, -1, -1):
        for below, allowed in pairwise((0, *WIDTHS[::-1])):
            least, choice = value[below][at], taken[below][at]
            for size, bits, cost, error in options:
                if bits == allowed and at + size <= rank:
                    total = error[at] + price * cost + value[bits][at + size]
                    if total < least:
                        least, choice = total, (size, bits)
            value[allowed][at], taken[allowed][at] = least, choice
    groups: list[tuple[int, int]] = []
    at, allowed = 0, WIDTHS[0]
    while at < rank and (choice := taken[allowed][at]) is not None:
        groups.append(choice)
        at, allowed = at + choice[0], choice[1]
    return groups


def _cost(size: int, bits: int) -> int:
    """Bits per token of a group: a float16 alone, or codes, scale and offset."""
    return 16 if size == 1 else size * bits + 32


def _runs(groups: list[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Like groups that follow each other as (components, bits, groups)."""
    runs: list[list[int]] = []
    for size, bits in groups:
        if runs and runs[-1][:2] == [size, bits]:
            runs[-1][2] += 1
        else:
            runs.append([size, bits, 1])
    return tuple((size, bits, count) for size, bits, count in runs)

"""The entropy-coded family: the coefficients of the live codecs, with uniform steps and an entropy coder, for files.

docs/decisions/rate-distortion-2.md, section 3. A chunk is one stream of bytes: it cannot be appended to, and it is
decoded as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..arrays.transform import band_sizes
from ..errors import UsageError
from ..planning.allocation import allocate_bits
from ..planning.budget import elements_per_token
from ..planning.loss import MEASURED_SHARE, coherent_cost, distortions, expansion
from ..planning.methods import Method
from ..planning.plan import needed
from ..profile.basis_set import HISTOGRAM_LIMIT, BasisSet
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.entropy import (
    StepTable,
    decode_streams,
    dequantize_steps,
    encode_streams,
    quantize_steps,
    step_tables,
)
from ..quantization.time_rounding import round_in_time
from .chunk import Chunk, check_finite
from .transform import TransformCodec, TransformPlan, by_frequency, deviations, kept_components

ENTROPY_BITS = (0.1, 7.0)  # the range of entropy-coded plans
DEFAULT_BITS = 1.0
RATE_UNIT = 2**-16  # of the rates of tables, in bits: sums of integers are the same on every machine
FIT_ROUNDS = 20  # at most, of the search for a plan whose files are as large as asked; two or three are usual
FIT_SLACK = 0.01  # share of the bits that may stay unused
FIT_STEP = 2**-12  # share of the bits, in planned ones, that makes no other plan


@dataclass(frozen=True, eq=False)
class EntropyCodedPlan(TransformPlan):
    """tables: the quantizers, from the one that drops a coefficient to the finest; choices [L, G, R, F] uint8: which of
    them a coefficient has."""

    tables: tuple[StepTable, ...] = ()
    choices: np.ndarray = None  # type: ignore[assignment]  # a field behind those with defaults

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        return DEFAULT_BITS

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        return ENTROPY_BITS

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> EntropyCodedPlan:
        """One Lagrangian over all coefficients and tables, with the rates that the tables have on calibration text."""
        cls.check_bits(shape, method, bits)
        basis_set = cls.fitting_basis_set(profile, method)
        if basis_set.histogram is None:
            known = needed(profile)
            raise UsageError(
                f"Expected a profile with the histogram that {method.name} codes by, {known.path or 'this one'} is older. "
                f"Calibrate again: spectralkv profile --model {known.model}"
            )
        tables = _step_tables(basis_set.histogram.tobytes())
        tables = tuple(replace(t, levels=(t.levels * expansion(t.mse)).astype(np.float32)) for t in tables)
        sizes, rates = band_sizes(basis_set.block), _table_rates(tables)
        budget = int(bits * elements_per_token(shape) * basis_set.block / RATE_UNIT)
        copies = np.broadcast_to(sizes, basis_set.variance.shape).reshape(-1)
        cost = (_table_costs(basis_set, tables) * sizes[:, None]).reshape(len(copies), -1)
        choices = allocate_bits(cost, copies, budget, rates)
        return cls(method, bits, shape, profile, basis_set, tables, choices.reshape(basis_set.variance.shape))

    @property
    def codec_class(self) -> type[EntropyCodec]:
        return EntropyCodec

    @property
    def coded(self) -> np.ndarray:
        return self.choices > 0

    @property
    def rates(self) -> np.ndarray:
        """Of entropy codes on calibration text, before time rounding."""
        return (_table_rates(self.tables) * RATE_UNIT)[self.choices]

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        return [(None, "uint8")]

    def decides(self) -> dict[str, Any]:
        arrays = super().decides() | {"choices": self.choices}
        for i, table in enumerate(self.tables):
            arrays[f"tables/{i}/levels"] = table.levels
            arrays[f"tables/{i}/steps"] = np.array([table.step, table.offset])
            arrays[f"tables/{i}/frequencies"] = table.frequencies
        return arrays


class StepRows:
    """The quantizers of coefficients that differ in their step, with the interface of `CoefficientTables`.

    `choices` [..., F, R]: which of the plan's tables every coefficient has.
    """

    def __init__(self, xp, plan: EntropyCodedPlan, choices: np.ndarray, like=None):
        def array(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        def chosen(name):
            return np.array([getattr(t, name) for t in plan.tables])[choices]

        self.xp = xp
        self.step, self.offset, self.limit = array(chosen("step")), array(chosen("offset")), array(chosen("limit"))
        starts = np.cumsum([0, *(len(t.levels) for t in plan.tables)])[:-1]
        self.start = array(starts[choices], np.int32)
        self.levels = array(np.concatenate([t.levels for t in plan.tables]))

    def quantize(self, z, f: int | None = None):
        """Codes int32 of `z` [..., F, R], or of [..., R] at frequency `f`."""
        return quantize_steps(self.xp, z, *(self._at(x, f) for x in (self.step, self.offset, self.limit)))

    def dequantize(self, codes, f: int | None = None):
        """Centroids float32 of `codes` [..., F, R], or of [..., R] at frequency `f`."""
        return dequantize_steps(self.xp, codes, self.levels, self._at(self.start, f))

    def arrays(self) -> list:
        return [self.step, self.offset, self.limit, self.start, self.levels]

    @staticmethod
    def _at(x, f: int | None):
        return x if f is None else x[..., f, :]


class EntropyCodec(TransformCodec):
    """Entropy-coded coefficients of one layer group. A chunk holds one array: uint8 [bytes] of `encode_streams`.

    Codes are ordered table by table, and in a table by sequence, (group, frequency, component) and block.
    """

    def __init__(self, xp, plan: EntropyCodedPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        kept = kept_components(plan.coded[layer_group])
        choices = by_frequency(plan.choices[layer_group], kept, self.block)
        self.quantizers = StepRows(xp, plan, choices[:, None], like)
        sigma = deviations(plan.basis_set, layer_group, kept)
        self.scale = xp.asarray(np.ascontiguousarray(sigma[..., None], np.float32), like=like)  # [G, F, R, 1]
        self.streams = plan.tables
        self.by_table = [np.flatnonzero(choices.reshape(-1) == i) for i in range(len(plan.tables))]

    def encode(self, keys, values, start: int) -> Chunk:
        """A chunk of T tokens, T a multiple of `block`; raises UsageError on NaN or infinity."""
        xp = self.xp
        z, weights = self.coefficients(keys, values, start)
        check_finite(xp, z)
        if weights is None:
            codes = self.quantizers.quantize(z)
        else:
            codes = round_in_time(xp, z, weights, self.gain, self.time, self.quantizers)
        batch, groups, n, block, rank = codes.shape
        codes = xp.permute_dims(codes, (0, 1, 3, 4, 2)).reshape(batch, groups * block * rank, n)
        codes = xp.to_numpy(codes)
        data = encode_streams([codes[:, chosen] for chosen in self.by_table], self.streams)
        return Chunk(batch, start, keys.shape[2], (xp.asarray(np.frombuffer(data, np.uint8), like=keys),))

    def decode(self, chunk: Chunk):
        """Keys and values [B, H, T, D] float32 of a chunk; keys are rotated as the model had them.

        Raises UsageError for bytes that are not of this plan.
        """
        xp, n = self.xp, chunk.tokens // self.block
        counts = [chunk.batch * len(chosen) * n for chosen in self.by_table]
        codes = np.zeros((chunk.batch, self.groups * self.block * self.rank, n), np.int32)
        data = xp.to_numpy(chunk.arrays[0]).tobytes()
        for chosen, stream in zip(self.by_table, decode_streams(data, counts, self.streams)):
            codes[:, chosen] = stream.reshape(chunk.batch, len(chosen), n)
        codes = codes.reshape(chunk.batch, self.groups, self.block, self.rank, n).transpose(0, 1, 4, 2, 3)
        z = self.quantizers.dequantize(xp.asarray(np.ascontiguousarray(codes), like=self.scale))
        return self.vectors(xp.permute_dims(z, (0, 1, 3, 4, 2)) * self.scale, chunk.start)


@lru_cache(maxsize=4)
def _step_tables(histogram: bytes) -> tuple[StepTable, ...]:
    return tuple(step_tables(np.frombuffer(histogram, np.int64), HISTOGRAM_LIMIT))


def _table_rates(tables: tuple[StepTable, ...]) -> np.ndarray:
    """Rates [tables] int64 in `RATE_UNIT`."""
    return np.array([round(t.rate / RATE_UNIT) for t in tables], np.int64)


def _table_costs(basis_set: BasisSet, tables: tuple[StepTable, ...]) -> np.ndarray:
    """`loss.costs` for entropy-coded tables, [L, G, R, F, tables].

    What was measured at a fixed width b is taken over as a ratio to the product model, E[g^2 (y - Q_b(y))^2] /
    (E[g^2] E[y^2] D(b)), and interpolated linearly in log D.
    """
    product = basis_set.sensitivity.astype(np.float64) * basis_set.variance
    safe = np.where(product > 0, product, 1.0)
    distortion = distortions(basis_set.levels)
    known = [-math.log(d) for d in distortion]  # ascending
    columns = []
    for t in tables:
        at = min(max(-math.log(t.mse), known[0]), known[-1])
        i = min(int(np.searchsorted(known, at, side="right")), len(known) - 1)
        share = float(f"{(at - known[i - 1]) / (known[i] - known[i - 1]):.9g}")  # logarithms differ between machines
        low, high = (basis_set.cost[..., j] / safe / distortion[j] for j in (i - 1, i))
        ratio = low * (1 - share) + high * share
        columns.append((MEASURED_SHARE * ratio + (1 - MEASURED_SHARE)) * product * t.mse * coherent_cost(t.mse))
    return np.stack(columns, axis=-1)


def fit_bits(
    make: Callable[[float], tuple[object, float]], bits: float, allowed: tuple[float, float] = ENTROPY_BITS
) -> object:
    """What `make(planned)` -> (cache, real bits) gives for the most planned bits whose real ones stay within `bits`.

    How long codes get depends on the text; a plan only knows calibration text. Real bits mostly follow the planned ones by
    one factor, which the next try takes. They jump where a plan begins to code what calibration hardly saw: a try that
    leaves the range between the largest plan that fits and the smallest that does not halves that range instead.
    `allowed`: range of planned bits. Raises UsageError when even the smallest plan takes more.
    """
    low, high = allowed
    planned, best, reached = min(max(bits, low), high), None, 0.0
    fits, exceeds = low, high  # planned bits that the answer lies between
    for _ in range(FIT_ROUNDS):
        made, real = make(planned)
        if reached < real <= bits:
            best, reached = made, real
        if real > bits:
            exceeds = planned
        else:
            fits = planned
        if reached >= bits * (1 - FIT_SLACK) or planned == (high if real <= bits else low):
            break
        if exceeds - fits <= FIT_STEP * bits:
            break
        planned = min(max(planned * bits / real * (1 - FIT_SLACK / 4), low), high)
        inside = fits < planned < exceeds or (planned == low and best is None) or (planned == high == exceeds)
        planned = planned if inside else (fits + exceeds) / 2
    if best is None:
        raise UsageError(
            f"Expected bits that this text can be stored in, received {bits:g}; it takes {real:.3g} or more."
        )
    return best

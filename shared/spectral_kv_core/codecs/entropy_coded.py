"""The codec of files: the coefficients of the live codecs, with uniform steps and an entropy coder.

docs/decisions/rate-distortion-2.md, section 3. A chunk is one stream of bytes: it cannot be appended to, and it is
decoded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..planning.plan import STORED_BITS, Plan
from ..quantization.entropy import decode_streams, dequantize_steps, encode_streams, quantize_steps
from ..quantization.time_rounding import round_in_time
from .registry import plan_class
from .spectral import Chunk, TransformCodec, by_frequency, check_finite, deviations, kept_components, make_codec

FIT_ROUNDS = 6  # of the search for a plan whose files are as large as asked
FIT_SLACK = 0.01  # share of the bits that may stay unused


class StepRows:
    """The quantizers of rows of coefficients that differ in their step, with the interface of `RowTables`.

    `choices` [..., F, R]: which of the plan's tables every row has.
    """

    def __init__(self, xp, plan: Plan, choices: np.ndarray, like=None):
        def array(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        def of_rows(name):
            return np.array([getattr(t, name) for t in plan.tables])[choices]

        self.xp = xp
        self.step, self.offset, self.limit = array(of_rows("step")), array(of_rows("offset")), array(of_rows("limit"))
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


class StoredCodec(TransformCodec):
    """Entropy-coded coefficients of one row. A chunk holds one array: uint8 [bytes] of `encode_streams`.

    Codes are ordered table by table, and in a table by batch row, (group, frequency, component) and block.
    """

    def __init__(self, xp, plan: Plan, row: int, like=None):
        super().__init__(xp, plan, row, like)
        kept = kept_components(plan.coded[row])
        choices = by_frequency(plan.choices[row], kept, self.block)
        self.quantizers = StepRows(xp, plan, choices[:, None], like)
        sigma = deviations(plan.basis_set, row, kept)
        self.scale = xp.asarray(np.ascontiguousarray(sigma[..., None], np.float32), like=like)  # [G, F, R, 1]
        self.streams = plan.tables
        self.rows = [np.flatnonzero(choices.reshape(-1) == i) for i in range(len(plan.tables))]

    def encode(self, keys, values, start: int) -> Chunk:
        """A chunk of T tokens, T a multiple of `block`; raises ValueError on NaN or infinity."""
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
        data = encode_streams([codes[:, rows] for rows in self.rows], self.streams)
        return Chunk(batch, start, keys.shape[2], (xp.asarray(np.frombuffer(data, np.uint8), like=keys),))

    def decode(self, chunk: Chunk):
        """Keys and values [B, H, T, D] float32 of a chunk; keys are rotated as the model had them.

        Raises ValueError for bytes that are not of this plan.
        """
        xp, n = self.xp, chunk.tokens // self.block
        counts = [chunk.batch * len(rows) * n for rows in self.rows]
        codes = np.zeros((chunk.batch, self.groups * self.block * self.rank, n), np.int32)
        data = xp.to_numpy(chunk.arrays[0]).tobytes()
        for rows, stream in zip(self.rows, decode_streams(data, counts, self.streams)):
            codes[:, rows] = stream.reshape(chunk.batch, len(rows), n)
        codes = codes.reshape(chunk.batch, self.groups, self.block, self.rank, n).transpose(0, 1, 4, 2, 3)
        z = self.quantizers.dequantize(xp.asarray(np.ascontiguousarray(codes), like=self.scale))
        return self.vectors(xp.permute_dims(z, (0, 1, 3, 4, 2)) * self.scale, chunk.start)


def codec_of(xp, plan: Plan, row: int, like=None):
    """Codec of row `row` of the plan, of a live cache or of one that is only the contents of a file."""
    if plan.method.live:
        return make_codec(xp, plan, row, like)
    family = plan_class(plan.method.codec)
    return (family.CODEC if family else StoredCodec)(xp, plan, row, like)


def codecs_of(xp, plan: Plan, like=None) -> list:
    """`codec_of` for every row, made once on every device and shared by all caches of `plan`.

    All at a time: arrays that stay, made among those of a forward pass, leave the memory of a process in pieces.
    """
    made = plan.__dict__.setdefault("_codecs", {})
    key = (xp.__name__, str(getattr(like, "device", like)))
    if key not in made:
        made[key] = [codec_of(xp, plan, row, like) for row in range(len(plan.layer_groups))]
    return made[key]


def fit_bits(
    make: Callable[[float], tuple[object, float]], bits: float, allowed: tuple[float, float] = STORED_BITS
) -> object:
    """What `make(planned)` -> (cache, real bits) gives for the most planned bits whose real ones stay within `bits`.

    How long codes get depends on the text; a plan only knows calibration text. `allowed`: range of planned bits. Raises
    ValueError when even the smallest plan takes more.
    """
    low, high = allowed
    planned, best, reached = min(max(bits, low), high), None, 0.0
    for _ in range(FIT_ROUNDS):
        made, real = make(planned)
        if reached < real <= bits:
            best, reached = made, real
        if bits * (1 - FIT_SLACK) <= real <= bits or (real <= bits and planned >= high):
            break
        if real > bits and planned <= low:
            break
        planned = min(max(planned * bits / real * (1 - FIT_SLACK / 4), low), high)
    if best is None:
        raise ValueError(
            f"Expected bits that this text can be stored in, received {bits:g}; it takes {real:.3g} or more."
        )
    return best

"""Entropy-coded quantizer: uniform steps with a dead zone, and static tables for an ANS coder (Duda 2013).

A coefficient x, in units of its sigma, has the code sign(x) * floor(|x| / step + offset) and is decoded as the centroid
of its cell. A model has about twenty such tables, on the lower convex hull of rate and error; every (band, channel)
takes one of them, and all codes of a table share one frequency table (docs/decisions/rate-distortion-2.md, section 3).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

PRECISION = 24  # bits of a probability in constriction's coders
TOTAL = 1 << PRECISION
# Bits per coefficient that tables are wanted at, denser where a band is nearly dropped; the finest ones protect the few
# channels that matter most. Against the whole hull, an allocation loses 0.004 bit at 1 bit and 0.007 at 2.
RATES = (0.04, 0.12, 0.22, 0.36, 0.55, 0.8, 1.1, 1.4, 1.75, 2.1, 2.5, 2.9, 3.3, 3.75, 4.2, 4.7, 5.2, 5.7, 6.3, 7.1, 7.9)
STEPS = tuple(float(f"{0.01 * 2 ** (i / 8):.4g}") for i in range(76))  # 0.01 to 6.6 sigma
OFFSETS = (0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)  # 0.5 is plain rounding, less is a dead zone
MAX_CODE = 2**15 - 1  # codes travel as int16

_MAGIC = b"SKE1"
_HEADER = struct.Struct("<4sIQII")  # magic, words, codes, CRC of the codes, CRC of all else


@dataclass(frozen=True, eq=False)
class StepTable:
    """One quantizer and its code: see `step_table`.

    `levels` [limit + 1] float32: centroid of every magnitude, ascending from 0, in units of sigma; `frequencies`
    [2 * limit + 1] int64 of the codes -limit..limit, each >= 1, their sum `TOTAL`; `rate` in bits per coefficient and
    `mse` as a share of the variance, both on the histogram. The table that drops a coefficient has `limit` 0.
    """

    step: float
    offset: float
    levels: np.ndarray
    frequencies: np.ndarray
    rate: float
    mse: float

    @property
    def limit(self) -> int:
        """Largest magnitude of a code."""
        return len(self.levels) - 1

    @property
    def code_lengths(self) -> np.ndarray:
        """Bits [limit + 1] float64 that the coder spends on a code of each magnitude, its sign included."""
        return PRECISION - np.log2(self.frequencies[self.limit :])


DROP = StepTable(math.inf, 0.5, np.zeros(1, np.float32), np.full(1, TOTAL, np.int64), 0.0, 1.0)


def step_tables(histogram: np.ndarray, limit: float) -> list[StepTable]:
    """About twenty tables for a histogram of |x| over [0, `limit`), mirrored; the first drops the coefficient.

    They are vertices of the lower convex hull of (rate, mse) over all of `STEPS` and `OFFSETS`, those nearest to
    `RATES`. Rates and errors are rounded before they are compared: the last bits of a logarithm differ between machines.
    `histogram`: counts, not densities (rare codes get half a count); `limit` in sigma. Raises ValueError without counts.
    """
    tables = [step_table(histogram, limit, s, o) for s in STEPS for o in OFFSETS if (1 - o) * s < limit]
    hull = _lower_hull([DROP, *tables])
    rates = np.array([t.rate for t in hull])
    return [hull[i] for i in sorted({0, *(int(np.argmin(np.abs(rates - r))) for r in RATES)})]


def step_table(histogram: np.ndarray, limit: float, step: float, offset: float) -> StepTable:
    """The quantizer with `step` and `offset` for a histogram of |x| over [0, `limit`), uniform within a bin, mirrored.

    Codes reach the cell that holds `limit`; what lies beyond is clipped to it, as by the outermost Lloyd-Max level: the
    loss is (|x| - limit)^2 at 12 sigma and above, and no escape code is needed. A cell without counts is decoded to its
    middle, (m + 0.5 - offset) * step. Frequencies are the counts and half a count for every code (Krichevsky and
    Trofimov 1981). `levels` and `frequencies` come from +, -, *, / alone: the same on every machine.
    """
    counts = np.asarray(histogram, np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or not counts[1:].any():
        raise ValueError("Expected a histogram with counts >= 0, and some of them above the first bin.")
    if not 0 < offset <= 0.5 or not 0 < step * (1 - offset) < limit:
        raise ValueError(
            f"Expected 0 < offset <= 0.5 and a dead zone of (1 - offset) * step below {limit:g}, received "
            f"offset {offset:g} and step {step:g}."
        )
    top = int(limit / step + offset)
    if top > MAX_CODE:
        raise ValueError(f"Expected a step of at least {limit / MAX_CODE:.3g} for int16 codes, received {step:g}.")
    edges = np.concatenate([[0.0], (np.arange(1, top + 2) - offset) * step])
    edges[-1] = max(edges[-1], limit)
    mass, first, second = (np.diff(m) for m in _partial_moments(counts, limit, edges))
    mass = np.maximum(mass, 0.0)
    whole, variance = math.fsum(mass), math.fsum(second)

    middle = (np.arange(top + 1) + 0.5 - offset) * step
    used = mass > whole * 1e-12  # less is the rounding error of a difference
    levels = np.clip(np.where(used, first / np.where(used, mass, 1.0), middle), edges[:-1], edges[1:])
    levels[0] = 0.0
    levels = levels.astype(np.float32)
    wide = levels.astype(np.float64)
    error = variance - 2 * math.fsum(wide * first) + math.fsum(np.square(wide) * mass)

    # every code has a frequency of 1 and a share of the rest; the center takes what rounding down leaves
    codes = 2 * top + 1
    share = (mass[1:] / 2 + 0.5) / (whole + codes / 2)
    side = 1 + np.floor(share * (TOTAL - codes)).astype(np.int64)
    frequencies = np.concatenate([side[::-1], [TOTAL - 2 * int(side.sum())], side])
    rate = PRECISION - math.fsum(mass * np.log2(frequencies[top:])) / whole
    return StepTable(step, offset, levels, frequencies, _rounded(rate), _rounded(error / variance))


def _partial_moments(counts: np.ndarray, limit: float, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals of p, x p and x^2 p from 0 to every edge, p being constant within a bin and 0 from `limit` on."""
    width = limit / len(counts)
    bins = np.arange(len(counts) + 1) * width
    density = counts / width
    at = np.clip((edges / width).astype(np.int64), 0, len(counts) - 1)
    x = np.minimum(edges, bins[-1])
    moments = []
    for integral in (lambda t: t, lambda t: t * t / 2, lambda t: t * t * t / 3):  # products: pow differs by machine
        whole = np.concatenate([[0.0], np.cumsum(density * np.diff(integral(bins)))])
        moments.append(whole[at] + density[at] * (integral(x) - integral(bins)[at]))
    return tuple(moments)


def _rounded(x: float) -> float:
    return float(f"{x:.9g}")


def _lower_hull(tables: list[StepTable]) -> list[StepTable]:
    """Tables on the lower convex hull of (rate, mse), rate ascending and mse falling (Andrew's monotone chain)."""
    hull: list[StepTable] = []
    for t in sorted(tables, key=lambda t: (t.rate, t.mse)):
        if hull and t.mse >= hull[-1].mse:
            continue
        while len(hull) > 1 and _gain(hull[-2], t) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(t)
    return hull


def _gain(a: StepTable, b: StepTable) -> float:
    """How much error falls per bit from `a` to `b`."""
    return _rounded((a.mse - b.mse) / (b.rate - a.rate))


def quantize_steps(xp, x, step, offset, limit):
    """Codes int32 in [-limit, limit] of `x` (any shape, in units of sigma), sign(x) * floor(|x| / step + offset).

    `step`, `offset` and `limit` are numbers, or arrays that broadcast against `x`.
    """
    x = xp.astype(x, xp.float32)
    cell = xp.maximum(x, -x) / step + offset
    cell = xp.astype(xp.where(cell < limit, cell, limit), xp.int32)  # >= 0: the cast rounds down
    return xp.where(x < 0, -cell, cell)


def dequantize_steps(xp, codes, levels, start=0):
    """Centroids, `levels` [limit + 1] float32 mirrored, looked up by signed `codes` (any shape) -> float32.

    `start`: where the levels of a code begin when those of several tables lie behind one another.
    """
    codes = xp.astype(codes, xp.int32)
    magnitude = xp.maximum(codes, -codes) + start
    x = xp.take(levels, magnitude.reshape(-1), axis=0).reshape(codes.shape)
    return xp.where(codes < 0, -x, x)


def encode_streams(codes: Sequence[np.ndarray], tables: Sequence[StepTable]) -> bytes:
    """One stream of the `codes` (integers, any shape, in C order) of every table; 24 bytes and at most one word over
    their code length.

    Codes of a table that drops its coefficients must be 0 and take nothing. Raises ValueError for a code that its table
    lacks, and ImportError without constriction.
    """
    coder = _constriction().stream.stack.AnsCoder()
    codes = [_checked(c, t, i) for i, (c, t) in enumerate(zip(codes, tables, strict=True))]
    for c, t in zip(codes[::-1], tables[::-1]):  # a stack: what is decoded first goes in last
        if t.limit and c.size:
            coder.encode_reverse(c.astype(np.int32) + np.int32(t.limit), _model(t))
    words = np.ascontiguousarray(coder.get_compressed(), dtype="<u4")
    head = (_MAGIC, len(words), sum(c.size for c in codes), _codes_crc(codes))
    payload = words.tobytes()
    return _HEADER.pack(*head, _data_crc(head, payload)) + payload


def decode_streams(data: bytes, counts: Sequence[int], tables: Sequence[StepTable]) -> list[np.ndarray]:
    """Inverse of `encode_streams`: int16 codes [counts[i]] of every table.

    Raises UsageError for data that are truncated, altered, or made with other tables, and ImportError without
    constriction.
    """
    counts = [int(n) for n in counts]
    if len(counts) != len(tables) or min(counts, default=0) < 0:
        raise ValueError(f"Expected one count >= 0 for each of {len(tables)} tables, received {counts}.")
    data = bytes(data)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise UsageError(
            f"Expected entropy-coded data, {_HEADER.size} bytes or more that start with {_MAGIC!r}, received {len(data)} "
            f"bytes that start with {data[:4]!r}."
        )
    _, words, total, codes_crc, data_crc = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if len(payload) != 4 * words:
        raise UsageError(
            f"Expected {_HEADER.size + 4 * words} bytes of entropy-coded data, received {len(data)}: truncated or altered."
        )
    if _data_crc((_MAGIC, words, total, codes_crc), payload) != data_crc:
        raise UsageError("Expected entropy-coded data with a valid checksum: the data were altered. Encode them again.")
    if sum(counts) != total:
        raise UsageError(f"Expected counts that add up to the {total} codes in the data, received {sum(counts)}.")
    coder = _constriction().stream.stack.AnsCoder(np.frombuffer(payload, "<u4").astype(np.uint32))
    codes = []
    for n, t in zip(counts, tables):
        if t.limit and n:
            codes.append((coder.decode(_model(t), n) - np.int32(t.limit)).astype(np.int16))
        else:
            codes.append(np.zeros(n, np.int16))
    if not coder.is_empty() or _codes_crc(codes) != codes_crc:
        raise UsageError(
            "Expected data that were encoded with the same tables and counts, received others (or a version of "
            "constriction that codes differently). Use the profile and the plan that made the data."
        )
    return codes


def _checked(codes: np.ndarray, table: StepTable, index: int) -> np.ndarray:
    codes = np.asarray(codes).reshape(-1)
    if codes.size and codes.dtype.kind not in "iu":
        raise ValueError(f"Expected integer codes for table {index}, received {codes.dtype}.")
    if codes.size and not -table.limit <= int(codes.min()) <= int(codes.max()) <= table.limit:
        raise ValueError(
            f"Expected codes of table {index} between {-table.limit} and {table.limit}, received "
            f"{codes.min()} to {codes.max()}. Quantize with the table's step, offset and limit."
        )
    return codes.astype("<i2")


def _codes_crc(codes: list[np.ndarray]) -> int:
    """Checksum of decoded codes and of how they are split over tables."""
    crc = 0
    for c in codes:
        crc = zlib.crc32(c.astype("<i2", copy=False).tobytes(), zlib.crc32(struct.pack("<Q", c.size), crc))
    return crc


def _data_crc(head: tuple, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_HEADER.pack(*head, 0)))


def _model(table: StepTable):
    # With perfect=False constriction gives every code 1 / TOTAL and the rest in proportion: counts less one, which add
    # up to that rest, are scaled by exactly 1 and become these very frequencies.
    return _constriction().stream.model.Categorical((table.frequencies - 1).astype(np.float64), perfect=False)


def _constriction():
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "Expected the package constriction for entropy coding, which spectralkv[torch] and spectralkv[mlx] bring where "
            "there is a wheel. Install it: pip install constriction"
        ) from error
    return constriction

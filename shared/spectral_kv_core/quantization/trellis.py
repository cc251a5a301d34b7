"""Trellis-coded quantization of coefficients: vectors are quantized together, at the bits and nearly the decoder of scalars.

The coefficients of all components of a layer at one frequency of a block form a sequence. Every code of 1 to 4 bits, at
`WIDTHS`, has a *path bit*, its lowest. The path bits of a coefficient and of the five before it in the sequence say which
quarter of a codebook of twice as many levels the other bits choose from (`label`): Ungerboeck's code of 32 states (1982,
table I), as Marcellin and Fischer 1990 (IEEE Trans. Comm. 38(1)) quantize with it. Which codes are best is a search over all
paths (Viterbi); it takes the place of rounding in both passes of time rounding (`rounding.round_in_time`), whose errors
and weights it minimizes. results/experiments.md measures what it gains.

The search runs on the host, in C (`native/trellis.c`) or, slowly, in NumPy: codes are the same for every array library.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, byref, c_int32, c_void_p
from functools import cache

import numpy as np

from ..arrays.transform import FREQUENCIES
from ..native import library
from .quantizer import BIT_WIDTHS, CELLS, REACH, gaussian_tables

WIDTHS = (1, 2, 3, 4)  # of codes with a path bit
STATES = 32
DISTANCES = (2, 3, 5)  # places before a coefficient whose path bits choose its quarter, with its own
BLOCKS_AT_ONCE = 16  # of a call of the kernel, whose registers have up to so many lanes
NUMPY_BLOCKS = 128
MIN_COST = 1e-4  # of the mean of a sequence: a coefficient that costs next to nothing still has a defined code

# Upper halves of the codebooks of 2**(bits + 1) levels for the standard normal density, by the alternation of Lloyd 1982
# with the search in place of the nearest level.
_NORMAL = {
    1: (0.3175, 1.2204),
    2: (0.1842, 0.5960, 1.0646, 1.8744),
    3: (0.0988, 0.3096, 0.5195, 0.7568, 1.0160, 1.3426, 1.7934, 2.4948),
    4: (
        0.0545, 0.1653, 0.2749, 0.3891, 0.5023, 0.6218, 0.7436, 0.8733, 1.0078, 1.1563, 1.3196, 1.5121, 1.7457, 2.0392,
        2.4308, 3.0341,
    ),
}  # fmt: skip
# Squared error relative to that of the Lloyd-Max quantizer of as many bits, on long sequences: within 2 % of this for the
# coefficients of SmolLM2 and Gemma 3, up to 4 % higher on the standard normal density.
ERROR_RATIOS = {1: 0.80, 2: 0.685, 3: 0.646, 4: 0.61}


def codebooks(levels: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Codebooks [2**(bits + 1)] float32, ascending, of `WIDTHS`, from the Lloyd-Max levels of all widths for a density.

    Those of the standard normal density, stretched level by level as the Lloyd-Max levels of one bit more are, and put on
    a `curve`: up to 3 bits within 1 % of the squared error of codebooks that are trained on the density, 2 % at 4.
    """
    normal, books = gaussian_tables(), {}
    for bits in WIDTHS:
        upper = np.array(_NORMAL[bits])
        stretched = np.concatenate([-upper[::-1], upper]) * levels[bits + 1] / normal[bits + 1]
        books[bits] = on_curve(np.arange(len(stretched)), len(stretched), curve(stretched)).astype(np.float32)
    return books


def curve(levels: np.ndarray) -> tuple[float, float, float]:
    """The odd polynomial of fifth degree in the index of a level, from the middle, that is closest to a codebook.

    A decoder evaluates it in place of a look-up. Levels count by the share of coefficients near them.
    """
    t, half = np.arange(len(levels)) - (len(levels) - 1) / 2, len(levels) // 2
    powers = np.stack([t, t**3, t**5][: min(half, 3)], axis=1)
    share = np.sqrt(np.exp(-np.square(np.float64(levels)) / 4) * np.gradient(np.float64(levels)))
    found = np.linalg.lstsq(powers * share[:, None], levels * share, rcond=None)[0]
    a, b, c = (float(f"{x:.6g}") for x in np.pad(found, (0, 3 - len(found))))  # the last bits differ between machines
    return a, b, c


def on_curve(index, count: int, coefficients: tuple):
    """Levels of `index` in a codebook of `count` levels."""
    a, b, c = coefficients
    t = index - (count - 1) / 2
    return t * (a + t * t * (b + t * t * c))


def label(window):
    """The quarter, 0 to 3, that the last six path bits choose, the newest lowest; level v belongs to quarter v % 4."""
    return ((window ^ window >> 3 ^ window >> 5) & 1) << 1 | window >> 2 & 1


def is_fast() -> bool:
    """Whether the search runs in C: a cache in use could not wait for NumPy."""
    return library() is not None


class Coefficients:
    """The coefficients (group, frequency, component) of a block as the search takes them, numbered in that order.

    `widths` [G, F, R] uint8, `gain` [G, F, R]: as of `rounding.round_in_time`; `cost` [G, F, R]: what the squared error of
    one costs, in any unit; `matrix` [F, F]: the time transform; `tables`: `quantizer.flat_tables` and the levels that the
    search takes codes for, [W * 256] too. A path visits the coefficients of a frequency by rising cost, so that the first few,
    which find most of the trellis closed, are the cheapest.
    """

    def __init__(self, widths, gain, cost, matrix, tables: tuple):
        groups, frequencies, rank = widths.shape
        self.shape = groups, frequencies, rank
        self.slots = np.searchsorted(BIT_WIDTHS, widths).astype(np.int32)
        self.gain, self.time = np.ascontiguousarray(gain, np.float32), np.ascontiguousarray(matrix, np.float32)
        self.cells, self.decoded, self.levels = tables
        self.has_path = np.isin(widths, WIDTHS)
        by_frequency = cost.transpose(1, 0, 2).reshape(frequencies, -1)
        # those without a path bit last, by width: nothing depends on when they are visited, and branches come in runs
        later = np.where(self.has_path, 0, self.slots + 1).transpose(1, 0, 2).reshape(frequencies, -1)
        self.order = np.lexsort((by_frequency, later)).astype(np.int32)  # of group * R + component
        self.cost = _relative(cost, self.has_path)

    def sequences(self) -> list[np.ndarray]:
        """Numbers of the coefficients that have a path bit, in the order of the path, frequency by frequency."""
        _, frequencies, rank = self.shape
        found = []
        for f, order in enumerate(self.order):
            numbers = order // rank * (frequencies * rank) + f * rank + order % rank
            found.append(numbers[self.has_path.reshape(-1)[numbers]])
        return found

    def search(self, z: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        """Codes uint8 of coefficients `z` [B, G, n, F, R] float32 in standard deviations.

        `weights` [B, G, n, F] float32 of a block's tokens, or None for the least squared error of each coefficient alone.
        """
        z = np.ascontiguousarray(z, np.float32)
        weights = None if weights is None else np.ascontiguousarray(weights, np.float32)
        codes = np.empty(z.shape, np.uint8)
        run = _native if self.shape[1] == FREQUENCIES and library() else _in_numpy
        run(self, z, weights, codes)
        return codes


def _relative(cost: np.ndarray, has_path: np.ndarray) -> np.ndarray:
    """`cost` [G, F, R] over its mean along the sequence of a frequency, float32."""
    counts = np.maximum(has_path.sum((0, 2), keepdims=True), 1)
    mean = (cost * has_path).sum((0, 2), keepdims=True) / counts
    return np.ascontiguousarray(np.maximum(cost / np.where(mean > 0, mean, 1), MIN_COST), np.float32)


class _Search(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("groups", "blocks", "rank", "first", "count")),
        *((name, c_void_p) for name in ("z", "weights", "gain", "cost", "slots", "order", "time")),
        *((name, c_void_p) for name in ("cells", "levels", "decoded", "output")),
    ]


def _native(given: Coefficients, z: np.ndarray, weights: np.ndarray | None, codes: np.ndarray) -> None:
    """Fill `codes` by the kernel, some blocks per thread at a time."""
    kernels = library()
    assert kernels is not None, "chosen where there is a library"
    run = kernels.spectralkv_trellis
    run.argtypes, run.restype = (POINTER(_Search),), ctypes.c_int
    batch, groups, blocks, _, rank = z.shape
    tables = given.gain, given.cost, given.slots, given.order, given.time, given.cells, given.levels, given.decoded
    assert all(x is None or x.flags.c_contiguous for x in (z, weights, *tables, codes))
    held = [x if x is None else x.ctypes.data for x in (z, weights, *tables, codes)]

    def some(first: int) -> int:
        count = min(BLOCKS_AT_ONCE, batch * blocks - first)
        return run(byref(_Search(groups, blocks, rank, first, count, *held)))

    if any(_threads().map(some, range(0, batch * blocks, BLOCKS_AT_ONCE))):
        raise MemoryError("Expected memory to encode keys and values, the system has none left.")


@cache
def _threads() -> ThreadPoolExecutor:
    """One thread per processor that this process may use; the kernel lets go of the interpreter."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(int(wanted) if wanted.isdecimal() and int(wanted) else available)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a pool's threads stay in the parent


def _in_numpy(given: Coefficients, z: np.ndarray, weights: np.ndarray | None, codes: np.ndarray) -> None:
    """As the kernel, `NUMPY_BLOCKS` blocks at a time."""
    batch, groups, blocks, frequencies, rank = z.shape
    flat_z = z.transpose(3, 1, 4, 0, 2).reshape(frequencies, groups * rank, batch * blocks)
    if weights is None:
        metric = None
    else:
        turned = np.einsum("ft,bgnt,ht->gfhbn", given.time, weights, given.time, optimize=True).astype(np.float32)
        metric = turned.reshape(groups, frequencies, frequencies, batch * blocks)
    found = np.empty(flat_z.shape, np.uint8)
    for start in range(0, batch * blocks, NUMPY_BLOCKS):
        part = np.s_[..., start : start + NUMPY_BLOCKS]
        found[part] = _search_blocks(given, flat_z[part], None if metric is None else metric[part])
    codes[...] = found.reshape(frequencies, groups, rank, batch, blocks).transpose(3, 1, 4, 0, 2)


def _search_blocks(given: Coefficients, z: np.ndarray, metric: np.ndarray | None) -> np.ndarray:
    """Codes [F, G * R, N] of `z` [F, G * R, N]; `metric` [G, F, F, N]: F diag(w) F' of every block."""
    groups, frequencies, rank = given.shape
    codes, error = np.zeros(z.shape, np.uint8), np.zeros_like(z)

    def flat(x):
        return x.transpose(1, 0, 2).reshape(frequencies, groups * rank)

    slots, gain, cost, has_path = map(flat, (given.slots, given.gain, given.cost, given.has_path))
    for again in range(1 if metric is None else 2):
        for f in range(frequencies):
            aim, own = z[f], np.ones((groups, 1, 1), np.float32)
            if metric is not None:
                own = metric[:, f, f, None]  # [G, 1, N]
            if metric is not None and again:
                grouped = error.reshape(frequencies, groups, rank, -1)
                others = np.einsum("ghn,hgrn->grn", metric[:, f], grouped) / own
                aim = z[f] + (others.reshape(z[f].shape) - error[f]) / gain[f, :, None]
            aim = np.clip(aim, -REACH, REACH)
            level = np.zeros_like(aim)
            scalar = np.flatnonzero(~has_path[f] & (slots[f] > 0))
            cell = np.minimum((aim[scalar] * CELLS + REACH * CELLS).astype(np.int32), 2 * REACH * CELLS - 1)
            codes[f, scalar] = given.cells[slots[f, scalar, None] * (2 * REACH * CELLS) + cell]
            level[scalar] = given.decoded[slots[f, scalar, None] * 256 + codes[f, scalar]]
            path = given.order[f][has_path[f, given.order[f]]]
            weight = cost[f, path, None] * np.broadcast_to(own, (groups, rank, z.shape[2])).reshape(z[f].shape)[path]
            index, codes[f, path] = _best_path(given, slots[f, path], aim[path], weight)
            level[path] = given.decoded[slots[f, path, None] * 256 + index]
            error[f] = (z[f] - level) * gain[f, :, None]
    return codes


def _best_path(
    given: Coefficients, slots: np.ndarray, x: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Viterbi search: levels and codes [S, N] of a sequence with the least weighed squared error from `x` [S, N]."""
    steps, blocks = x.shape
    squared, nearest = np.empty((steps, 4, blocks), np.float32), np.empty((steps, 4, blocks), np.uint8)
    for slot in np.unique(slots):
        chosen, count = slots == slot, 2 << BIT_WIDTHS[slot]
        levels = given.levels[slot * 256 : slot * 256 + count].reshape(-1, 4, 1)
        distance = np.square(x[chosen][:, None, None] - levels)  # [s, levels of a quarter, quarters, N]
        best = distance.argmin(1)
        squared[chosen] = np.take_along_axis(distance, best[:, None], 1)[:, 0]
        nearest[chosen] = best * 4 + np.arange(4)[:, None]
    squared *= weight[:, None]
    quarters = label(np.arange(2 * STATES)).reshape(2, STATES // 2, 2)  # [oldest bit, others, newest bit]
    cost = np.full((STATES, blocks), 1e30, np.float32)
    cost[0] = 0
    took = np.empty((steps, STATES // 2, 2, blocks), bool)
    for i in range(steps):
        low, high = (cost.reshape(2, STATES // 2, 1, blocks)[old] + squared[i, quarters[old]] for old in (0, 1))
        np.less(high, low, out=took[i])
        cost = np.minimum(low, high).reshape(STATES, blocks)
    index, codes = np.empty((steps, blocks), np.uint8), np.empty((steps, blocks), np.uint8)
    state, block = cost.argmin(0), np.arange(blocks)
    for i in range(steps - 1, -1, -1):
        before = state >> 1 | took[i, state >> 1, state & 1, block] * (STATES // 2)
        index[i] = nearest[i, label(before << 1 | state & 1), block]
        codes[i] = index[i] >> 2 << 1 | state & 1
        state = before
    return index, codes


class Paths:
    """What decoding coefficients with a path bit takes, as arrays of `xp`, in the order of `stored`.

    `stored` [T]: numbers of the coefficients with a path bit; `levels` by width in `widths` [T].
    """

    def __init__(
        self, xp, sequences: list[np.ndarray], stored: np.ndarray, widths: np.ndarray, levels: dict, like=None
    ):
        self.xp = xp
        place = {number: i for i, number in enumerate(stored.tolist())}
        before = np.full((len(DISTANCES), len(stored)), len(stored), np.int32)  # the zero at the end
        for sequence in sequences:
            places = np.array([place[number] for number in sequence.tolist()], np.int32)
            for line, distance in zip(before, DISTANCES):
                line[places[distance:]] = places[:-distance] if distance < len(places) else []
        starts = dict(zip(WIDTHS, np.cumsum([0, *(2 << bits for bits in WIDTHS)])))
        self.before = [xp.asarray(line, like=like) for line in before]
        self.start = xp.asarray(np.array([starts[b] for b in widths.tolist()], np.uint8)[:, None], like=like)
        self.levels = xp.asarray(np.concatenate([levels[b] for b in WIDTHS]).astype(np.float32), like=like)

    def labels(self, bits):
        """The higher and the lower bit of `label` for path bits [B, T, ...] uint8, or for bytes of eight of them."""
        xp = self.xp
        padded = xp.concat([bits, xp.zeros((bits.shape[0], 1, *bits.shape[2:]), dtype=xp.uint8, like=bits)], axis=1)
        second, third, fifth = (xp.take(padded, places, axis=1) for places in self.before)
        return bits ^ third ^ fifth, second

    def levels_of(self, codes):
        """Levels float32 of `codes` [B, T, n] uint8."""
        xp = self.xp
        high, low = self.labels(codes & 1)
        index = xp.astype((codes >> 1 << 2 | high << 1 | low) + self.start, xp.int32)
        return xp.take(self.levels, index.reshape(-1), axis=0).reshape(*index.shape)

    def arrays(self) -> list:
        return [*self.before, self.start, self.levels]

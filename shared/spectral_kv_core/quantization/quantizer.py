"""Scalar quantizers: Lloyd-Max tables, and grouped affine quantization."""

from __future__ import annotations

import numpy as np

BIT_WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)  # widths that the allocation may choose; 7 buys nothing over 6 and 8
AFFINE_WIDTHS = (2, 3, 4, 5, 6, 8)  # of grouped affine codes
CELLS, REACH = 256, 16  # thresholds lie on a grid of 1/256 standard deviation that covers 16 to either side


def lloyd_max(values: np.ndarray, weights: np.ndarray, bits: int, iterations: int = 200) -> np.ndarray:
    """Levels [2**bits] float32, ascending, that minimize the mean squared error on a weighted sample.

    Lloyd 1982 (IEEE Trans. IT 28(2), method I); the start is the quantizer of equal probability under density^(1/3)
    (Panter and Dite). `values` [n] ascending, `weights` [n] >= 0.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    mass, moment = np.concatenate([[0.0], np.cumsum(weights)]), np.concatenate([[0.0], np.cumsum(weights * values)])
    companded = np.cumsum(np.cbrt(weights))
    quantiles = (np.arange(2**bits) + 0.5) / 2**bits * companded[-1]
    levels = values[np.minimum(np.searchsorted(companded, quantiles), len(values) - 1)]
    levels = np.maximum.accumulate(levels + np.arange(2**bits) * 1e-9)
    for _ in range(iterations):
        edges = np.concatenate([[0], np.searchsorted(values, (levels[1:] + levels[:-1]) / 2), [len(values)]])
        cell = mass[edges[1:]] - mass[edges[:-1]]
        # an empty cell keeps its level
        mean = np.where(cell > 0, (moment[edges[1:]] - moment[edges[:-1]]) / np.where(cell > 0, cell, 1.0), levels)
        if np.max(np.abs(mean - levels)) < 1e-7:
            break
        levels = mean
    return levels.astype(np.float32)


def gaussian_tables() -> dict[int, np.ndarray]:
    """Lloyd-Max levels of the standard normal density for every width in `BIT_WIDTHS` above 0."""
    grid = np.linspace(-8, 8, 64001)
    density = np.exp(-(grid**2) / 2)
    return {b: _symmetric(lloyd_max(grid, density, b)) for b in BIT_WIDTHS if b}


def empirical_tables(histogram: np.ndarray, limit: float) -> dict[int, np.ndarray]:
    """Levels by width for a histogram of |x| over [0, limit), mirrored: the density is taken as symmetric.

    Lloyd-Max from 3 bits on. Two bits get even spacing: it costs some 1.5 % of squared error, and matrix products of
    plain integer codes become possible. At 4 bits it would cost a quarter.
    """
    centers = (np.arange(len(histogram)) + 0.5) * (limit / len(histogram))
    values = np.concatenate([-centers[::-1], centers])
    weights = np.concatenate([histogram[::-1], histogram]).astype(np.float64)
    tables = {b: _symmetric(lloyd_max(values, weights, b)) for b in BIT_WIDTHS if b}
    return {**tables, 2: _even_levels(centers, np.asarray(histogram, np.float64))}


def _even_levels(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Four levels (-3, -1, 1, 3) * s that minimize the squared error of a symmetric density, `values` > 0."""
    half_steps = np.sqrt((values**2 * weights).sum() / weights.sum()) * np.linspace(0.2, 0.9, 701)
    decided = np.where(values[:, None] >= 2 * half_steps, 3.0, 1.0) * half_steps
    error = ((values[:, None] - decided) ** 2 * weights[:, None]).sum(0)
    return (np.array([-3, -1, 1, 3]) * half_steps[error.argmin()]).astype(np.float32)


def _symmetric(levels: np.ndarray) -> np.ndarray:
    return ((levels - levels[::-1]) / 2).astype(np.float32)


def thresholds(levels: np.ndarray) -> np.ndarray:
    """Decision thresholds [2**bits - 1] float64 halfway between neighboring levels, moved to the border of a cell."""
    levels = np.asarray(levels, np.float64)
    return np.round((levels[1:] + levels[:-1]) / 2 * CELLS) / CELLS


def code_table(levels: np.ndarray | None) -> np.ndarray:
    """Code of every cell of the grid: uint8 [2 * REACH * CELLS]; all zero for None, a coefficient without bits."""
    if levels is None:
        return np.zeros(2 * REACH * CELLS, np.uint8)
    centers = (np.arange(2 * REACH * CELLS) + 0.5) / CELLS - REACH
    return np.searchsorted(thresholds(levels), centers).astype(np.uint8)


def flat_tables(levels: dict[int, np.ndarray], decoded: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tables of all widths of `BIT_WIDTHS` behind one another: codes by cell [W * 2 * REACH * CELLS], levels [W * 256].

    The code of a cell is that of the nearest of `levels`; it is decoded to the same entry of `decoded`.
    """
    return np.concatenate([code_table(levels.get(bits)) for bits in BIT_WIDTHS]), flat_levels(decoded)


def flat_levels(levels: dict[int, np.ndarray]) -> np.ndarray:
    """Levels of all widths of `BIT_WIDTHS` behind one another, [W * 256] float32, each filled up with zeros."""
    padded = np.zeros((len(BIT_WIDTHS), 256), np.float32)
    for i, bits in enumerate(BIT_WIDTHS):
        if bits:
            padded[i, : len(levels[bits])] = levels[bits]
    return padded.reshape(-1)


class CoefficientTables:
    """The quantizers of coefficients that differ in width, by look-up: no loop over widths.

    `flat`: `flat_tables` as arrays of `xp`, shared by all layers; `widths` [..., F, R]: bits of every coefficient, which
    comes in standard deviations; NaN is not checked here.
    """

    def __init__(self, xp, flat: tuple, widths: np.ndarray):
        self.xp, (self.codes, self.levels) = xp, flat
        self.slots = xp.asarray(np.searchsorted(BIT_WIDTHS, widths).astype(np.int32), like=self.codes)

    def quantize(self, z, f: int | None = None):
        """Codes uint8 of `z` [..., F, R], or of [..., R] at frequency `f`.

        The cell is found exactly in float32, the grid being a power of two: every array library gives the same code.
        """
        xp, span = self.xp, 2 * REACH * CELLS
        cell = xp.astype(xp.clip(z, -REACH, REACH) * CELLS + REACH * CELLS, xp.int32)
        return _look_up(xp, self.codes, xp.clip(cell, 0, span - 1) + self._slots(f) * span)

    def dequantize(self, codes, f: int | None = None):
        """Levels float32 of `codes` [..., F, R], or of [..., R] at frequency `f`."""
        return _look_up(self.xp, self.levels, self.xp.astype(codes, self.xp.int32) + self._slots(f) * 256)

    def arrays(self) -> list:
        return [self.codes, self.levels, self.slots]

    def _slots(self, f: int | None):
        return self.slots if f is None else self.slots[..., f, :]


def dequantize(xp, codes, levels):
    """Levels [2**bits] float32 looked up by `codes` (any shape) -> float32."""
    return _look_up(xp, levels, xp.astype(codes, xp.int32))


def _look_up(xp, table, index):
    return xp.take(table, index.reshape(-1), axis=0).reshape(*index.shape)


def quantize_affine(xp, x, bits: int, group_size: int):
    """Asymmetric uniform quantization of groups of `group_size` channels, in the layout of `mlx.core.quantize`.

    `x` [..., D] -> codes [..., D] uint8, scale and bias [..., D / group_size] float16; x ~ code * scale + bias.
    """
    grouped = xp.astype(x, xp.float32).reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    low, high = xp.min(grouped, axis=-1, keepdims=True), xp.max(grouped, axis=-1, keepdims=True)
    # rounding scale and bias first keeps encoder and decoder on the same grid; the floor guards a constant group
    scale = xp.astype(xp.maximum((high - low) / (2**bits - 1), 1e-6), xp.float16)
    bias = xp.astype(low, xp.float16)
    codes = xp.round((grouped - xp.astype(bias, xp.float32)) / xp.astype(scale, xp.float32))
    codes = xp.astype(xp.clip(codes, 0, 2**bits - 1), xp.uint8)
    return codes.reshape(*x.shape), scale[..., 0], bias[..., 0]


def dequantize_affine(xp, codes, scale, bias):
    """Inverse of `quantize_affine` -> [..., D] float32."""
    grouped = xp.astype(codes, xp.float32).reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
    x = grouped * xp.astype(scale, xp.float32)[..., None] + xp.astype(bias, xp.float32)[..., None]
    return x.reshape(*codes.shape)

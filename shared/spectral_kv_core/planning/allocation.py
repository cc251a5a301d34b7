"""Bits per coefficient under one budget for the whole model."""

from __future__ import annotations

import numpy as np

from ..quantization.quantizer import BIT_WIDTHS


def allocate_bits(cost: np.ndarray, copies: np.ndarray, budget: int, rates: np.ndarray | None = None) -> np.ndarray:
    """Widths that minimize the total cost under `budget` bits: one Lagrangian over all coefficients of a model.

    Greedy along the lower convex hull of every item's rate-cost curve, which is the Lagrangian's solution at every
    budget it meets (Shoham and Gersho 1988). Sums of bits are integers and ties keep the item order, so the result is
    the same on every machine.

    `cost` [n, len(BIT_WIDTHS)]: cost of an item at each width of `BIT_WIDTHS`; `copies` [n]: coefficients that share
    the item's width; `budget`: bits for all of them together. Returns widths [n] uint8 with sum(width * copies) <= budget.
    With `rates`, integers ascending from 0 in the unit of `budget`, choices cost these in place of the widths and what
    comes back is the index of every item's choice.
    """
    cost, copies = np.asarray(cost, np.float64), np.asarray(copies, np.int64)
    widths = np.array(BIT_WIDTHS if rates is None else rates, np.int64)
    cost = np.minimum.accumulate(cost, 1)  # more bits never cost more
    start, stop, gain = _hull_segments(cost, widths)
    item = np.broadcast_to(np.arange(len(cost))[:, None], start.shape)
    valid = stop > start
    item, start, stop, slope = item[valid], start[valid], stop[valid], (gain / copies[:, None])[valid]
    order = np.argsort(-slope, kind="stable")
    item, start, stop = item[order], start[order], stop[order]
    rate = (widths[stop] - widths[start]) * copies[item]
    taken = np.searchsorted(np.cumsum(rate), budget, side="right")
    chosen = np.zeros(len(cost), np.int64)
    np.maximum.at(chosen, item[:taken], stop[:taken])
    left = budget - int(rate[:taken].sum())
    for i, a, b, r in zip(item[taken:], start[taken:], stop[taken:], rate[taken:]):  # what still fits, in order
        if left <= 0:
            break
        if r <= left and chosen[i] == a:
            chosen[i], left = b, left - int(r)
    return (widths[chosen] if rates is None else chosen).astype(np.uint8)


def _hull_segments(cost: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments of the lower convex hull of each row: start and stop index and gain per bit, [n, len(widths) - 1].

    Jarvis' march from width 0: the next vertex is the one with the steepest descent. Unused segments have stop == start.
    """
    n, k = cost.shape
    start = np.zeros((n, k - 1), np.int64)
    stop = np.zeros((n, k - 1), np.int64)
    gain = np.zeros((n, k - 1))
    at = np.zeros(n, np.int64)
    for step in range(k - 1):
        here = np.take_along_axis(cost, at[:, None], 1)
        run = (widths[None, :] - widths[at][:, None]).astype(np.float64)
        slope = np.where(run > 0, (here - cost) / np.where(run > 0, run, 1.0), -np.inf)
        # the last of equal slopes, so that a straight run is one segment
        best = k - 1 - np.argmax(slope[:, ::-1], axis=1)
        value = np.take_along_axis(slope, best[:, None], 1)[:, 0]
        move = value > 0
        start[:, step], stop[:, step] = at, np.where(move, best, at)
        gain[:, step] = np.where(move, value, 0.0)
        at = stop[:, step]
    # on a straight run rounding may make a later slope look steeper, which would take segments out of order
    return start, stop, np.minimum.accumulate(gain, 1)

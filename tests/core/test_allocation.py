"""Bit allocation: never above the budget, and the best that the hull allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_kv_core.planning.allocation import _hull_segments, allocate_bits
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS

WIDTHS = np.array(BIT_WIDTHS)
quick = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def problems(draw, most: int = 12):
    """Falling, straight, flat and rising cost curves, with copies."""
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    falling = rng.lognormal(0, 2, (n, 1)) * 4.0 ** (-WIDTHS * rng.uniform(0.2, 1, (n, 1)))
    straight = rng.random((n, 1)) * 10 - rng.random((n, 1)) * WIDTHS
    noisy = rng.random((n, len(WIDTHS)))
    flat = np.full((n, len(WIDTHS)), 0.7)
    kind = rng.integers(0, 4, n)
    cost = np.choose(kind[:, None], [falling, straight, noisy, flat])
    return cost, rng.integers(1, 9, n)


def total_cost(cost: np.ndarray, widths: np.ndarray) -> float:
    return float(cost[np.arange(len(cost)), np.searchsorted(WIDTHS, widths)].sum())


@quick
@given(problem=problems(), budget=st.integers(0, 400))
def test_never_above_the_budget_and_deterministic(problem, budget):
    cost, copies = problem
    before = cost.copy(), copies.copy()
    widths = allocate_bits(cost, copies, budget)
    assert widths.dtype == np.uint8 and set(widths.tolist()) <= set(BIT_WIDTHS)
    assert int((widths.astype(int) * copies).sum()) <= budget
    np.testing.assert_array_equal(widths, allocate_bits(cost, copies, budget))
    np.testing.assert_array_equal(before[0], cost)
    np.testing.assert_array_equal(before[1], copies)


def test_straight_cost_curves_stay_within_the_budget():
    """Rounding makes later slopes of a straight curve look steeper: segments must not be taken out of order."""
    rng = np.random.default_rng(0)
    cost = rng.random((10_000, 1)) * 10 - rng.random((10_000, 1)) * WIDTHS + rng.integers(-2, 3, (10_000, 8)) * 1e-15
    start, stop, gain = _hull_segments(np.minimum.accumulate(cost, 1), WIDTHS)
    assert ((stop > start).sum(1) > 1).sum() > 100  # rounding does break straight runs
    assert np.all(np.diff(gain, axis=1) <= 0)
    for budget in range(0, 80_000, 1313):
        assert allocate_bits(cost, np.ones(len(cost), int), budget).astype(int).sum() <= budget


@quick
@given(problem=problems(), budget=st.integers(0, 400), more=st.integers(0, 60))
def test_more_budget_never_costs_more(problem, budget, more):
    cost, copies = problem
    less, greater = (total_cost(cost, allocate_bits(cost, copies, b)) for b in (budget, budget + more))
    assert greater <= less + 1e-12 * abs(less)


@pytest.mark.parametrize("seed", range(40))
def test_no_allocation_on_the_hull_is_better(seed):
    """At the vertices of the hull of every combination there is."""
    rng = np.random.default_rng(seed)
    cost, copies = (
        rng.lognormal(0, 1, (3, 1)) * np.sort(rng.random((3, len(WIDTHS))), 1)[:, ::-1],
        rng.integers(1, 9, 3),
    )
    if seed % 2:
        cost = rng.permuted(cost, axis=1)  # rising in places
    every = np.array(list(itertools.product(BIT_WIDTHS, repeat=len(cost))))
    bits, costs = every @ copies, cost[np.arange(3), np.searchsorted(WIDTHS, every)].sum(1)
    vertices = _lower_hull(bits, costs)
    assert len(vertices) >= 3
    for budget, best in vertices:
        assert total_cost(cost, allocate_bits(cost, copies, budget)) <= best + 1e-9


def _lower_hull(bits, costs):
    """Strict vertices (bits, cost) of the lower convex hull of all allocations, from 0 bits to the cheapest."""
    points = sorted({int(b): float(costs[bits == b].min()) for b in np.unique(bits)}.items())
    hull = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0) - 1e-9:  # points of a straight run are no vertices
                break
            hull.pop()
        hull.append((x, y))
    return hull[: int(np.argmin([y for _, y in hull])) + 1]


def test_zero_budget_and_zero_cost_give_no_bits():
    cost = 4.0 ** -np.tile(WIDTHS, (5, 1))
    assert not allocate_bits(cost, np.ones(5, int), 0).any()
    assert not allocate_bits(np.zeros((5, 8)), np.ones(5, int), 100).any()
    assert len(allocate_bits(np.zeros((0, 8)), np.zeros(0, int), 100)) == 0


def test_ample_budget_gives_every_item_the_most():
    cost = 4.0 ** -np.tile(WIDTHS, (5, 1))
    assert (allocate_bits(cost, np.arange(1, 6), 8 * 15) == 8).all()


def test_copies_are_paid_for():
    cost = np.tile(4.0**-WIDTHS, (2, 1))
    assert allocate_bits(cost, np.array([10, 1]), 9).tolist() == [0, 8]  # the cheap copy takes all that fits
    assert allocate_bits(cost * [[2], [1]], np.array([10, 1]), 10).tolist() == [0, 8]  # gain per bit decides
    assert allocate_bits(cost * [[20], [1]], np.array([10, 1]), 10).tolist() == [1, 0]


@pytest.mark.parametrize("gain", [2.0, 100.0])
def test_what_matters_more_gets_more_bits(gain):
    cost = np.array([[gain], [1.0]]) * 4.0**-WIDTHS
    first, second = allocate_bits(cost, np.ones(2, int), 7)
    assert first > second or (gain < 4 and first >= second)

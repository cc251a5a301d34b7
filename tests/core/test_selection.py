"""Which tokens stay: against a sort in plain Python, on three libraries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_kv_core.arrays import ops
from spectral_kv_core.scorers.selection import select


def slow_select(row, budget: int, always: set[int]) -> list[int]:
    """Best first, the later of equal ones first."""
    order = sorted(range(len(row)), key=lambda t: (t in always, row[t] if t not in always else 0, t), reverse=True)
    return sorted(order[:budget])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_select_keeps_the_best(data):
    tokens = data.draw(st.integers(1, 40))
    levels = data.draw(st.integers(1, 8))  # few levels: many ties
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-levels, levels, (2, 3, tokens)) / 4
    sinks, window = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    span = sorted(data.draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens))))
    protect = [tuple(span)] if span[0] < span[1] else []
    always = {t for t in range(tokens) if t < sinks or t >= tokens - window or span[0] <= t < span[1]}
    budget = data.draw(st.integers(max(sinks + window, len(always), 1), 45))
    got = select(ops, scores.astype(np.float32), budget, sinks, window, protect)
    assert got.dtype == np.int32 and got.shape == (2, 3, min(budget, tokens))
    for b in range(2):
        for h in range(3):
            assert got[b, h].tolist() == slow_select(scores[b, h].tolist(), budget, always)


@pytest.mark.parametrize("levels", [3, 10**6])
@pytest.mark.parametrize("budget", [70, 128, 256, 257, 300])
def test_libraries_agree_exactly(xp, levels, budget):
    scores = (np.random.default_rng(0).integers(-levels, levels, (2, 3, 257)) / 7).astype(np.float32)
    expected = select(ops, scores, budget, 4, 64, [(100, 102)])
    got = select(xp, xp.asarray(scores), budget, 4, 64, [(100, 102)])
    assert got.dtype == xp.int32
    np.testing.assert_array_equal(xp.to_numpy(got), expected)
    assert np.all(np.diff(expected) > 0)


def test_of_equal_scores_the_later_stay(xp):
    got = select(xp, xp.asarray(np.zeros((1, 1, 10), np.float32)), 5, 2, 1)
    assert xp.to_numpy(got).tolist() == [[[0, 1, 7, 8, 9]]]


def test_negative_zero_equals_zero(xp):
    got = select(xp, xp.asarray(np.float32([[[0.0, -0.0, 0.0, -0.0]]])), 2, 0, 0)
    assert xp.to_numpy(got).tolist() == [[[2, 3]]]


def test_protected_positions_move_with_their_tokens(xp):
    """After eviction slots and positions differ, and differ between heads; spans mean positions."""
    positions = np.array([[[0, 1, 5, 6, 9, 12], [0, 3, 5, 6, 11, 12]]])
    scores = np.float32([[[9, 8, 1, 0, 7, 6], [9, 8, 1, 0, 7, 6]]])
    got = select(xp, xp.asarray(scores), 4, 1, 1, [(5, 7)], positions)
    assert xp.to_numpy(got).tolist() == [[[0, 2, 3, 5], [0, 2, 3, 5]]]
    got = select(xp, xp.asarray(scores), 3, 1, 0, [(3, 4)], positions)
    assert xp.to_numpy(got).tolist() == [[[0, 1, 4], [0, 1, 4]]]


def test_a_larger_budget_keeps_what_a_smaller_one_kept():
    scores = np.random.default_rng(0).standard_normal((1, 2, 100)).astype(np.float32)
    before = [set(), set()]
    for budget in range(20, 101, 5):
        kept = [set(row.tolist()) for row in select(ops, scores, budget, 4, 16)[0]]
        assert all(old <= new for old, new in zip(before, kept))
        before = kept


def test_half_precision_and_no_tokens(xp):
    half = xp.astype(xp.asarray(np.float32([[[3, 1, 2]]])), xp.float16)
    assert xp.to_numpy(select(xp, half, 2, 0, 0)).tolist() == [[[0, 2]]]
    assert select(xp, xp.zeros((1, 2, 0)), 5, 1, 1).shape == (1, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, 4, 2), "at least 6 tokens for 4 sinks, a window of 2 .* received 5"),
        ((8, 4, 2, [(10, 14)]), "at least 10 tokens"),
        ((8, 4, 2, [(10, 21)]), r"within 0 and 20, received \(10, 21\)"),
        ((8, 4, 2, [(-1, 3)]), r"received \(-1, 3\)"),
        ((8, 4, 2, [(3, 3)]), r"received \(3, 3\)"),
        ((0, 0, 0), "budget >= 1"),
        ((8, -1, 0), "sinks=-1"),
        ((8, 1, 2, [], np.arange(19)), r"positions \[T\] or \[B, H, T\]"),
    ],
)
def test_impossible_requests_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        select(ops, np.zeros((1, 2, 20), np.float32), *arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(xp, bad):
    scores = np.zeros((1, 1, 9), np.float32)
    scores[0, 0, 3] = bad
    with pytest.raises(ValueError, match="finite scores"):
        select(xp, xp.asarray(scores), 4, 1, 1)


def test_overlaps_are_counted_once():
    assert select(ops, np.zeros((1, 1, 20), np.float32), 8, 4, 2, [(2, 6), (4, 6)]).tolist() == [
        [[0, 1, 2, 3, 4, 5, 18, 19]]
    ]


def test_a_budget_too_small_is_refused_before_the_text_is_long():
    with pytest.raises(ValueError, match="at least 6 tokens"):
        select(ops, np.zeros((1, 1, 3), np.float32), 5, 4, 2)

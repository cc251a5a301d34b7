"""How close is close enough, in one place, and the comparisons that say what differs."""

from __future__ import annotations

import numpy as np

# relative RMS error allowed between two ways to compute the same thing, by the dtype that results are rounded to
RELATIVE_RMS = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
ATTENTION_RMS = 1e-4  # latent attention against attention over decoded keys and values
CODES_DIFFERING = 1e-5  # share of codes that the last bit of a float32 transform may move, by one step
HOST_ROPE = 2e-4  # relative RMS; hosts compute angles in float32, at positions of some thousand


def relative_rms(got, expected) -> float:
    """Root of the mean squared error over the root of the mean square of `expected`."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    error = np.sqrt(np.mean(np.square(got - expected))) if got.size else 0.0
    size = np.sqrt(np.mean(np.square(expected))) if got.size else 0.0
    return float(error / size) if size else float(error)


def assert_close(name: str, got, expected, dtype: str = "float32", limit: float | None = None) -> None:
    """Raise AssertionError with the tensor's name unless the relative RMS error is within the limit of `dtype`."""
    limit = RELATIVE_RMS[dtype] if limit is None else limit
    error = relative_rms(got, expected)
    assert error <= limit, f"{name}: relative RMS error {error:.3g}, allowed {limit:.3g}"


def assert_scores_close(name: str, got, expected) -> None:
    """`assert_close` but for 1 token in 1,000 (of few tokens: two) that took the rank beside its own.

    Scores [..., T] may be mixed from ranks: two tokens that agree to the last bit of float32 may then change places.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    limit = RELATIVE_RMS["float32"] * np.sqrt(np.mean(np.square(expected)))
    moved = np.abs(got - expected) > 10 * limit
    assert np.count_nonzero(moved) <= max(2, got.size // 1000), f"{name}: {np.count_nonzero(moved)} tokens moved"
    one_rank = 1.001 / max(got.shape[-1] - 1, 1)
    assert (np.abs(got - expected)[moved] <= one_rank).all(), f"{name}: a token moved by more than one rank"
    assert_close(name, np.where(moved, expected, got), expected)


def assert_codes_close(name: str, got, expected) -> None:
    """Raise AssertionError if more than 1 code in 100,000 (of few codes: more than one) differs, or one by two steps."""
    got, expected = np.asarray(got).astype(int), np.asarray(expected).astype(int)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    step = np.abs(got - expected)
    allowed = max(1, int(step.size * CODES_DIFFERING))
    assert np.count_nonzero(step) <= allowed, f"{name}: {np.count_nonzero(step)} of {step.size} codes differ"
    assert not step.size or step.max() <= 1, f"{name}: a code differs by {step.max()} steps"

"""How far what a cache gives back is from what it was given: attention outputs, keys and values, and their spectra."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError
from ..planning.budget import SEAL


def output_errors(exact: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """||o - o_hat|| / ||o|| float64 [...] of attention outputs [..., D], before they are projected; `exact` are the o.

    Raises ValueError on NaN or infinity, and for other shapes.
    """
    if exact.shape != outputs.shape:
        raise ValueError(f"Expected attention outputs of shape {exact.shape}, received {outputs.shape}.")
    if not (np.isfinite(exact).all() and np.isfinite(outputs).all()):
        raise UsageError(
            "Expected finite attention outputs, received NaN or infinity: check the weights and the dtype."
        )
    exact, outputs = exact.astype(np.float64), outputs.astype(np.float64)
    return _ratio(np.linalg.norm(exact - outputs, axis=-1), np.linalg.norm(exact, axis=-1))


def output_perturbation(errors: Sequence[np.ndarray]) -> dict:
    """`aop`, `aop_p95`, `aop_max` over everything and `aop_layers`, the mean of every layer, of `output_errors` by layer."""
    every = np.concatenate([x.reshape(-1) for x in errors])
    return {
        "aop": float(every.mean()),
        "aop_p95": float(np.quantile(every, 0.95)),
        "aop_max": float(every.max()),
        "aop_layers": [float(x.mean()) for x in errors],
    }


def sealed_span(tokens: int, sinks: int, window: int, block: int = SEAL) -> slice:
    """Positions of `tokens` that a cache does not keep exactly, whose codec seals `block` tokens at a time."""
    return slice(sinks, sinks + max(tokens - sinks - window, 0) // max(block, SEAL) * max(block, SEAL))


def at_positions(held: np.ndarray, positions: np.ndarray | None, tokens: int) -> np.ndarray:
    """`held` [H, N, D] put to `positions` [H or 1, N] of [H, tokens, D], zero elsewhere; None: held are all, in order."""
    if positions is None:
        if held.shape[1] != tokens:
            raise ValueError(f"Expected the positions of {held.shape[1]:,} tokens out of {tokens:,}, received none.")
        return held
    whole = np.zeros((held.shape[0], tokens, held.shape[2]), held.dtype)
    np.put_along_axis(whole, np.broadcast_to(positions, held.shape[:2])[:, :, None], held, axis=1)
    return whole


def relative_error(exact: np.ndarray, held: np.ndarray, positions=None, span: slice = slice(None)) -> float:
    """Mean squared error over the mean square of `exact` [H, T, D] in `span`; `held` [H, N, D] stand at `positions` [H, N].

    A token that is not held counts as zero; a span without tokens has no error.
    """
    whole = at_positions(held, positions, exact.shape[1])[:, span].astype(np.float64)
    exact = exact[:, span].astype(np.float64)
    return float(_ratio(np.square(exact - whole).sum(), np.square(exact).sum()))


def spectral_fidelity(exact: np.ndarray, held: np.ndarray, positions=None, span: slice = slice(None)) -> float:
    """Mean over channels of the cosine of power spectra over time, weighted by the energy of `exact`; as `relative_error`.

    Says whether the frequencies of every channel kept their shares: 1 if so, whatever the phases; 1 without tokens.
    """
    whole = at_positions(held, positions, exact.shape[1])[:, span]
    if not whole.shape[1]:
        return 1.0
    p, q = (np.square(np.abs(np.fft.rfft(x.astype(np.float64), axis=1))) for x in (exact[:, span], whole))  # [H, F, D]
    lengths = np.sqrt(np.square(p).sum(1) * np.square(q).sum(1))
    cosines = np.divide((p * q).sum(1), lengths, out=np.zeros_like(lengths), where=lengths > 0)
    energy = p.sum(1)
    return float((energy * cosines).sum() / energy.sum()) if energy.any() else 1.0


def _ratio(error, size):
    """`error` / `size`; 0 where both are 0, infinite where only the size is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.divide(error, size))

"""Which tokens stay, given their scores: the same answer on every array library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError

MODES = ("per_layer_per_head", "per_head")  # every layer on its own; by the mean over layers (TriAttention has both)


def select(xp, scores, budget: int, sinks: int, window: int, protect: Sequence[tuple[int, int]] = (), positions=None):
    """Indices of the tokens that stay, int32 [B, H, min(budget, T)], ascending, for every KV head on its own.

    `scores` [B, H, T], higher stays; of equal ones the later. budget: tokens stored afterwards, the first `sinks` and the
    last `window` among them, which always stay, as do tokens at positions of `protect`, spans (start, end) without the
    end. positions: NumPy integers [T] or [B, H, T] of the stored tokens; None for 0, 1, ... Raises UsageError for a
    budget that what always stays exceeds, a span outside of the text, or scores with NaN or infinity.
    """
    tokens = scores.shape[-1]
    places = np.arange(tokens) if positions is None else np.asarray(positions)
    fixed = _fixed(tuple(scores.shape), budget, sinks, window, protect, places)
    kept = min(budget, tokens)
    order = xp.asarray(np.arange(tokens, dtype=np.int32), like=scores)
    if kept == tokens:
        return xp.zeros(scores.shape, dtype=xp.int32, like=scores) + order
    if not xp.all_finite(scores):
        raise UsageError("Expected finite scores, received NaN or infinity: check the weights and the dtype.")
    scores = xp.where(xp.asarray(fixed, like=scores), float("inf"), xp.astype(scores, xp.float32))
    # the smallest score that stays, then all above it and the latest that equal it: no order of a sort matters
    least = xp.sort(scores, axis=-1)[..., tokens - kept :][..., :1]
    above, equal = xp.astype(scores > least, xp.int32), xp.astype(scores == least, xp.int32)
    room = kept - xp.sum(above, axis=-1, keepdims=True)
    later = xp.sum(equal, axis=-1, keepdims=True) - xp.cumulative_sum(equal, axis=-1)  # equal ones behind this one
    stays = (above > 0) | ((equal > 0) & (later < room))
    return xp.sort(xp.where(stays, order, tokens), axis=-1)[..., :kept]


def _fixed(shape, budget, sinks, window, protect, places) -> np.ndarray:
    """Which tokens always stay, bool [T] or [B, H, T]; checks the request."""
    tokens = shape[-1]
    if min(sinks, window) < 0 or budget < 1:
        raise UsageError(
            f"Expected budget >= 1, sinks >= 0 and window >= 0, received budget={budget}, sinks={sinks}, window={window}."
        )
    if places.shape not in ((tokens,), shape):
        raise ValueError(f"Expected positions [T] or [B, H, T] of scores {shape}, received {places.shape}.")
    seen = int(places.max()) + 1 if places.size else 0
    slot = np.arange(tokens)
    fixed = np.broadcast_to((slot < sinks) | (slot >= tokens - window), places.shape)
    for start, end in protect:
        if not 0 <= start < end <= seen:
            raise UsageError(f"Expected protected spans within 0 and {seen}, received ({start}, {end}).")
        fixed = fixed | ((places >= start) & (places < end))
    needed = max(sinks + window, int(fixed.sum(-1).max(initial=0)))
    if budget < needed:
        raise UsageError(
            f"Expected a budget of at least {needed} tokens for {sinks} sinks, a window of {window} and what is protected, "
            f"received {budget}: raise the budget or protect less."
        )
    return fixed

"""StreamingLLM: the latest tokens stay."""

from __future__ import annotations

import numpy as np


def scores(xp, post_rope, positions):
    """Position of every token of `post_rope` [B, H, T, D] -> [B, H, T] float32, exact below 2^24 tokens.

    Xiao et al. 2023 (arXiv 2309.17453); the sinks are the selection's. Departure: keys are not turned to the slots of a
    rolling cache, positions stay true.
    """
    places = np.broadcast_to(np.asarray(positions, np.float32), tuple(post_rope.shape[:3]))
    return xp.asarray(np.ascontiguousarray(places), like=post_rope)

"""Random: the yardstick that every scorer has to beat."""

from __future__ import annotations

import numpy as np


def scores(xp, post_rope, positions, seed=0):
    """Uniform numbers in [0, 1) for the tokens of `post_rope` [B, H, T, D] -> [B, H, T] float32.

    A function of seed, head and position: a token keeps its score as the text grows and others go. Rows of a batch get
    the same numbers; give every layer its own `seed`.
    """
    shape = tuple(post_rope.shape[:3])
    places = np.broadcast_to(np.asarray(positions), shape)
    table = np.random.default_rng(seed).random((int(places.max()) + 1, shape[1]), np.float32)
    return xp.asarray(table[places, np.arange(shape[1])[:, None]], like=post_rope)

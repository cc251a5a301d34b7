"""Which token comes next."""

from __future__ import annotations

import math

import numpy as np

from ..errors import UsageError


class Sampler:
    """Chooses tokens by their logits: the most likely one at temperature 0, else at random.

    top_p: share of the probability, from the most likely token on, that is drawn from (Holtzman et al. 2020, The Curious
    Case of Neural Text Degeneration, section 3.1). seed: None draws anew every time. Raises UsageError for
    numbers out of range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None):
        if not 0 <= temperature < math.inf:
            raise UsageError(f"Expected `temperature` of at least 0, received {temperature:g}.")
        if not 0 < top_p <= 1:
            raise UsageError(f"Expected `top_p` above 0 and at most 1, received {top_p:g}.")
        self.temperature, self.top_p = temperature, top_p
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """A token for `logits` [vocabulary]."""
        if not self.temperature:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        order = np.argsort(-weights, kind="stable")
        shares = weights[order] / weights.sum()
        before = np.cumsum(shares) - shares
        shares = np.where(before < self.top_p, shares, 0.0)
        return int(order[self.random.choice(len(order), p=shares / shares.sum())])

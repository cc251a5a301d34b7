"""A row of docs/reference/models.md, whatever the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED

PIECES = (60, 40, 1, 1, 1, 1)  # tokens of every call
SAME = 1e-4  # most that a logit may differ from the host's own with `identity`
CLOSE = 0.01  # most KL of turboquant at 8 bits, all tokens coded; experts of random weights change with little
HEAD = (
    "| family | as codes | decoded | passed through | largest difference | KL at 8 bits |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """A family: its layers by way, with reasons, the largest difference of a logit, and the KL; None where refused."""

    family: str
    codes: str
    decoded: str
    passed: str
    difference: float | None = None
    kl: float | None = None

    @property
    def words(self) -> list[str]:
        """The columns that are the same on every machine."""
        return [self.family, self.codes, self.decoded, self.passed]

    def __str__(self) -> str:
        numbers = ["" if x is None else f"{x:.0e}" for x in (self.difference, self.kl)]
        return "| " + " | ".join([*self.words, *numbers]) + " |"


def words_of(layers) -> list[str]:
    """How many layers are attended as codes, and how many in another way, with the reason."""
    counts = Counter((layer.way, layer.reason) for layer in layers)
    of_way = {
        way: [(reason, n) for (one, reason), n in counts.items() if one == way] for way in (CODES, DECODED, PASSED)
    }
    words = ["; ".join(f"{n} with {reason}" for reason, n in of_way[way]) for way in (DECODED, PASSED)]
    return [str(sum(n for _, n in of_way[CODES]) or ""), *words]


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean KL of the distributions that logits [T, V] stand for."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((np.exp(p) * (p - q)).sum(-1).mean())

"""What the table of model families says of one, on either host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED, LayerSurvey

PIECES = (60, 40, 1, 1, 1, 1)  # tokens of the calls that a text is fed in
SAME = 1e-4  # most that a logit of `identity` may differ from the host's own
CLOSE = 0.01  # most KL of turboquant at 8 bits, all tokens coded: random weights and experts are sensitive


@dataclass(frozen=True)
class Row:
    """A family: layers by way and reason, the largest difference of a logit, and the KL at 8 bits; None where refused."""

    family: str
    ways: dict[str, dict[str, int]]
    difference: float | None = None
    kl: float | None = None
    refused: str = ""

    def markdown(self) -> str:
        """The line of a table."""
        codes = sum(self.ways.get(CODES, {}).values())
        texts = [_layers(self.ways.get(way, {})) for way in (DECODED, PASSED)]
        numbers = ["-" if x is None else _digits(x) for x in (self.difference, self.kl)]
        return " | ".join(("", self.family, str(codes or "-"), *texts, *numbers, "")).strip()


def row_of(
    family: str,
    layers: Sequence[LayerSurvey],
    difference: float | None = None,
    kl: float | None = None,
    refused: str = "",
) -> Row:
    """The row of a family whose layers were surveyed."""
    ways: dict[str, dict[str, int]] = {}
    for (way, reason), count in Counter((layer.way, layer.reason) for layer in layers).items():
        ways.setdefault(way, {})[reason] = count
    return Row(family, ways, difference, kl, refused)


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean KL of two sets of logits [T, V]."""
    p, q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in (expected, got)
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _layers(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count}: {reason}" for reason, count in sorted(reasons.items())) or "-"


def _digits(x: float) -> str:
    """The power of ten that bounds `x`: machines differ in the rest."""
    return f"< {10.0 ** np.ceil(np.log10(max(x, 1e-6))):.0e}"

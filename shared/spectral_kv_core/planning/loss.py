"""What quantizing a coefficient costs the model's predictions, by the reckoning that plans are made with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..profile.basis_set import BasisSet
from ..quantization.quantizer import BIT_WIDTHS

MEASURED_SHARE = 0.9  # of the measured cost beside the product model; results/experiments.md
COHERENCE = 3.0  # how much more an error that follows the signal costs than one that does not; results/experiments.md
MAX_EXPANSION = 1.35  # of decoded coefficients: a rare code of a wide dead zone is nearly right as it is
MIN_GAIN = 1e-3  # a frequency that costs next to nothing still has a defined rounding

Ratios = Mapping[int, float]  # by width: the squared error of a coupled quantizer, as a share of a scalar one's


def costs(basis_set: BasisSet, ratios: Ratios) -> np.ndarray:
    """Expected loss [L, G, R, F, W] of one coefficient of every band at every width, up to one common factor.

    J(b) = (beta * E[g^2 (y - Q_b(y))^2] + (1 - beta) * E[g^2] E[y^2] D(b)): the second-order loss of a Fisher
    metric (docs/decisions/rate-distortion.md, section 5), mostly measured, times `coherent_cost`. What was measured of
    scalar quantizers is worth as much less with another as its squared error is, by `ratios`.
    """
    product = basis_set.sensitivity.astype(np.float64) * basis_set.variance
    distortion = np.array(distortions(basis_set.levels, ratios))
    measured = basis_set.cost * (distortion / distortions(basis_set.levels))
    cost = MEASURED_SHARE * measured + (1 - MEASURED_SHARE) * product[..., None] * distortion
    return cost * coherent_cost(distortion)


def coefficient_loss(basis_set: BasisSet, layer_group: int) -> np.ndarray:
    """What losing a whole coefficient of a layer group costs [G, R, F] float64, up to one factor."""
    product = basis_set.sensitivity[layer_group].astype(np.float64) * basis_set.variance[layer_group]
    return MEASURED_SHARE * basis_set.cost[layer_group, ..., 0] + (1 - MEASURED_SHARE) * product


def rounding_gain(loss: np.ndarray) -> np.ndarray:
    """Root of what losing a whole coefficient costs, `loss` [G, R, F], relative to the largest of its component."""
    peak = loss.max(-1, keepdims=True)
    return np.sqrt(np.maximum(loss / np.where(peak > 0, peak, 1), MIN_GAIN**2))


def expansion(distortion):
    """What decoded coefficients are multiplied by, at a mean squared error D of their quantizer (in variances).

    A centroid quantizer decodes y to (1 - D) y and noise of variance D (1 - D). Attention averages the noise over tokens;
    what is lost, D y, points the same way in every token and component and flattens the scores. Where it costs
    k = `COHERENCE` times what noise costs, decoding to k / (D + k (1 - D)) times the centroid is best.
    """
    return np.minimum(COHERENCE / (distortion + COHERENCE * (1 - distortion)), MAX_EXPANSION)


def coherent_cost(distortion):
    """Cost at a mean squared error D, expansion included, in units of what D would cost as mere noise; 1 at D = 0."""
    expanded = expansion(distortion)
    lost = 1 - expanded * (1 - distortion)
    return COHERENCE * lost**2 / distortion + expanded**2 * (1 - distortion)


def distortions(levels: Mapping[int, np.ndarray], ratios: Ratios | None = None) -> list[float]:
    """Mean squared error in variances of the quantizers `levels` at every width, as much lower as `ratios` say."""
    scalar = [_distortion(levels[b]) for b in BIT_WIDTHS if b]
    return [1.0] + [d * (ratios or {}).get(b, 1.0) for b, d in zip(BIT_WIDTHS[1:], scalar)]


def _distortion(levels: np.ndarray) -> float:
    """Mean squared error of a quantizer on the standard normal density."""
    grid = np.linspace(-6, 6, 4001)
    density = np.exp(-(grid**2) / 2)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    error = ((grid - nearest) ** 2 * density).sum() / density.sum()
    return float(f"{error:.9g}")  # the last bits of exp and of a sum differ between machines

"""What coding one layer's keys, or its values, alone does to the predictions of a model, beside what their costs say.

Costs of coefficients come from gradients as if errors were independent of each other. Within a layer that is a matter of
degree; between layers it is off by factors: tokens that are the same word have the same keys in the first layer, and the
same error. So the sum of a layer's costs is set to the divergence that was measured
(docs/decisions/rate-distortion.md, section 5).

Bases per head alone: where keys and values share one, the layers' costs are right within what can be measured
(results/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from ..arrays import ops
from ..arrays.divergence import divergence
from ..codecs.registry import make_codec
from ..codecs.spectral import SpectralPlan
from ..planning.budget import SINKS, WINDOW
from ..planning.methods import DEFAULT_METHOD, METHODS
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile

PROBED = "head.post"  # the basis set of the method that is probed
DOCUMENTS = 9  # of a calibration, evenly spaced
BITS = 1.0  # enough of an error to show in half precision, little enough to add up over layers
PLACES = 4  # layers at which the noise of the model's own precision is measured
NOISE = 2.0**-9  # relative size of an error that a cache in bfloat16 has by itself
LARGEST = 32.0  # factor between what is measured and what costs say, at most; as much less at least

LogProbabilities = Callable[[dict[int, tuple]], np.ndarray]


def probed(shape: ModelShape, profile: Profile, documents: Iterable[tuple[list, LogProbabilities]]) -> None:
    """Set the costs per head of `profile` to what coding every layer's keys, and its values, is measured to do.

    `documents`: of each the keys and values [1, H, T, D] float32 of every compressible layer, and a function that gives
    log probabilities [scored, vocabulary] of the tokens behind them, with those of `{layer number: (keys,
    values)}` in the place of the layer's own. Costs and sensitivities are multiplied by measured over expected, the mean
    factor being 1.
    """
    basis_set = profile.basis_set(PROBED)
    plan = SpectralPlan.make(shape, profile, replace(METHODS[DEFAULT_METHOD], quantizer="scalar"), BITS)
    codecs = [make_codec(ops, plan, layer_group) for layer_group in range(len(shape.layers))]
    measured = np.zeros((len(codecs), 2))
    for held, log_p in documents:
        reference = log_p({})
        noise = _noise(held, log_p, reference)
        for n, (codec, exact) in enumerate(zip(codecs, held)):
            coded = _coded(codec, *exact)
            for side in (0, 1):
                changed = tuple(coded[i] if i == side else exact[i] for i in (0, 1))
                measured[n, side] += max(divergence(reference, log_p({n: changed})) - noise[n], 0.0)
    expected = plan.planned_loss().reshape(*measured.shape, -1).sum(-1)
    factors = measured / np.maximum(expected, np.finfo(np.float64).tiny)
    if not factors.any():
        return
    factors = factors / np.exp(np.log(factors[factors > 0]).mean())
    factors = np.clip(factors, 1 / LARGEST, LARGEST).astype(np.float32).repeat(shape.kv_heads, axis=1)[..., None, None]
    sensitivity, cost = basis_set.sensitivity * factors, basis_set.cost * factors[..., None]
    profile.basis_sets[PROBED] = replace(basis_set, sensitivity=sensitivity, cost=cost).rounded()


def _coded(codec, keys, values) -> list:
    """Keys and values [1, H, T, D] as a cache of `codec` has them."""
    tokens = max(keys.shape[2] - SINKS - WINDOW, 0) // codec.block * codec.block
    sealed, sides = slice(SINKS, SINKS + tokens), [keys.copy(), values.copy()]
    if not tokens:
        return sides
    decoded = codec.decode(codec.encode(keys[:, :, sealed], values[:, :, sealed], SINKS))
    for x, y in zip(sides, decoded):
        x[:, :, sealed] = y
    return sides


def _noise(held: list[tuple], log_p: LogProbabilities, reference: np.ndarray) -> np.ndarray:
    """Divergence [layers] that an error as small as rounding makes."""
    places = np.unique(np.linspace(0, len(held) - 1, PLACES).astype(int))
    found = []
    for n in places:
        rng = np.random.default_rng(n)
        changed = tuple(x * (1 + NOISE * rng.standard_normal(x.shape, np.float32)) for x in held[n])
        found.append(divergence(reference, log_p({n: changed})))
    return np.interp(np.arange(len(held)), places, found)

"""Calibration of an mlx-lm model."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from spectral_kv_core.calibration.layer_probing import LogProbabilities
from spectral_kv_core.calibration.profiler import ProfilerBase
from spectral_kv_core.profile.model_shape import ModelShape

from .capture import capture, probed_log_probabilities, score_gradients
from .integration import load_model, max_context, model_name, model_shape, weights_digest
from .ops import to_numpy


class SpectralProfiler(ProfilerBase):
    __doc__ = ProfilerBase.__doc__

    def load(self, name: str, quantize: str | None = None):
        return load_model(name, None, quantize)

    def describe(self, model) -> tuple[ModelShape, dict[int, str], str, str, int | None]:
        return *model_shape(model), weights_digest(model), model_name(model), max_context(model)

    def activations(self, model, shape: ModelShape, tokens: list[int]) -> Iterator[tuple]:
        cache = capture(model, tokens)
        for i in shape.layers:
            yield _arrays(cache[i])

    def probe(self, model, shape: ModelShape, tokens: list[int], scored: int) -> tuple[list, LogProbabilities]:
        cache = capture(model, tokens[:-scored])
        held = [tuple(to_numpy(x) for x in (cache[i].keys, cache[i].values)) for i in shape.layers]
        outputs = {}

        def log_p(changed: dict[int, tuple]) -> np.ndarray:
            layers = {shape.layers[n]: arrays for n, arrays in changed.items()}
            return to_numpy(probed_log_probabilities(model, cache, tokens[-scored:], layers, outputs))

        return held, log_p

    def vectors(self, model, shape: ModelShape, tokens: list[int], scored: int, seed: int) -> Iterator[tuple]:
        cache = capture(model, tokens[:-scored])
        gradients = score_gradients(model, cache, tokens[-scored:], self.samples, mx.random.key(seed))
        for i in shape.layers:
            sides = [np.stack([to_numpy(sample[i][side]) for sample in gradients]) for side in (0, 1)]
            yield *_arrays(cache[i]), *sides


def _arrays(layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries times the attention scale, keys and values of a captured layer of batch 1."""
    return to_numpy(layer.queries[0]) * layer.scale, to_numpy(layer.keys[0]), to_numpy(layer.values[0])

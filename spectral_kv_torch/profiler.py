"""Calibration of a transformers model."""

from __future__ import annotations

from spectral_kv_core.calibration.profiler import ProfilerBase
from spectral_kv_core.hosts.protocol import Captures

from . import integration, ops
from .capture import capture, captured, probed_log_probabilities, score_gradients


class SpectralProfiler(ProfilerBase):
    __doc__ = ProfilerBase.__doc__

    models, xp = integration, ops
    captures = Captures(capture, captured, score_gradients, probed_log_probabilities)

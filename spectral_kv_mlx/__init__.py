"""spectralkv on MLX: compressed KV caches for mlx-lm's `generate`."""

from spectral_kv_core.profile import Profile as SpectralProfile

from .cache import cache_nbytes
from .capture import capture
from .generation import make_prompt_cache
from .integration import load_model, restore
from .profiler import SpectralProfiler

__all__ = [
    "SpectralProfile",
    "SpectralProfiler",
    "cache_nbytes",
    "capture",
    "load_model",
    "make_prompt_cache",
    "restore",
]

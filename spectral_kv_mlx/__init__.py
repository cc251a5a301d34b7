"""spectralkv on MLX: compressed KV caches for mlx-lm's `generate`."""

from spectral_kv_core.profile.profile import Profile as SpectralProfile

from .capture import capture
from .compressor import SpectralKVCompressor
from .engine import InferenceEngine
from .generation import cache_nbytes, make_prompt_cache
from .integration import load_model, restore
from .profiler import SpectralProfiler
from .prompt_cache import load_prompt_cache, save_prompt_cache

__all__ = [
    "InferenceEngine", "SpectralKVCompressor", "SpectralProfile", "SpectralProfiler", "cache_nbytes", "capture",
    "load_model", "load_prompt_cache", "make_prompt_cache", "restore", "save_prompt_cache",
]  # fmt: skip

"""spectralkv on PyTorch: compressed KV caches for Hugging Face `generate`."""

from spectral_kv_core.profile.profile import Profile as SpectralProfile

from .cache import SpectralCache
from .capture import capture
from .compressor import SpectralKVCompressor
from .engine import InferenceEngine
from .generation import cache_nbytes, make_prompt_cache
from .integration import load_model, restore
from .profiler import SpectralProfiler
from .prompt_cache import load_prompt_cache, save_prompt_cache

__all__ = [
    "InferenceEngine", "SpectralCache", "SpectralKVCompressor", "SpectralProfile", "SpectralProfiler", "cache_nbytes",
    "capture", "load_model", "load_prompt_cache", "make_prompt_cache", "restore", "save_prompt_cache",
]  # fmt: skip

"""The quick start of the first spectral-kv library, as it was written but for the import, the model and its head_dim.

Run as `python seed_quick_start.py BACKEND MODEL FOLDER QUANTIZE`; prints what it found as JSON.
"""

import importlib
import json
import os
import sys

backend, MODEL, folder, quantize = sys.argv[1:]
spectral_kv = sys.modules["spectral_kv"] = importlib.import_module(f"spectral_kv_{backend}")
os.chdir(folder)

# 1. Profile a Model
from spectral_kv import SpectralProfiler  # noqa: E402

profiler = SpectralProfiler(target_energy=0.95, tokens=1024, document=512, progress=False)

profile = profiler.profile_from_model(MODEL, quantize=None if quantize == "none" else quantize)
profile.save("profiles/gemma2_2b")
print(profile.summary())

# 2. Compress KV Cache
from spectral_kv import SpectralKVCompressor, SpectralProfile  # noqa: E402

profile = SpectralProfile.load("profiles/gemma2_2b")

proj = profile.get_projection(layer=0, head=0)
compressor = SpectralKVCompressor(projection=proj, bits=4)

if backend == "torch":
    import torch

    randn = torch.randn
else:
    import mlx.core as mx

    def randn(*shape):
        return mx.random.normal(shape)


key_states = randn(32, profile.shape.head_dim)  # (seq_len, head_dim)
compressed = compressor.compress(key_states)

print(f"Compression: {compressor.compression_ratio():.1f}x")
print(f"VRAM saved:  {compressor.vram_saved_mb(100):.0f}MB per 100MB of KV cache")

# 3. Compute Attention in Latent Space
query = randn(1, profile.shape.head_dim)  # (1, head_dim)

scores = compressor.approximate_attention(compressed, query)

exact_scores = query @ key_states.T

# 4. Full Inference Engine
from spectral_kv import InferenceEngine  # noqa: E402

engine = InferenceEngine(
    model_name=MODEL,
    quantize=None if quantize == "none" else quantize,
    bits=4,
)
engine.load()  # Auto-calibrates spectral profile

result = engine.generate("Explain quantum entanglement in simple terms")
print(result)

# 5. Custom HuggingFace Cache
full = None
if backend == "torch":
    from spectral_kv import SpectralCache, SpectralProfile

    profile = SpectralProfile.load("profiles/gemma2_2b")
    cache = SpectralCache(profile, bits=4)

    key_states = torch.randn(1, profile.shape.kv_heads, 300, profile.shape.head_dim)
    value_states = torch.randn(1, profile.shape.kv_heads, 300, profile.shape.head_dim)
    # Use in your own inference loop
    full_keys, full_values = cache.update(
        key_states, value_states, layer_idx=0
    )  # fmt: skip
    full = [list(full_keys.shape), list(full_values.shape), float((full_keys - key_states).abs().max())]
    # the next token finds what went before compressed
    step = torch.randn(2, 1, profile.shape.kv_heads, 1, profile.shape.head_dim)
    full_keys, full_values = cache.update(*step, layer_idx=0)
    error = (full_keys[:, :, :300] - key_states).pow(2).mean() / key_states.pow(2).mean()
    full += [list((full_keys @ full_keys.transpose(2, 3)).shape), float(error)]

print(
    json.dumps(
        {
            "ratio": compressor.compression_ratio(compressed),
            "scores": list(scores.shape),
            "exact": list(exact_scores.shape),
            "result": result,
            "cache": int(engine.cache_nbytes),
            "compression": engine.cache_nbytes.compression,
            "full": full,
        }
    )
)

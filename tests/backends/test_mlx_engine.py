"""The inference engine under mlx-lm, with 4-bit weights too."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_models import save_llama  # noqa: E402
from test_engine import PROMPT, run_quick_start  # noqa: E402

from spectral_kv_core.profile.profile import Profile  # noqa: E402
from spectral_kv_core.profile.store import cached_profile_path  # noqa: E402
from spectral_kv_mlx import InferenceEngine, SpectralProfiler, cache_nbytes, load_model, make_prompt_cache  # noqa: E402
from spectral_kv_mlx.cache import SpectralKVCache  # noqa: E402
from spectral_kv_mlx.generation import generate  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALKV_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def model(folder):
    save_llama(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def profile(folder, model):
    profiler = SpectralProfiler(tokens=512, document=256, progress=False)
    made = profiler.profile_from_model(model, quantize="4bit")
    return made.save(cached_profile_path(made.shape))


@pytest.mark.slow
def test_the_first_librarys_quick_start(folder, model, profile):
    found = run_quick_start("mlx", model, folder, "4bit")
    assert found["scores"] == found["exact"] == [1, 32] and found["ratio"] > 3 and found["compression"] > 1


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_the_engine_answers_from_the_compressed_cache(model, profile, quantize):
    engine = InferenceEngine(model_name=model, quantize=quantize, bits=2).load()
    assert engine.profile.path == str(profile)
    answer = engine.generate(PROMPT, max_tokens=20, raw=True)
    assert all(isinstance(layer, SpectralKVCache) and layer.store.padding_groups[0].chunks for layer in engine.cache)
    assert engine.cache[0].plan.bits == 2 and engine.cache_nbytes == cache_nbytes(engine.cache)
    cache = make_prompt_cache(engine.model, Profile.load(profile), 2)
    tokens = engine.tokenizer.encode(PROMPT)
    made = generate(engine.model, engine.tokenizer, tokens, cache, 20, False, lambda token: None)
    assert answer == engine.tokenizer.decode(made.tokens, skip_special_tokens=True)


def test_weights_are_really_quantized(model):
    sizes = {}
    for quantize in (None, "8bit", "4bit"):
        loaded, _ = load_model(model, None, quantize)
        sizes[quantize] = sum(p.nbytes for _, p in tree_flatten(loaded.parameters()))
    # float32 weights against 4 or 8 bits and a scale and bias in float32 for every 64
    assert sizes["4bit"] < 0.3 * sizes[None] and 0.25 * sizes[None] < sizes["8bit"] < 0.45 * sizes[None]
    with pytest.raises(ValueError, match="4bit, 8bit"):
        load_model(model, None, "2bit")


def test_stored_4_bit_weights_stay_as_they_are(folder, model):
    from mlx_lm.convert import convert

    convert(model, str(folder / "4bit"), quantize=True, q_bits=4, q_group_size=32)
    plain, quantized = (load_model(folder / "4bit", None, q)[0] for q in (None, "8bit"))
    for (name, a), (_, b) in zip(tree_flatten(plain.parameters()), tree_flatten(quantized.parameters())):
        assert a.shape == b.shape and a.dtype == b.dtype, name

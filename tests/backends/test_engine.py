"""The inference engine under transformers, and the first library's quick start as it was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_checkpoint import save_tiny_checkpoint  # noqa: E402

from spectral_kv_core.compat.engine import check_quantize  # noqa: E402
from spectral_kv_core.profile.profile import Profile  # noqa: E402
from spectral_kv_core.profile.store import cached_profile_path  # noqa: E402
from spectral_kv_torch import InferenceEngine, SpectralProfiler, cache_nbytes, make_prompt_cache  # noqa: E402
from spectral_kv_torch.cache import SpectralKVLayer  # noqa: E402
from spectral_kv_torch.generation import generate  # noqa: E402
from spectral_kv_torch.integration import model_shape  # noqa: E402

HERE = Path(__file__).parents[1]
PROMPT = "There were 23 cups on the table, and nobody knew whose they were. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALKV_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def model(folder):
    return str(save_tiny_checkpoint(folder / "model"))


@pytest.fixture(scope="module")
def profile(folder, model):
    profiler = SpectralProfiler(tokens=512, document=256, progress=False)
    return profiler.profile_from_model(model).save(folder / "profile.safetensors")


@pytest.fixture(scope="module")
def engine(model, profile):
    return InferenceEngine(model, bits=2, profile=str(profile)).load()


def run_quick_start(backend: str, model: str, folder: Path, quantize: str) -> dict:
    environment = os.environ | {"SPECTRALKV_CACHE": str(folder / "cache"), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(HERE / "seed_quick_start.py"), backend, model, str(folder), quantize]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "SpectralProfile: " in done.stdout and "VRAM saved:" in done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_first_librarys_quick_start(folder, model):
    """With a profile in the cache folder, as after its first run: calibrating is tested apart."""
    profiler = SpectralProfiler(tokens=512, document=256, progress=False)
    made = profiler.profile_from_model(model)
    made.save(cached_profile_path(made.shape))
    found = run_quick_start("torch", model, folder, "none")
    assert found["scores"] == found["exact"] == [1, 32] and found["ratio"] > 3 and found["compression"] > 1
    keys, values, first_error, product, error = found["full"]
    assert keys == values == [1, 2, 300, 16] and product == [1, 2, 301, 301]
    assert first_error == 0 and 0 < error < 1  # a first call attends exactly; noise is no text of the profile


def test_the_engine_answers_from_the_compressed_cache(engine, profile):
    shown = []
    answer = engine.generate(PROMPT, max_tokens=30, raw=True, on_token=shown.append)
    layers = engine.cache.layers
    assert all(isinstance(layer, SpectralKVLayer) and layer.store.padding_groups[0].chunks for layer in layers)
    assert engine.cache.plan.bits == 2 and engine.cache_nbytes == cache_nbytes(engine.cache)
    assert engine.cache_nbytes.compression > 2  # in float32, with a window of 64 of 830 tokens
    tokens = engine.tokenizer.encode(PROMPT)
    cache = make_prompt_cache(engine.model, Profile.load(profile), 2)
    made = generate(engine.model, engine.tokenizer, tokens, cache, 30, False, lambda token: None)
    assert shown == made.tokens and answer == engine.tokenizer.decode(made.tokens, skip_special_tokens=True)
    first = engine.cache
    assert engine.generate(PROMPT, max_tokens=30, raw=True) == answer and engine.cache is not first


def test_options_reach_the_cache(model, profile):
    loaded = Profile.load(profile)
    engine = InferenceEngine(model, bits=3, profile=loaded, method="spectral-dense", window=16, sinks=2).load()
    engine.generate(PROMPT, max_tokens=3)
    assert engine.cache.plan.method.name == "spectral-dense" and engine.profile is loaded
    assert (engine.cache.layers[0].window, engine.cache.layers[0].sinks) == (16, 2)


def test_load_finds_or_makes_the_profile(folder, tmp_path, monkeypatch, caplog):
    model = str(save_tiny_checkpoint(tmp_path / "model"))
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    made = []
    calibrate = SpectralProfiler.profile_from_model

    def quickly(self, model, tokenizer):
        made.append(1)
        self.tokens, self.document, self.progress = 512, 256, False
        return calibrate(self, model, tokenizer)

    monkeypatch.setattr(SpectralProfiler, "profile_from_model", quickly)
    for _ in range(2):
        engine = InferenceEngine(model_name=model, bits=4).load()
    assert len(made) == 1 and engine.profile.path == str(cached_profile_path(model_shape(engine.model)[0]))


def test_wrong_use(model, profile, engine, folder):
    with pytest.raises(RuntimeError, match=r"engine\.load"):
        InferenceEngine(model).generate("Hello")
    with pytest.raises(ValueError, match="4bit, 8bit"):
        InferenceEngine(model, quantize="3bit")
    with pytest.raises(ValueError, match="for files"):
        InferenceEngine(model, method="spectral-stored")
    with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
        InferenceEngine(model, bits=9, profile=str(profile)).load()
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        InferenceEngine(model, profile="missing")
    other = str(save_tiny_checkpoint(folder / "other", "qwen3"))
    with pytest.raises(ValueError, match="is for"):
        InferenceEngine(other, profile=str(profile)).load()
    for arguments, message in ((("  ",), "empty"), (("Hi", 0), "at least 1"), (("x" * 5000,), "the model's context")):
        with pytest.raises(ValueError, match=message):
            engine.generate(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantized_weights_need_a_card(model, quantize):
    with pytest.raises(ValueError, match="CUDA card"):
        InferenceEngine(model_name=model, quantize=quantize, bits=4).load()
    with pytest.raises(ValueError, match="quantize=None"):
        SpectralProfiler().profile_from_model(model, quantize=quantize)


def test_quantize_belongs_to_a_name(engine):
    with pytest.raises(ValueError, match="name of a model to load"):
        SpectralProfiler().profile_from_model(engine.model, engine.tokenizer, quantize="4bit")
    assert check_quantize(None) is None and check_quantize("4bit") == "4bit"

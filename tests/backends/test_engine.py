"""The inference engine under both hosts, and the first library's quick start as it was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hosts import only
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.compat.engine import check_quantize
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.profile.store import cached_profile_path

HERE = Path(__file__).parents[1]
PROMPT = "There were 23 cups on the table, and nobody knew whose they were. " * 12
WEIGHTS = {"torch": None, "mlx": "4bit"}  # how the profile is calibrated: transformers wants a card for 4 bits


@pytest.fixture(scope="module", autouse=True)
def torch_writes_the_checkpoints():
    pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALKV_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def model(folder):
    return str(save_tiny_checkpoint(folder / "model"))


@pytest.fixture(scope="module")
def profile(host, model):
    """Where engines look for it."""
    profiler = host.SpectralProfiler(tokens=512, document=256, progress=False)
    made = profiler.profile_from_model(model, quantize=WEIGHTS[host.NAME])
    return made.save(cached_profile_path(made.shape))


@pytest.fixture(scope="module")
def engine(host, model, profile):
    return host.InferenceEngine(model, bits=2, profile=str(profile)).load()


@pytest.mark.slow
def test_the_first_librarys_quick_start(host, folder, model, profile):
    """With a profile in the cache folder, as after its first run: calibrating is tested apart."""
    environment = os.environ | {"SPECTRALKV_CACHE": str(folder / "cache"), "TRANSFORMERS_VERBOSITY": "error"}
    arguments = [host.NAME, model, str(folder), str(WEIGHTS[host.NAME]).lower()]
    command = [sys.executable, str(HERE / "seed_quick_start.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "SpectralProfile: " in done.stdout and "VRAM saved:" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["scores"] == found["exact"] == [1, 32] and found["ratio"] > 3 and found["compression"] > 1
    if host.NAME == "mlx":  # the cache of that part is one of transformers
        assert found["full"] is None
        return
    keys, values, first_error, product, error = found["full"]
    assert keys == values == [1, 2, 300, 16] and product == [1, 2, 301, 301]
    assert first_error == 0 and 0 < error < 1  # a first call attends exactly; noise is no text of the profile


def check_answer(host, engine, profile) -> None:
    """The engine's text, tokens and bytes are those of a compressed cache at 2 bits."""
    shown = []
    answer = engine.generate(PROMPT, max_tokens=30, raw=True, on_token=shown.append)
    assert all(map(host.is_compressed, host.layers(engine.cache)))
    assert all(row.store.padding_groups[0].chunks for row in host.leading_layers(engine.cache))
    assert host.leading_layers(engine.cache)[0].plan.bits == 2
    assert engine.cache_nbytes == host.cache_nbytes(engine.cache)
    assert engine.cache_nbytes.compression > 2  # in float32, with a window of 64 of 830 tokens
    prompt = engine.tokenizer.encode(PROMPT)
    cache = host.make_prompt_cache(engine.model, Profile.load(profile), 2)
    made = host.generate(engine.model, engine.tokenizer, prompt, cache, 30, False, lambda token: None)
    assert shown == made.tokens and answer == engine.tokenizer.decode(made.tokens, skip_special_tokens=True)


def test_the_engine_answers_from_the_compressed_cache(host, engine, profile):
    check_answer(host, engine, profile)
    first, answer = engine.cache, engine.generate(PROMPT, max_tokens=30, raw=True)
    assert engine.generate(PROMPT, max_tokens=30, raw=True) == answer and engine.cache is not first


@only("mlx", "transformers wants a card for quantized weights")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantized_weights_answer_too(host, model, profile, quantize):
    engine = host.InferenceEngine(model_name=model, quantize=quantize, bits=2).load()
    assert engine.profile.path == str(profile)
    check_answer(host, engine, profile)


def test_options_reach_the_cache(host, model, profile):
    loaded = Profile.load(profile)
    engine = host.InferenceEngine(model, bits=3, profile=loaded, method="spectral-dense", window=16, sinks=2).load()
    engine.generate(PROMPT, max_tokens=3)
    row = host.leading_layers(engine.cache)[0]
    assert row.plan.method.name == "spectral-dense" and engine.profile is loaded
    assert (row.store.window, row.store.sinks) == (16, 2)


def test_load_finds_or_makes_the_profile(host, tmp_path, monkeypatch):
    model = str(save_tiny_checkpoint(tmp_path / "model"))
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    made = []
    calibrate = host.SpectralProfiler.profile_from_model

    def quickly(self, model, tokenizer):
        made.append(1)
        self.tokens, self.document, self.progress = 512, 256, False
        return calibrate(self, model, tokenizer)

    monkeypatch.setattr(host.SpectralProfiler, "profile_from_model", quickly)
    for _ in range(2):
        engine = host.InferenceEngine(model_name=model, bits=4).load()
    assert len(made) == 1 and engine.profile.path == str(cached_profile_path(host.model_shape(engine.model)[0]))


def test_wrong_use(host, model, profile, engine, folder):
    with pytest.raises(RuntimeError, match=r"engine\.load"):
        host.InferenceEngine(model).generate("Hello")
    with pytest.raises(ValueError, match="4bit, 8bit"):
        host.InferenceEngine(model, quantize="3bit")
    with pytest.raises(ValueError, match="for files"):
        host.InferenceEngine(model, method="spectral-stored")
    with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
        host.InferenceEngine(model, bits=9, profile=str(profile)).load()
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        host.InferenceEngine(model, profile="missing")
    other = str(save_tiny_checkpoint(folder / "other", "qwen3"))
    with pytest.raises(ValueError, match="is for"):
        host.InferenceEngine(other, profile=str(profile)).load()
    for arguments, message in ((("  ",), "empty"), (("Hi", 0), "at least 1"), (("x" * 5000,), "the model's context")):
        with pytest.raises(ValueError, match=message):
            engine.generate(*arguments)


@only("torch", "MLX quantizes weights on every device")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantized_weights_need_a_card(host, model, quantize):
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("needs a machine without a card")
    with pytest.raises(ValueError, match="CUDA card"):
        host.InferenceEngine(model_name=model, quantize=quantize, bits=4).load()
    with pytest.raises(ValueError, match="quantize=None"):
        host.SpectralProfiler().profile_from_model(model, quantize=quantize)


def test_quantize_belongs_to_a_name(host, engine):
    with pytest.raises(ValueError, match="name of a model to load"):
        host.SpectralProfiler().profile_from_model(engine.model, engine.tokenizer, quantize="4bit")
    assert check_quantize(None) is None and check_quantize("4bit") == "4bit"


def weights(loaded) -> dict:
    """Parameters of an MLX model by name."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(loaded.parameters()))


@only("mlx", "transformers wants a card for quantized weights")
def test_weights_are_really_quantized(host, model):
    sizes = {}
    for quantize in (None, "8bit", "4bit"):
        loaded, _ = host.load_model(model, None, quantize)
        sizes[quantize] = sum(p.nbytes for p in weights(loaded).values())
    # float32 weights against 4 or 8 bits and a scale and bias in float32 for every 64
    assert sizes["4bit"] < 0.3 * sizes[None] and 0.25 * sizes[None] < sizes["8bit"] < 0.45 * sizes[None]
    with pytest.raises(ValueError, match="4bit, 8bit"):
        host.load_model(model, None, "2bit")


@only("mlx", "a format of mlx-lm")
def test_stored_4_bit_weights_stay_as_they_are(host, folder, model):
    from mlx_lm.convert import convert

    convert(model, str(folder / "4bit"), quantize=True, q_bits=4, q_group_size=32)
    plain, quantized = (weights(host.load_model(folder / "4bit", None, q)[0]) for q in (None, "8bit"))
    assert plain.keys() == quantized.keys()
    for name, array in plain.items():
        assert array.shape == quantized[name].shape and array.dtype == quantized[name].dtype, name
        np.testing.assert_array_equal(np.array(array), np.array(quantized[name]), err_msg=name)

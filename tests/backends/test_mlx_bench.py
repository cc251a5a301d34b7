"""`spectralkv bench` on MLX: the same rows, and steps that attend to what they should."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from bench_rows import MODEL_KEYS, TINY, check_reader, check_result
from mlx_lm.models import llama
from mlx_models import calibrate, make_model, make_tokens, save_llama

from spectral_kv_core.benchmark import bench as core
from spectral_kv_core.benchmark import synthetic
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cli import main as cli
from spectral_kv_core.planning.budget import SEAL
from spectral_kv_core.planning.methods import METHODS
from spectral_kv_core.profile.store import cached_profile_path
from spectral_kv_mlx import bench
from spectral_kv_mlx.generation import feed, fill, load_model, make_prompt_cache, plain_cache


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", (*TINY[:2], 64, TINY[3]))  # mlx-lm's groups of 64
    bench._field.cache_clear()
    monkeypatch.setattr(bench, "SWEEP_BYTES", 2**16)
    yield
    bench._field.cache_clear()


def test_steps_attend_to_what_they_should(monkeypatch):
    shape = synthetic.synthetic_shape("tiny")
    layer = bench.BenchLayer(shape, *synthetic.synthetic_vectors(shape, 200 + SEAL), "float32")
    outputs = []

    def seconds(self, run):
        out = run()
        outputs.append(np.array(out[0] if isinstance(out, tuple) else out))
        return 1.0

    monkeypatch.setattr(bench.BenchLayer, "seconds", seconds)
    for way in (*core.WAYS, "quantized"):
        step = getattr(layer, way)()
        step(), step()  # the cache is as it was
    host, again, gqa, _, grouped, _, quantized, same = outputs
    for other in (again, gqa, grouped):
        np.testing.assert_allclose(host, other, atol=1e-5)
    error = np.abs(quantized - host).mean() / np.abs(host).mean()
    assert np.array_equal(quantized, same) and 0.02 < error < 0.3  # of 4 bits
    plans = {}
    for name in ("spectral", "identity"):
        profile = synthetic.synthetic_profile(shape, [METHODS[name]])
        plans[name] = synthetic.synthetic_plan(shape, profile, METHODS[name], 2, "flat")
    step, nbytes = layer.compressed(plans["spectral"], 4, 64)
    assert nbytes == 2 * (200 - 128) * 2 * 64 * 4 + 128 * 2 * 2 * 64 * 2 // 8
    for _ in range(SEAL):
        step()
    with pytest.raises(StopIteration):
        step()
    outputs.clear()
    layer.compressed(plans["identity"], 4, 64)[0]()
    layer.middle = 200
    layer.gqa()()
    np.testing.assert_allclose(*outputs[-2:], atol=1e-5)


def test_a_layer_reads_call_by_call():
    shape, method = synthetic.synthetic_shape("tiny"), METHODS["identity"]
    check_reader(bench, shape, synthetic.synthetic_plan(shape, None, method, 2, "flat"))


def test_the_layer_command(capsys, monkeypatch):
    monkeypatch.setattr(core, "fresh_peak", core.measure_layer_peak)  # a new process does not know the shape
    arguments = ["--synthetic", "tiny", "--context", "150", "--methods", "spectral,affine", "--bits", "2"]
    assert cli.main(["bench", *arguments, "--backend", "mlx", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check_result(result, "mlx")
    assert [row["bits_per_element"] for row in result["rows"]] == [2, 2.5]
    assert all(row["ratio_to_host_quantized"] > 0 and row["dtype"] == "float32" for row in result["rows"])


def test_the_attention_clock_counts_and_restores(monkeypatch):
    kernels = []
    kernel = bench._gqa
    monkeypatch.setattr(bench, "_gqa", lambda q, *given: kernels.append(q.shape[1:3]) or kernel(q, *given))
    model, layers = make_model("gemma3"), (1, 3)  # the others have a sliding window
    assert [i for i in range(4) if type(plain_cache(model)[i]).__name__ == "KVCache"] == list(layers)
    tokens, logits = make_tokens(60), []
    plain = plain_cache(model)
    feed(model, tokens, plain)
    for way in (None, *core.WAYS):
        cache = plain_cache(model)
        fill(cache, plain)
        if way is None:
            logits.append(feed(model, [7], cache))
            continue
        with bench.attention_clock(model, cache, layers, way) as clock:
            logits.append(feed(model, [7], cache))
        assert clock.calls == len(layers) and clock.seconds > 0
        np.testing.assert_allclose(logits[-1], logits[0], atol=1e-3)
    assert kernels == [(4, 1)] * 2 + [(2, 2)] * 2  # heads and rows of the query
    with pytest.raises(ValueError, match="RotatingKVCache"):
        bench.quantized_cache(model, plain)


def test_compressed_caches_are_attended_as_codes_under_the_clock(monkeypatch):
    model = make_model("llama")
    profile, tokens = calibrate(model), make_tokens(203)
    cache = make_prompt_cache(model, profile, 2.0)
    feed(model, tokens, cache)
    before = llama.scaled_dot_product_attention
    monkeypatch.setattr(LayerCache, "dense", lambda self, *a: pytest.fail("decoded"))
    with bench.attention_clock(model, cache, (0, 1)) as clock:
        feed(model, [7], cache)
    assert clock.calls == 2 and cache[0].size() == 204 and llama.scaled_dot_product_attention is before


@pytest.mark.slow
def test_the_model_command_with_peaks_of_fresh_processes(capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(core, "REPEATS", 1)
    save_llama(tmp_path / "model")
    profile = calibrate(load_model(tmp_path / "model")[0])
    profile.save(cached_profile_path(profile.shape))
    arguments = ["--model", str(tmp_path / "model"), "--context", "120", "--bits", "2", "--backend", "mlx", "--json"]
    assert cli.main(["bench", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    check_result(result, "mlx")
    (row,) = result["rows"]
    assert set(row) >= MODEL_KEYS and all(row[key] > 0 for key in MODEL_KEYS)
    assert min(row["peak_bytes"], row["plain_peak_bytes"]) > 50e6

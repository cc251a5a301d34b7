"""`spectralkv eval` on MLX: a compressed cache takes over what a plain one has read."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from hosts import SMALL
from mlx_lm.models import llama
from mlx_models import calibrate, make_model, make_tokens, save_llama
from test_evaluation_tasks import check_perturbation, perturbation_by_hand

from spectral_kv_core.cli import main as cli
from spectral_kv_core.evaluation.documents import make_documents
from spectral_kv_core.evaluation.run import evaluate
from spectral_kv_core.evaluation.settings import Settings
from spectral_kv_core.evaluation.text import Text
from spectral_kv_mlx import SpectralProfiler, cache_nbytes, generation, make_prompt_cache, restore
from spectral_kv_mlx.generation import feed, fill, held_vectors, model_shape, plain_cache, recorded


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # gemma3 has layers with a sliding window
def test_filling_equals_reading_the_prefix(name):
    model = make_model(name)
    profile = calibrate(model)
    prefix, after = make_tokens(203), make_tokens(12, seed=3)
    plain = plain_cache(model)
    feed(model, prefix, plain)
    before = [np.array(layer.keys) for layer in plain]

    def score(cache):
        return np.concatenate([feed(model, [t], cache) for t in after]), cache_nbytes(cache)

    copied = plain_cache(model)
    fill(copied, plain)
    reference, _ = score(copied)
    for method, bits in (("spectral", 3.0), ("identity", None)):
        filled, read = (make_prompt_cache(model, profile, bits, method=method, **SMALL) for _ in range(2))
        fill(filled, plain)
        feed(model, prefix, read)
        (got, size), (expected, expected_size) = score(filled), score(read)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        assert (size, size.dense_nbytes) == (expected_size, expected_size.dense_nbytes)
        error = np.abs(got - reference).max()
        assert error < 2e-4 if method == "identity" else error > 1e-3  # the codes are really attended to
    for layer, keys in zip(plain, before):  # neither fill nor what follows touches the plain cache
        assert np.array_equal(np.array(layer.keys), keys)
    assert all(layer.offset == len(prefix) for layer in plain)


class CharacterTokenizer:
    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]


TEXT = Text("random", "".join(map(chr, make_tokens(1024, seed=9))))
SETTINGS = {"methods": ("identity", "spectral"), "bits": (1.0, 3.0, 8.0), "prefixes": (160,), "documents": 1, **SMALL}


def run(name, folder, **changes):
    model = make_model(name)
    profile, settings = calibrate(model), Settings(**SETTINGS | changes)
    names = {"model": name, "backend": "mlx"}
    result = evaluate(generation, model, CharacterTokenizer(), settings, [TEXT], folder, names=names, profile=profile)
    return result, model, profile


@pytest.mark.parametrize("name, step", [("llama", 1), ("gemma3", 3)])
def test_perturbation_is_that_of_plain_formulas(tmp_path, name, step):
    changes = {"methods": ("spectral",), "bits": (2.0,), "scored": 5, "step": step}
    result, model, profile = run(name, tmp_path, **changes, tasks=("text",))
    (document,) = make_documents(CharacterTokenizer(), [TEXT], Settings(**SETTINGS | changes), None)
    cache, plain = make_prompt_cache(model, profile, 2.0, **SMALL), plain_cache(model)
    feed(model, document.prefix, plain)
    fill(cache, plain)
    tokens = document.prefix + document.scored["text"][:-1]  # nothing is attended with the last one
    captured = SpectralProfiler().activations(model, model_shape(model)[0], tokens)
    held = held_vectors(cache, result["layers"])
    (row,) = result["rows"]
    check_perturbation(row, [perturbation_by_hand(x, y[:2], 160) for x, y in zip(captured, held)])


def test_dropped_tokens_by_plain_formulas(tmp_path):
    changes = {"methods": ("snapkv",), "scored": 2, "keep": (0.5, 1.0)}
    result, model, profile = run("gemma3", tmp_path, **changes, tasks=("text",))
    (document,) = make_documents(CharacterTokenizer(), [TEXT], Settings(**SETTINGS | changes), None)
    cache = make_prompt_cache(model, profile, method="snapkv", budget_tokens=80, **SMALL)
    feed(model, document.prefix, cache)
    shape = model_shape(model)[0]
    captured = SpectralProfiler().activations(model, shape, document.prefix + document.scored["text"][:1])
    held = list(held_vectors(cache, shape.layers))
    half, whole = result["rows"]
    check_perturbation(half, [perturbation_by_hand(x, y[:2], 160) for x, y in zip(captured, held)])
    assert all(positions.shape == (2, 80) for *_, positions in held)
    assert whole["aop_max"] < 1e-4 and whole["key_error"] < 1e-10 < 0.2 < half["key_error"]


def test_everything_shrinks_with_bits(tmp_path):
    changes = {"tasks": ("text", "drift", "needle"), "prefixes": (300,), "turns": 2, "turn_tokens": 24, "scored": 8}
    rows = run("llama", tmp_path, **changes, greedy=4)[0]["rows"]
    for task, names in {
        "text": ("kl", "aop", "key_error", "value_error"),
        "drift": ("kl", "kl_fresh", "aop"),
        "needle": ("needle_kl",),
    }.items():
        found = {}
        for row in (row for row in rows if row["task"] == task):
            found.setdefault((row["method"], row["bits"]), []).append([row[name] for name in names])
        exact, coarse, fine = (
            np.mean(found[job], axis=0) for job in (("identity", 16.0), ("spectral", 1.0), ("spectral", 8.0))
        )
        assert (exact < 1e-4).all() and (coarse > 2 * fine).all() and (fine > exact).all(), task
    assert all(row["first_divergence"] == 4 for row in rows if row["method"] == "identity" and row["task"] == "text")


def test_recording_leaves_the_model_as_it_was():
    model = make_model("llama")
    restore(model)
    host, tokens, cache = llama.scaled_dot_product_attention, make_tokens(37), plain_cache(model)
    with pytest.raises(KeyError), recorded(model, cache, (1,)) as calls:
        got = feed(model, tokens, cache)
        raise KeyError
    assert llama.scaled_dot_product_attention is host
    assert np.array_equal(got, feed(model, tokens, plain_cache(model)))
    assert set(calls) == {1} and len(calls[1]) == 1
    assert calls[1][0].outputs.shape == (4, 37, 32) and calls[1][0].keys.shape == (1, 2, 37, 32)


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    save_llama(tmp_path / "model")
    (tmp_path / "cups.txt").write_text(
        "".join(f"There were {i} cups on a table, nobody knew whose. " for i in range(40))
    )
    common = ["--model", str(tmp_path / "model"), "--backend", "mlx", "--text", str(tmp_path / "cups.txt")]
    assert cli.main(["profile", *common, "--tokens", "512", "--document", "256", "--quiet"]) == 0
    capsys.readouterr()
    arguments = [
        "--methods",
        "identity,spectral",
        "--bits",
        "3",
        "--prefix",
        "200",
        "--scored",
        "8",
        "--documents",
        "1",
    ]
    assert cli.main(["eval", *common, *arguments, "--output", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backend"] == "mlx" and "mlx-lm" in result["versions"] and result["dtype"] == "float32"
    kl = {(row["method"], row["task"]): row["kl"] for row in result["rows"]}
    assert kl["identity", "text"] < 1e-6 and kl["identity", "copy"] < 1e-6
    assert kl["spectral", "text"] > 1e-6 and kl["spectral", "copy"] > 1e-6

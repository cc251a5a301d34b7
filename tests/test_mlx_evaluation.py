"""`spectralkv eval` on MLX: a compressed cache takes over what a plain one has read."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_models import make_model, make_tokens, save_llama
from test_mlx_backend import SMALL, calibrate

from spectral_kv_core import cli
from spectral_kv_mlx import cache_nbytes, make_prompt_cache
from spectral_kv_mlx.generation import feed, fill, plain_cache


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

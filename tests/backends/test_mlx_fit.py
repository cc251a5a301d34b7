"""`spectralkv fit` on MLX: directories of bfloat16 and of 4-bit weights, counted without reading them."""

from __future__ import annotations

import json
import shutil

import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_models import make_model, make_tokens, save_llama  # noqa: E402
from torch_models import ByteTokenizer  # noqa: E402

from spectral_kv_core.benchmark.footprint import Budget, Stored  # noqa: E402
from spectral_kv_core.cli import main as cli  # noqa: E402
from spectral_kv_core.codecs.registry import make_plan  # noqa: E402
from spectral_kv_mlx import SpectralProfiler, cache_nbytes, load_model, make_prompt_cache  # noqa: E402
from spectral_kv_mlx import footprint as mlx_footprint  # noqa: E402
from spectral_kv_mlx.generation import feed, prefill  # noqa: E402
from spectral_kv_mlx.integration import model_shape  # noqa: E402

TEXT = ["The cups stood on the table, 23 of them, and nobody knew whose they were. " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "llama"
    save_llama(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder):
    from mlx_lm.convert import convert

    path = folder.parent / "llama-4bit"
    convert(str(folder), str(path), quantize=True, q_bits=4, q_group_size=32)
    return path


def nbytes(model) -> int:
    from mlx.utils import tree_flatten

    return sum(p.nbytes for _, p in tree_flatten(model.parameters()))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_of_4_bit_directories_too(folder, quantized, dtype, tmp_path):
    """With their files, and from config.json alone."""
    sizes = []
    for path in (folder, quantized):
        model, _ = load_model(path, dtype)
        found = mlx_footprint.footprint(str(path), dtype)
        assert found.weights_bytes == nbytes(model) and found.shape.mismatch(model_shape(model)[0]) is None
        assert found.element_bytes == (2 if dtype else 4)
        shutil.copy(path / "config.json", tmp_path / "config.json")
        assert mlx_footprint.footprint(str(tmp_path), dtype) == found
        sizes.append(found.weights_bytes)
    assert sizes[1] < sizes[0] / 2


def test_a_foreign_quantization_needs_its_files(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Download the model first"):
        mlx_footprint.footprint(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing at"):
        mlx_footprint.footprint("./nowhere")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_counts_are_those_of_a_filled_cache(name, monkeypatch):
    model = make_model(name)
    profiler = SpectralProfiler(tokens=512, document=512, progress=False, basis_sets=("head.post",))
    profile = profiler.profile_from_model(model, ByteTokenizer(), TEXT)
    monkeypatch.setattr(mlx_footprint, "skeleton", lambda name, dtype: model)
    found = mlx_footprint.footprint(name)
    stored = Stored(make_plan(found.shape, profile, "spectral", 2.0), mlx_footprint.table_nbytes)
    budget = Budget(found, stored, sinks=4, window=64, exact_bytes=found.element_bytes)
    for context in (60, 84, 1500, 2500):
        cache = make_prompt_cache(model, profile, 2.0)
        prompt = make_tokens(context)
        prefill(model, prompt[:-1], cache)
        feed(model, prompt[-1:], cache)
        size = cache_nbytes(cache)
        spare = (
            0 if not found.passed else len(found.passed) * found.layer_elements * 4 * 256
        )  # rotating caches grow in steps
        assert 0 <= int(size) - budget.cache_bytes(context) <= spare, context
        # the decode step makes some tables of its own when it first meets a length
        assert 0.75 * size.table_nbytes < budget.table_bytes(context) <= size.table_nbytes, context


def test_command(folder, capsys):
    arguments = [
        "fit",
        "--model",
        str(folder),
        "--backend",
        "mlx",
        "--memory",
        "60MB",
        "--context",
        "2000,4000",
        "--json",
    ]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["backend"] == "mlx" and {row["bits"] for row in result["rows"]} == {32.0, 16.0, 4.0, 3.0, 2.0, 1.0}
    assert cli.main([*arguments[:-5], "--memory", "10kB"]) == 2
    assert "for the weights" in capsys.readouterr().err

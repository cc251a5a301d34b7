"""Tiny models of every family that is tried out with mlx-lm, and the page that says what they get."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "families")]

import mlx_families  # noqa: E402
import mlx_rows  # noqa: E402

from spectral_kv_mlx.survey import model_shape, sketched_shape  # noqa: E402

pytestmark = pytest.mark.mlx
# one of every kind: the others are told from them by numbers alone, and run with the slow tests
QUICK = {
    "AFM 7B", "Cohere 2", "DBRX", "DeepSeek 2", "DeepSeek 3", "DeepSeek 3.2", "Falcon H1", "Gemma 2", "Gemma 3", "Gemma 3n",
    "Gemma 4, K = V", "Gemma 4, shared layers", "GPT-2", "GPT BigCode", "GPT-OSS", "Hunyuan, shared layers", "Llama",
    "Llama, one KV head", "Llama 4", "Mamba", "MiMo V2 Flash", "NanoChat", "Nemotron H", "Nemotron NAS", "OpenELM", "Phixtral",
    "PLaMo", "PLaMo 2", "Qwen 2 MoE", "Qwen 3.5", "SmolLM 3", "StableLM", "Step 3.5", "Youtu",
}  # fmt: skip
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in mlx_families.FAMILIES]


def page() -> dict[str, list[str]]:
    """The columns of every row of the page, by family."""
    text = (ROOT / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    lines = text.split("<!-- mlx -->")[1].split("<!-- end of mlx -->")[0].strip().splitlines()
    assert tuple(lines[:2]) == mlx_rows.HEAD
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row for row in rows}


def test_the_page_has_every_family():
    assert list(page()) == list(mlx_families.FAMILIES)
    assert set(mlx_families.FAMILIES) >= QUICK


@pytest.mark.parametrize("name", CASES)
def test_a_family(name):
    """As codes it gives what the host's own cache does, and the page says how; numbers differ between machines."""
    row, told = mlx_rows.row(name), page()[name]
    assert row.words == told[:4], "python docs/make_models_page.py --host mlx"
    assert (row.difference is None) == (told[4] == "")
    if row.difference is not None:
        assert row.difference <= mlx_rows.SAME and float(told[4]) <= mlx_rows.SAME
        assert row.kl <= mlx_rows.CLOSE and float(told[5]) <= mlx_rows.CLOSE


@pytest.mark.parametrize("name", ["Gemma 3n", "Step 3.5", "DeepSeek 3", "Nemotron H", "OpenELM", "GPT BigCode"])
def test_sizes_are_told_of_a_model_without_weights(name):
    """Of which MLX computes nothing, whatever its arguments call things."""
    model = mlx_families.tiny(name)
    shape, passed = sketched_shape(model)
    expected, known = model_shape(model)
    for size in ("num_layers", "hidden_size", "q_heads", "kv_heads", "head_dim", "layers", "widths"):
        assert getattr(shape, size) == getattr(expected, size)
    assert passed == known

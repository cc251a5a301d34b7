"""Tiny models of every family that is tried out with transformers, and the page that says what they get."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.24", reason="the page is that of transformers 5.24")

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "families")]

import torch_families  # noqa: E402
import torch_rows  # noqa: E402

# one of every kind: the others are told from them by numbers alone, and run with the slow tests
QUICK = {
    "llama", "nanochat", "nemotron", "qwen2_moe", "smollm3", "llama4_text", "mistral, window", "gemma3_text", "gemma2",
    "gpt_oss", "gemma3n_text", "gemma4_text", "gemma4_text, keys as values", "deepseek_v3", "mimo_v2_flash", "gpt2",
    "gpt_bigcode", "gptj", "bloom", "falcon", "diffllama", "doge", "bamba", "falcon_h1", "nemotron_h", "qwen3_5_text",
    "minimax", "mamba", "xlstm", "bart", "t5", "qwen2_5_vl",
}  # fmt: skip
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in torch_families.FAMILIES]


def page() -> dict[str, list[str]]:
    """The columns of every row of the page, by family."""
    text = (ROOT / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    lines = text.split("<!-- torch -->")[1].split("<!-- end of torch -->")[0].strip().splitlines()
    assert tuple(lines[:2]) == torch_rows.HEAD
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row for row in rows}


def test_the_page_has_every_family():
    assert list(page()) == list(torch_families.FAMILIES)
    assert set(torch_families.FAMILIES) >= QUICK


@pytest.mark.parametrize("name", CASES)
def test_a_family(name):
    """As codes it gives what the host's own cache does, and the page says how; numbers differ between machines."""
    row, told = torch_rows.row(name), page()[name]
    assert row.words == told[:4], "make architectures"
    assert (row.difference is None) == (told[4] == "")
    if row.difference is not None:
        assert row.difference <= torch_rows.SAME and float(told[4]) <= torch_rows.SAME
        assert row.kl <= torch_rows.CLOSE and float(told[5]) <= torch_rows.CLOSE

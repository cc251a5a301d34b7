"""The table of texts that a profile does not know says where the aim is missed, and its texts are what they should be."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """A module of `results/` or `tools/` by its path."""

    def load(path: str):
        monkeypatch.syspath_prepend(str(ROOT / Path(path).parent))
        name = Path(path).stem
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_rows_that_miss_the_aim_are_named(module, monkeypatch, tmp_path):
    tables = module("results/tables.py")
    monkeypatch.setattr(tables, "HERE", tmp_path)

    def row(text, kl, prose, affine, held=90):
        beside = {
            "prose": {"kl": prose, "bits": 3.5, "cache_bytes": 110},
            "affine": {"kl": affine, "bits": 8.5, "cache_bytes": held},
        }
        return {"text": text, "bits": 3.0, "kl": kl, "cache_bytes": 100, "exact_tokens": 70.0, "beside": beside}

    rows = [row("good", 0.003, 0.001, 0.003, 100), row("far", 0.0031, 0.001, 0.5), row("worse", 0.5, 0.4, 0.1)]
    prose = {"text": "prose", "bits": 3.0, "kl": 0.001, "cache_bytes": 100, "extra_codes": 0.004}
    (tmp_path / "made.json").write_text(json.dumps({"rows": [prose, *rows]}))
    lines = tables.outliers("made").splitlines()
    assert len(lines) == 2 + 3
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["-", "prose", "affine"]
    assert "8.5 at most" in lines[3] and "at most" not in lines[2]


def test_texts_are_long_and_of_their_kinds(module):
    found = module("tools/outlier_texts.py")
    texts = found.texts()
    assert list(texts) == ["base64", "table of numbers", "emoji", "Chinese", "Arabic", "code with long indents"]
    assert all(len(text) > 2000 for text in texts.values()) and texts == found.texts()
    assert texts["base64"].isascii() and not texts["Chinese"].isascii()
    lines = texts["code with long indents"].splitlines()
    assert all(line.startswith(" " * 24) for line in lines)
    compile("if True:\n" + "\n".join(lines[:4]), "code", "exec")
    assert {name: times for name, (_, times) in found.openings().items()}["120 newlines, prose"] == 120

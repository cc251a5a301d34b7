"""Where results say that they come from, and that no folder of this machine is in it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from spectral_kv_core import __version__
from spectral_kv_core.benchmark.provenance import command_line, provenance
from spectral_kv_core.evaluation.report import provenance_line

HOST = SimpleNamespace(HOST_PACKAGES=("safetensors", "no-such-package"))


@pytest.mark.parametrize("arguments, expected", [
    (["/home/me/.venv/bin/spectralkv", "eval", "--model", "/data/models/tiny"], "spectralkv eval --model tiny"),
    (["/x/spectral_kv_core/cli/__main__.py", "bench"], "spectralkv bench"),
    (["spectralkv", "eval", "--text", "prose=/data/a b.txt", "--output", "out/run"],
     "spectralkv eval --text 'prose=a b.txt' --output out/run"),
    (["spectralkv", "eval", "--text=/a/b.txt", "--profile", "~/p/q.safetensors", "--bits", "3,2"],
     "spectralkv eval --text=b.txt --profile q.safetensors --bits 3,2"),
    (["spectralkv", "eval", "--model", "owner/name", "/data/folder/"], "spectralkv eval --model owner/name folder/"),
])  # fmt: skip
def test_a_command_has_no_folder_of_this_machine(arguments, expected):
    assert command_line(arguments) == expected


def test_what_tells_results_apart_is_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/spectralkv", "eval", "--model", "/somewhere/model"])
    found = provenance(HOST, threads=3, weights="w", plans={"spectral at 3 bits": "p"}, texts={"prose": "t"})
    assert found["spectralkv"] == __version__ and set(found["packages"]) == {"numpy", "safetensors", "python"}
    assert (found["weights"], found["plans"], found["texts"]) == ("w", {"spectral at 3 bits": "p"}, {"prose": "t"})
    assert found["threads"] == 3 and found["cores"] > 0 and found["cpu"]
    assert datetime.now(UTC) - datetime.fromisoformat(found["date"]) < timedelta(minutes=1)
    assert "somewhere" not in json.dumps(found)
    line = provenance_line(found)
    assert "`spectralkv eval --model model`" in line and "3 threads" in line and found["date"][:10] in line

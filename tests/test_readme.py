"""README's examples run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def example(package: str, first: str = "cache_nbytes") -> str:
    """The first code block of README that imports `first` before other names from `package`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if f"from {package} import {first}" in block)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_quick_start_of_torch():
    pytest.importorskip("torch")
    assert re.search(r"[\d,]+ bytes, [2-9]\.\d times smaller", run(example("spectral_kv_torch")))


@pytest.mark.slow
def test_quick_start_of_the_first_library():
    pytest.importorskip("torch")
    *_, compression, correlation, saved = run(example("spectral_kv_torch", "InferenceEngine")).strip().splitlines()
    assert float(compression) > 2 and float(re.search(r"0\.\d+", correlation)[0]) > 0.98
    assert re.fullmatch(r"4\.\dx, 7\d MB saved per 100 MB", saved)


def test_figures_are_those_of_the_makefile():
    """README shows what `make figures` draws."""
    (command,) = re.findall(
        r"spectralkv plot (results/\S+)\.json --only (\w+) --output (\S+)", (ROOT / "Makefile").read_text()
    )
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert shown == [f"{command[2]}/{Path(command[0]).name}_{command[1]}.png"]
    assert (ROOT / shown[0]).stat().st_size < 150_000


def test_commands_and_files_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert f"\n{target}:" in makefile
    for name in re.findall(r"`((?:profiles|shared|results)/[^`]+)`", text):
        assert (ROOT / name).exists(), name

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
    """README and the pages of results/ show what `make figures` draws."""
    drawn = set()
    for line in re.findall(r"^\t\$\(PLOT\) (.+)", (ROOT / "Makefile").read_text(), re.M):
        only = re.search(r"--only (\S+)", line)
        pictures = only[1].split(",") if only else ("spectrum", "ranks", "bits")  # those of a profile
        files = re.findall(r"(\S+)\.(?:json|safetensors)", line)
        drawn |= {f"results/figures/{Path(file).name}_{picture}.png" for file in files for picture in pictures}
    for page in (ROOT / "README.md", *(ROOT / "results").glob("*.md")):
        for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text()):
            path = (page.parent / name).resolve()
            assert str(path.relative_to(ROOT)) in drawn, f"{page.name}: {name}"
            assert path.stat().st_size < 200_000, name
    assert {path.name for path in (ROOT / "results" / "figures").iterdir()} == {Path(name).name for name in drawn}


def test_commands_and_files_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text() + (ROOT / "results" / "measure.mk").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert f"\n{target}:" in makefile
    for name in re.findall(r"`((?:profiles|shared|results)/[^`]+)`", text):
        assert (ROOT / name).exists(), name

"""README's examples run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def example(package: str) -> str:
    """The first code block of README that imports make_prompt_cache and load_model from `package`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if f"from {package} import cache_nbytes" in block)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_quick_start_of_torch():
    pytest.importorskip("torch")
    assert re.search(r"[\d,]+ bytes, [2-9]\.\d times smaller", run(example("spectral_kv_torch")))


def test_commands_and_files_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert f"\n{target}:" in makefile
    for name in re.findall(r"`((?:profiles|shared|results)/[^`]+)`", text):
        assert (ROOT / name).exists(), name

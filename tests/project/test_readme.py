"""README runs as it is pasted, names what exists, and stays a front door of one page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(package: str) -> str:
    """The code block of README that imports from `package`."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(block for block in blocks if f"from {package} import" in block)


def run(code: str) -> str:
    openblas = next(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0"), None)  # see the Makefile
    env = {**os.environ, **({"LD_PRELOAD": str(openblas)} if openblas and "mlx" in code else {})}
    warned = "error:`past_key_values`:FutureWarning"  # a name that transformers gives up
    result = subprocess.run(
        [sys.executable, "-W", warned, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("host", ["torch", "mlx"])
def test_quick_start(host):
    pytest.importorskip({"torch": "torch", "mlx": "mlx_lm"}[host])
    assert re.search(r"[\d,]+ bytes, [2-9]\.\d times smaller", run(example(f"spectral_kv_{host}")))


def test_readme_is_a_front_door_of_one_page():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200
    assert README.count("\n| --- |") == 1, "one table"
    assert len(re.findall(r"!\[", README)) == 1, "one picture"


def shell_lines() -> list[str]:
    """What README asks to type, without remarks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    return [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_installs_from_a_checkout():
    """Until there is a release no line may name the package index, or a host to clone from."""
    lines = [line for line in shell_lines() if line.startswith("pip ")]
    assert len(lines) == 3
    assert all(line.startswith('pip install ".[') for line in lines), lines
    assert "git clone" not in README


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("pip ")])
def test_install_line_names_an_extra_of_the_project(line):
    """The line itself, dry: pip reads the project and would install it; what the extra brings is not fetched."""
    *_, target = shlex.split(line)
    extra = re.fullmatch(r"\.\[(\w+)\]", target)[1]
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    options = ["--dry-run", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", *shlex.split(line), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Would install spectralkv-" in result.stdout
    assert "does not provide the extra" not in result.stderr


def test_make_lines_are_targets_that_make_knows():
    targets = [line.split()[1] for line in shell_lines() if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    demo = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "spectralkv generate --model demo" in demo


def test_figures_are_those_of_the_makefile():
    """README, docs/ and the pages of results/ show what `make figures` draws."""
    drawn = set()
    for line in re.findall(r"^\t\$\(PLOT\) (.+)", (ROOT / "Makefile").read_text(), re.M):
        only = re.search(r"--only (\S+)", line)
        pictures = only[1].split(",") if only else ("spectrum", "ranks", "bits")  # those of a profile
        files = re.findall(r"(\S+)\.(?:json|safetensors)", line)
        drawn |= {f"results/figures/{Path(file).name}_{picture}.png" for file in files for picture in pictures}
    for page in (ROOT / "README.md", *(ROOT / "results").glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text()):
            path = (page.parent / name).resolve()
            assert str(path.relative_to(ROOT)) in drawn, f"{page.name}: {name}"
            assert path.stat().st_size < 200_000, name
    assert {path.name for path in (ROOT / "results" / "figures").iterdir()} == {Path(name).name for name in drawn}


def test_files_that_readme_names_exist():
    for name in re.findall(r"`((?:profiles|shared|results|docs)/[^`]+)`", README):
        assert (ROOT / name).exists(), name

"""The installed wheel, not only the checkout: packages, command, profile and calibration text are inside."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("spectralkv-*.whl"))


def test_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, target in (
        ("shared/spectral_kv_core", "spectral_kv_core"),
        ("spectral_kv_torch", "spectral_kv_torch"),
        ("spectral_kv_mlx", "spectral_kv_mlx"),
        ("profiles", "spectral_kv_core/profiles"),
    ):
        for path in (ROOT / source).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{target}/{path.relative_to(ROOT / source).as_posix()}" in names, path
    assert not any(name.startswith(("tests/", "results/")) for name in names)


def test_installed_wheel_works(wheel, tmp_path):
    """From a folder of its own, with the checkout out of reach."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)],
        check=True,
        capture_output=True,
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import spectral_kv_core; assert spectral_kv_core.__file__.startswith(sys.argv[1])\n"
        "from spectral_kv_core.calibration.text import load_default_texts\n"
        "from spectral_kv_core.profile.store import packaged_profiles\n"
        "from spectral_kv_core.profile.profile import Profile\n"
        "from spectral_kv_core.cli.main import main\n"
        "assert sum(map(len, load_default_texts())) > 300_000\n"
        "(path,) = packaged_profiles(); assert str(path).startswith(sys.argv[1])\n"
        "assert Profile.load(path).shape.num_layers == 30\n"
        "raise SystemExit(main(['inspect', str(path), '--bits', '2']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and "Plan: spectral at 2 bits" in result.stdout, result.stderr

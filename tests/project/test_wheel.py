"""The installed wheel, not only the checkout: packages, command, profile, texts and kernels are inside."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from spectral_kv_core.native.variants import variants_of

ROOT = Path(__file__).parents[2]
PACKAGES = {  # by where they lie in a wheel
    "spectral_kv_core": "shared/spectral_kv_core",
    "spectral_kv_torch": "spectral_kv_torch",
    "spectral_kv_mlx": "spectral_kv_mlx",
    "spectral_kv_core/profiles": "profiles",
}
# stands in for a compiler: notes that it was called, and writes an empty file where the library should be
COMPILER = """#!/bin/sh
echo call >> "$0.calls"
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.fixture
def compiler(tmp_path) -> Path:
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return path


def build(folder: Path, **variables: str) -> Path:
    """The wheel of the checkout, built with environment `variables`."""
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
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return next(folder.glob("spectralkv-*.whl"))


def files_of(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def files_of_checkout() -> set[str]:
    return {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for target, source in PACKAGES.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), SPECTRALKV_BUILD_KERNELS="0")


def test_a_wheel_without_kernels_holds_the_packages_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert files_of(wheel) == files_of_checkout()


@pytest.mark.skipif(not variants_of(platform.machine()), reason="this processor has no libraries")
def test_a_wheel_with_kernels_is_of_one_platform_and_any_python(tmp_path, compiler):
    wheel = build(tmp_path, SPECTRALKV_BUILD_KERNELS="require", CC=str(compiler))
    folders = "spectral_kv_core/native", "spectral_kv_torch/kernels"
    libraries = {f"{folder}/prebuilt/{v.name}.so" for folder in folders for v in variants_of(platform.machine())}
    assert files_of(wheel) == files_of_checkout() | libraries
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    (about,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/WHEEL"))
    assert "Root-Is-Purelib: false" in zipfile.ZipFile(wheel).read(about).decode()


@pytest.mark.slow
def test_a_compiler_that_fails_gives_a_wheel_without_kernels_unless_they_are_required(tmp_path, compiler):
    compiler.write_text("#!/bin/sh\necho 'fatal: no memory' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="cannot build the kernels: fatal: no memory"):
        build(tmp_path, SPECTRALKV_BUILD_KERNELS="require", CC=str(compiler))
    wheel = build(tmp_path, SPECTRALKV_BUILD_KERNELS="", CC=str(compiler))
    assert wheel.name.endswith("-any.whl") and files_of(wheel) == files_of_checkout()


def test_an_editable_install_builds_nothing(tmp_path, compiler):
    code = "import sys; from setuptools.build_meta import build_editable; print(build_editable(sys.argv[1]))"
    variables = {**os.environ, "SPECTRALKV_BUILD_KERNELS": "require", "CC": str(compiler)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert not Path(f"{compiler}.calls").exists()
    assert not list(ROOT.glob("s*/**/prebuilt"))


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


@pytest.fixture(scope="module")
def wheels():
    """The script of `make wheels`."""
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci" / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_platform_is_the_one_that_auditwheel_states(wheels):
    report = (
        'a.whl is consistent with the\nfollowing platform tag:\n"manylinux_2_17_x86_64".\n\nThe wheel references "x".'
    )
    assert wheels.tag_of(report) == "manylinux_2_17_x86_64"
    with pytest.raises(SystemExit, match="Expected a platform tag"):
        wheels.tag_of("a.whl is not a wheel")


@pytest.mark.parametrize(
    "tag, expected",
    [
        ("manylinux_2_17_x86_64", True),
        ("manylinux_2_5_x86_64", True),
        ("manylinux_2_28_x86_64", False),
        ("manylinux_2_17_aarch64", False),
        ("linux_x86_64", False),
    ],
)
def test_a_wheel_for_younger_systems_is_refused(wheels, tag, expected):
    assert wheels.is_as_old(tag, "manylinux_2_17_x86_64") == expected


def test_the_wheel_is_tried_where_nothing_can_be_built(wheels, monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "WORK", tmp_path)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("SPECTRALKV_CACHE", "/somewhere")
    bare = wheels.bare_environment()
    assert set(bare) <= {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR"} and not list(Path(bare["PATH"]).iterdir())


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.slow
def test_the_check_of_a_wheel_refuses_kernels_that_are_not_of_it(tmp_path):
    """As in this checkout, whose kernels are built: it passes with --built, and fails without."""
    check = [sys.executable, str(ROOT / ".ci" / "check_wheel.py")]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'shared'}{os.pathsep}{ROOT}"}
    built, failed = (
        subprocess.run([*check, *more], capture_output=True, text=True, cwd=tmp_path, env=variables)
        for more in (["--built"], [])
    )
    assert built.returncode == 0 and "  core: built here\n" in built.stdout, built.stderr
    assert failed.returncode and "Expected a library of the wheel in" in failed.stderr

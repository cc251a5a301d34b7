"""The packages, and wheels with the C kernels built in; everything else stands in pyproject.toml.

A wheel is of one platform where a C compiler is found when it is built, else pure: then kernels are built at first use.
SPECTRALKV_BUILD_KERNELS=require fails instead of a pure wheel, SPECTRALKV_BUILD_KERNELS=0 asks for one. CC names the
compiler. Editable installs build nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = {  # C files by where they lie in a wheel
    "spectral_kv_core/native": ROOT / "shared/spectral_kv_core/native",
    "spectral_kv_torch/kernels": ROOT / "spectral_kv_torch/kernels",
}


def load(name: str):
    """A module of the core by its file: the package cannot be imported without what it depends on."""
    spec = importlib.util.spec_from_file_location(f"_{name}", KERNELS["spectral_kv_core/native"] / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain, variants = load("toolchain"), load("variants")


def machine() -> str:
    """The processor that the wheel is for, as `platform.machine` says it there; `universal2` has no libraries."""
    return sysconfig.get_platform().rpartition("-")[2]


def build_kernels(target: Path) -> bool:
    """Put the libraries of all variants into the folder `target` of a wheel; returns whether that was possible."""
    wanted = os.environ.get("SPECTRALKV_BUILD_KERNELS", "")
    must = wanted.lower() in ("1", "require")
    chosen = variants.variants_of(machine())
    compiler = None if wanted == "0" or os.name != "posix" else toolchain.find_compiler()
    if wanted == "0" or compiler is None or not chosen:
        if must:
            raise SystemExit(
                f"Expected a C compiler and a processor among {variants.X86 + variants.ARM} to build kernels, found "
                f"{' '.join(compiler or ['no compiler'])} and {machine()}. Install a compiler, or name one with CC."
            )
        return False
    compiler += shlex.split(os.environ.get("ARCHFLAGS", ""))
    made = []
    try:
        for place, folder in KERNELS.items():
            for variant in chosen:
                library = variant.path(target / place)
                library.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory() as work:
                    built = toolchain.compile_library(compiler, folder, variant.flags, Path(work))
                    shutil.copyfile(built, library)
                made.append(library)
                print(f"built {library.relative_to(target)} with {compiler[0]}")
    except (OSError, subprocess.SubprocessError) as error:
        if must:
            raise SystemExit(f"{' '.join(compiler)} cannot build the kernels: {toolchain.reason(error)}") from error
        print(f"{' '.join(compiler)} cannot build the kernels, the wheel goes without: {toolchain.reason(error)}")
        for library in made:
            library.unlink()
        return False
    return True


class BuildPackages(build_py):
    """Packages, then kernels. What an earlier build left is not taken along."""

    has_kernels = False

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        for package in ("spectral_kv_core", "spectral_kv_torch", "spectral_kv_mlx"):
            shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()
        self.has_kernels = build_kernels(Path(self.build_lib))


class Wheel(bdist_wheel):
    """No Python ABI is asked for: ctypes loads the kernels."""

    def run(self) -> None:
        self.run_command("build")
        has_kernels = self.get_finalized_command("build_py").has_kernels
        self.root_is_pure = not has_kernels
        self.distribution.has_ext_modules = lambda: has_kernels  # says where an installer puts the packages
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    packages=[
        *find_packages("shared", include=["spectral_kv_core*"]),
        "spectral_kv_core.profiles",  # the folder profiles: data only
        *find_packages(include=["spectral_kv_torch*", "spectral_kv_mlx*"]),
    ],
    cmdclass={"build_py": BuildPackages, "bdist_wheel": Wheel},
)

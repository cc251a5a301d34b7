"""C kernels, compiled with the compiler that is there, once per machine and version."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from ..files.paths import user_cache_dir

HERE = Path(__file__).parent
FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{HERE}")
VARIANTS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes; clang says mcpu on ARM
TIMEOUT = 120  # seconds


def disabled() -> bool:
    """Whether SPECTRALKV_KERNELS=0 asks for the operations of the array library."""
    return os.environ.get("SPECTRALKV_KERNELS") == "0"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The core's kernels; None where there is no compiler, or where they are `disabled`."""
    return compiled(HERE, VARIANTS, "codes are chosen one by one in place of a trellis search")


def compiled(folder: Path, variants: tuple, otherwise: str) -> ctypes.CDLL | None:
    """The C files of `folder` with the first of `variants` of flags that the compiler takes; None as for `library`.

    The first call on a machine takes some seconds and leaves the result in the user cache folder. `otherwise`: what a
    warning says where the compiler fails.
    """
    if disabled() or platform.system() == "Windows":
        return None
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None or not _developer_tools():
        return None
    sources = sorted({*folder.glob("*.[ch]"), *HERE.glob("*.h")})
    try:
        return _load(compiler, sources, variants)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"{compiler} cannot build spectralkv's kernels ({reason[-1] if reason else error!r}); {otherwise}. "
            "SPECTRALKV_KERNELS=0 silences this.",
            stacklevel=3,
        )
        return None


def _developer_tools() -> bool:
    """Whether a compiler that is found is one: on a Mac without Apple's tools `cc` opens a dialog that offers them."""
    if platform.system() != "Darwin":
        return True
    return subprocess.run(["xcode-select", "-p"], capture_output=True, timeout=TIMEOUT).returncode == 0


def _load(compiler: str, sources: list[Path], variants: tuple) -> ctypes.CDLL:
    flags = FLAGS[:-1]  # the folder of the headers says nothing about them
    digest = hashlib.sha256(repr((compiler, flags, variants, _cpu())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = user_cache_dir() / "kernels"
    target = folder / f"{digest.hexdigest()[:24]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            os.replace(_compile(compiler, sources, variants, Path(work)), target)
    return ctypes.CDLL(str(target))


def _compile(compiler: str, sources: list[Path], variants: tuple, work: Path) -> Path:
    sources = [source for source in sources if source.suffix == ".c"]
    objects = [str(work / f"{source.stem}.o") for source in sources]
    for variant in variants:
        try:
            for source, output in zip(sources, objects):
                _run([compiler, *FLAGS, *variant, "-c", str(source), "-o", output])
            # not linked with -fopenmp: the calls resolve to the OpenMP runtime that torch has loaded, so that both share
            # one pool of threads
            _run([compiler, "-shared", "-o", str(work / "kernels.so"), *objects, "-lm"])
            ctypes.CDLL(str(work / "kernels.so"))
            return work / "kernels.so"
        except (OSError, subprocess.CalledProcessError):
            if variant == variants[-1]:
                raise
    raise AssertionError("unreachable")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)


def _cpu() -> str:
    """What `native` means here: a cache folder may be shared by machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"

"""From C files to a library: the compiler, its flags and its calls.

No more than the standard library is imported here: `setup.py` reads this file too.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# -fopenmp-simd is no more than a pragma of loops: threads are those of a runtime that is loaded already, see threads.h
FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wno-psabi")
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes; clang says mcpu on ARM
TIMEOUT = 120  # seconds of one call


def find_compiler() -> list[str] | None:
    """The command of a C compiler: $CC, which may have arguments, else cc, gcc or clang; None without any."""
    wanted = shlex.split(os.environ.get("CC", "")) or ["cc"]
    for command in (wanted, ["gcc"], ["clang"]):
        if shutil.which(command[0]) and _is_compiler():
            return command
    return None


def _is_compiler() -> bool:
    """Whether a compiler that is found is one: on a Mac without Apple's tools `cc` opens a dialog that offers them."""
    if platform.system() != "Darwin":
        return True
    return subprocess.run(["xcode-select", "-p"], capture_output=True, timeout=TIMEOUT).returncode == 0


def sources(folder: Path) -> list[Path]:
    """The C files of `folder`, with all headers that they may include."""
    return sorted({*folder.glob("*.[ch]"), *HERE.glob("*.h")})


def compile_library(compiler: Sequence[str], folder: Path, flags: Sequence[str], work: Path) -> Path:
    """The C files of `folder` as one library in the folder `work`.

    A line `// flags: ...` of a C file adds to its own. Raises OSError or subprocess.SubprocessError if a call fails.
    """
    objects = []
    for source in sources(folder):
        if source.suffix != ".c":
            continue
        own = re.search(r"^// flags: (.+)$", source.read_text(), re.MULTILINE)
        objects.append(str(work / f"{source.stem}.o"))
        command = [*FLAGS, f"-I{HERE}", *flags, *(own[1].split() if own else ())]
        _run([*compiler, *command, "-c", str(source), "-o", objects[-1]])
    library = work / "kernels.so"
    _run([*compiler, "-shared", "-o", str(library), *objects, "-lm"])
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)


def reason(error: Exception) -> str:
    """The last line of what a failed call said."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[-1] if lines else repr(error)

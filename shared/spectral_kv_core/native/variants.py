"""The libraries that a wheel brings, and which of them this processor runs.

For every folder of C files there is one library a variant, in its folder `prebuilt`. No more than the standard library is
imported here: `setup.py` reads this file too.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


@dataclass(frozen=True)
class Variant:
    """A library by what its processor must have: `machines` as `platform.machine`, `features` as Linux and compilers say."""

    name: str
    machines: tuple[str, ...]
    features: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """What tells a compiler to use the features; without any, it takes the oldest processor of the kind."""
        return tuple(f"-m{feature}" for feature in self.features)

    def path(self, folder: Path) -> Path:
        """Where the library of the C files in `folder` is."""
        return folder / "prebuilt" / f"{self.name}.so"

    def runs_on(self, machine: str, features: frozenset[str]) -> bool:
        return machine.lower() in self.machines and features.issuperset(self.features)


# The first that a processor runs is taken; `vectors.h` asks for the same features.
VARIANTS = (
    Variant("avx512", X86, ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "bmi2")),
    Variant("avx2", X86, ("avx2", "fma", "bmi2")),
    Variant("plain", X86),
    Variant("neon", ARM),
)


def variants_of(machine: str) -> list[Variant]:
    """The variants that a wheel for `machine` brings."""
    return [variant for variant in VARIANTS if machine.lower() in variant.machines]


def usable(folder: Path) -> list[Variant]:
    """The variants beside the C files of `folder` that this processor runs, the fastest first; none in a checkout."""
    machine, features = platform.machine(), processor_features()
    return [v for v in VARIANTS if v.runs_on(machine, features) and v.path(folder).is_file()]


@functools.cache
def processor_features() -> frozenset[str]:
    """Names of what this processor can do and its system allows, in lower case; empty where nobody says."""
    if platform.system() == "Darwin":
        return frozenset(_sysctl().lower().split())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").lower().split())


def _sysctl() -> str:
    names = ("machdep.cpu.features", "machdep.cpu.leaf7_features")  # unknown on Apple silicon, where no variant asks
    try:
        return subprocess.run(["sysctl", "-n", *names], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""

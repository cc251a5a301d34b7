"""C kernels as libraries: those that the wheel brings, else built once per machine and version by its compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import warnings
from pathlib import Path

from ..files.paths import user_cache_dir
from . import toolchain
from .private_folder import NotPrivate, ensure_file, is_whole, private_folder
from .toolchain import HERE
from .variants import processor_features, usable

log = logging.getLogger("spectralkv")


def disabled() -> bool:
    """Whether SPECTRALKV_KERNELS=0 asks for the operations of the array library."""
    return os.environ.get("SPECTRALKV_KERNELS") == "0"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The core's kernels; None where there is neither a library for this machine nor a compiler, or they are `disabled`."""
    return load(HERE, "codes are chosen one by one in place of a trellis search")


def load(folder: Path, otherwise: str) -> ctypes.CDLL | None:
    """The library of the C files in `folder`; None as for `library`.

    One that the wheel brought and this processor runs, the fastest first. Else one that this machine's compiler makes: the
    first call takes some seconds, and leaves the result in the user cache folder. `otherwise`: what a warning says if that
    fails.
    """
    if disabled() or platform.system() == "Windows":
        return None
    for variant in usable(folder):
        try:
            return ctypes.CDLL(str(variant.path(folder)))
        except OSError:  # of a wheel for another system: the machine's own compiler may do
            continue
    return _built(folder, otherwise)


def _built(folder: Path, otherwise: str) -> ctypes.CDLL | None:
    compiler = toolchain.find_compiler()
    if compiler is None:
        return None
    name = " ".join(compiler)
    try:
        path = private_folder(user_cache_dir() / "kernels") / f"{_key(compiler, folder)}.so"
        if not is_whole(path):
            _say_building(name)
        return ctypes.CDLL(str(ensure_file(path, functools.partial(_compile, compiler, folder))))
    except NotPrivate as error:
        _warn_not_private(str(error))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{name} cannot build spectralkv's kernels ({toolchain.reason(error)}); {otherwise}. "
            "SPECTRALKV_KERNELS=0 silences this.",
            stacklevel=4,
        )
    return None


@functools.cache
def _say_building(compiler: str) -> None:
    log.warning("Building kernels once with %s: some seconds.", compiler)


@functools.cache
def _warn_not_private(reason: str) -> None:
    warnings.warn(
        f"spectralkv takes no kernels from a folder that others could put theirs into: {reason}. Slower operations take over. "
        "SPECTRALKV_CACHE names another folder; SPECTRALKV_KERNELS=0 silences this.",
        stacklevel=5,
    )


def _compile(compiler: list[str], folder: Path, work: Path) -> Path:
    """The library in the folder `work`, by the first flags for this processor that the compiler takes."""
    *others, last = toolchain.NATIVE
    for flags in others:
        try:
            return toolchain.compile_library(compiler, folder, flags, work)
        except subprocess.CalledProcessError:
            continue
    return toolchain.compile_library(compiler, folder, last, work)


def _key(compiler: list[str], folder: Path) -> str:
    """What a library is made of: a cache folder may be shared by machines and by versions."""
    flags = toolchain.FLAGS, toolchain.NATIVE
    digest = hashlib.sha256(repr((compiler, flags, platform.machine(), sorted(processor_features()))).encode())
    for source in toolchain.sources(folder):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]

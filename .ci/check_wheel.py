"""Do the kernels of this installation come from its wheel, and choose the codes that they should?

`check_wheel.py` fails unless every kernel is a library of the wheel; `check_wheel.py --built` unless this machine's compiler
made them. Both print what they found, then the SHA-256 of the same trellis codes. A warning is a failure.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

import numpy as np

from spectral_kv_core import native
from spectral_kv_core.arrays.transform import time_matrix
from spectral_kv_core.native import toolchain, variants
from spectral_kv_core.quantization import trellis
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS, flat_levels, flat_tables, gaussian_tables


def main(arguments: list[str]) -> None:
    warnings.simplefilter("error")
    built = arguments == ["--built"]
    if not built:
        logging.getLogger("spectralkv").addHandler(Fails())
        print("  compiler:", " ".join(toolchain.find_compiler() or ["none"]))
    print("  spectralkv:", Path(native.__file__).parents[1])
    print("  core:", describe(native.library(), Path(native.__file__).parent, built))
    digest = codes_digest()
    for variant in [] if built else variants.usable(Path(native.__file__).parent):
        other = codes_digest(ctypes.CDLL(str(variant.path(Path(native.__file__).parent))))
        if other != digest:
            raise SystemExit(f"Expected the same codes of every library, {variant.name} chooses others.")
        print(f"  core: {variant.name} chooses the same codes")
    if importlib.util.find_spec("torch"):
        check_torch(built)
    else:
        folder = Path(importlib.util.find_spec("spectral_kv_torch").origin).parent / "kernels"
        for variant in variants.usable(folder):
            ctypes.CDLL(str(variant.path(folder))).spectralkv_attend  # noqa: B018
            print(f"  torch: {variant.name} can be loaded, torch is not here to run it")
    print("  codes:", digest)


class Fails(logging.Handler):
    """What the log says is a failure: a library of the wheel needs no words."""

    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(f"Expected no word, received: {record.getMessage()}")


def describe(library: ctypes.CDLL | None, folder: Path, built: bool) -> str:
    """Which library that is; SystemExit if it is not one of the wheel, or with `built` not of this machine."""
    paths = [variant.path(folder) for variant in variants.usable(folder)]
    if library is None or (built and paths) or not (built or Path(library._name) in paths):
        wanted = "a library that is built here" if built else f"a library of the wheel in {folder}"
        raise SystemExit(f"Expected {wanted}, received {library and library._name}.")
    return "built here" if built else f"{Path(library._name).stem} of {', '.join(path.stem for path in paths)}"


def codes_digest(library: ctypes.CDLL | None = None) -> str:
    """SHA-256 of the trellis codes of seeded coefficients by `library`, by default the one that is used."""
    rng = np.random.default_rng(0)
    widths = rng.choice(BIT_WIDTHS, (4, 16, 64)).astype(np.uint8)
    levels = gaussian_tables()
    books = {**levels, **trellis.codebooks(levels)}
    tables = *flat_tables(levels, books), flat_levels(books)
    gain, cost = rng.uniform(0.1, 1, widths.shape), rng.lognormal(size=widths.shape)
    rows = trellis.Coefficients(widths, gain, cost, time_matrix("dct", 16), tables)
    z = rng.standard_normal((1, 4, 259, 16, 64), np.float32)  # whole tiles, and blocks that are searched alone
    weights = rng.lognormal(size=z.shape[:-1]).astype(np.float32)
    used = trellis.library
    try:
        if library is not None:
            trellis.library = lambda: library
        return hashlib.sha256(rows.search(z, weights).tobytes()).hexdigest()
    finally:
        trellis.library = used


def check_torch(built: bool) -> None:
    """The kernels of the PyTorch backend are there, and share torch's threads."""
    import torch

    from spectral_kv_torch.kernels import build

    build.prepare(torch.device("cpu"))
    print("  torch:", describe(build.library(), Path(build.__file__).parent, built))
    if sys.platform == "linux":
        print("  torch: threads of", runtime_of(ctypes.CDLL(None)))


def runtime_of(process: ctypes.CDLL) -> str:
    """The file of the OpenMP runtime that the kernels call; SystemExit where they find none."""

    class Info(ctypes.Structure):
        _fields_ = [
            ("path", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("at", ctypes.c_void_p),
        ]

    try:
        function = ctypes.cast(process.GOMP_parallel, ctypes.c_void_p)
    except AttributeError:
        raise SystemExit("Expected an OpenMP runtime that torch has loaded, found none.") from None
    info = Info()
    process.dladdr(function, ctypes.byref(info))
    return Path((info.path or b"").decode()).name


if __name__ == "__main__":
    main(sys.argv[1:])

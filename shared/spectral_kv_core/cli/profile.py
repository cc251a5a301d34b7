"""`spectralkv profile`: calibrate a model and save its profile."""

from __future__ import annotations

import argparse
import time

from ..calibration.profiler import check_calibration
from ..calibration.text import load_texts
from ..hosts.backends import load_backend
from ..profile.store import cached_profile_path
from . import tables
from .options import check_output, model_options, model_path

NAME, HELP = "profile", "calibrate a model once and save its profile"
PARENTS = (model_options,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE", help="calibration text (default: the packaged mixture)")
    add("--tokens", type=int, default=32768, help="calibration tokens in all (default %(default)s)")
    add("--document", type=int, default=2048, help="tokens per document, which bounds memory")
    add("--positions", type=int, help="context length to prepare for (default: the model's, at most 32768)")
    add("--no-gradients", action="store_true", help="no backward pass: less memory, somewhat worse plans")
    add("--no-probes", action="store_true", help="do not measure every layer: fewer minutes, worse plans")
    add(
        "--pairs",
        action="store_true",
        help="a basis for every two layers too, for spectral-dense-pairs and spectral-stored-pairs: a larger file",
    )
    add("--joint", action="store_true", help="a basis for all layers together too, for kvtc: a larger file")
    add(
        "--windows",
        action="store_true",
        help="profile the layers with a sliding window, for generate --windows spectral",
    )
    add("--target-energy", type=float, default=0.95, help="energy that the summary reports ranks at")
    add("--output", metavar="FILE", help="where to save (default: the user cache folder)")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> dict:
    """Calibrate, save and report what was made."""
    check_calibration(args.target_energy, args.tokens, args.document, args.positions)
    texts = load_texts(args.text) if args.text else None
    if args.output is not None:
        check_output(args.output)
    name, backend = load_backend(args.backend)
    profiler = backend.SpectralProfiler(
        target_energy=args.target_energy,
        tokens=args.tokens,
        document=args.document,
        positions=args.positions,
        gradients=not args.no_gradients,
        probes=not args.no_probes,
        progress=not args.quiet,
        pairs=args.pairs,
        joint=args.joint,
        windows=args.windows,
    )
    model, tokenizer = backend.load_model(model_path(args.model), args.dtype)
    started = time.perf_counter()
    made = profiler.profile_from_model(model, tokenizer, texts, name=args.model)
    seconds = time.perf_counter() - started
    path = made.save(args.output or cached_profile_path(made.shape, windows=args.windows))
    if not args.json:
        tables.print_profile(made)
        print(f"  Saved {path} ({path.stat().st_size:,} bytes) after {seconds:.0f} s")
    return {
        "profile": str(path),
        "model": args.model,
        "backend": name,
        "tokens": made.calibration["tokens"],
        "seconds": seconds,
        "bytes": path.stat().st_size,
    }

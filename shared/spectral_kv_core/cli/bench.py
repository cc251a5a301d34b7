"""`spectralkv bench`: speed, bytes and peak memory beside the host's plain and quantized caches."""

from __future__ import annotations

import argparse
import json

from ..benchmark import bench as benchmark
from ..benchmark.provenance import provenance
from ..benchmark.synthetic import PLANS, SHAPES
from ..evaluation.text import default_texts
from ..files.replacing import write_whole
from ..hosts.backends import load_backend
from ..planning.methods import DEFAULT_METHOD
from . import tables
from .options import DTYPES, check_output, host_options, listed, model_path, values_of
from .output import to_plain

NAME, HELP = "bench", "measure speed and memory beside the host's plain and quantized caches"
PARENTS = (host_options,)
DEFAULTS = benchmark.Settings  # a field's default is an attribute of its class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument("--model", help="a directory, a hub id, or demo (default demo)")
    measured.add_argument("--synthetic", metavar="NAME", help=f"one random layer: {', '.join(SHAPES)}")
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="of weights and caches; default: as stored")
    add("--context", metavar="A,B", help=f"tokens in the cache (default {listed(DEFAULTS.contexts)})")
    add("--methods", metavar="A,B", default=DEFAULT_METHOD, help="recipes (default %(default)s)")
    add("--bits", type=float, default=DEFAULTS.bits, help="stored bits per sealed element (default %(default)g)")
    add(
        "--plan",
        choices=PLANS,
        help="of a synthetic layer: every width --bits (flat), or as in a real plan (default flat)",
    )
    add("--output", metavar="FILE", help="file to write the JSON object to")


def run(args: argparse.Namespace) -> dict:
    """Measure and report."""
    settings = benchmark.Settings(
        methods=values_of(args.methods, "--methods", str),
        contexts=values_of(args.context, "--context", int) or DEFAULTS.contexts,
        bits=args.bits,
        synthetic=args.synthetic,
        plan=args.plan or ("flat" if args.synthetic else None),
    )
    if args.output is not None:
        check_output(args.output)
    name, host = load_backend(args.backend)
    _, timed = load_backend(name, "bench")
    result = {"backend": name, "bits": args.bits, "machine": benchmark.machine(host, timed)}
    origin = {}
    if args.synthetic:
        result |= {"synthetic": args.synthetic, "plan": settings.plan}
        result |= benchmark.bench_layer(timed, name, settings, args.dtype or timed.default_dtype())
    else:
        path = model_path(args.model or "demo")
        model, tokenizer = host.load_model(path, args.dtype)
        settings = settings.within(host.context_limit(model), drop=args.context is None)
        result["model"] = args.model or "demo"
        text = default_texts()[0]
        origin = {"weights": host.weights_digest(model), "texts": {text.name: text.digest}}
        result |= benchmark.bench_model(
            host, timed, model, tokenizer, settings, {"backend": name, "model": path, "dtype": args.dtype}
        )
    plans = {f"{row['method']} at {row['bits']:g} bits": row["plan_hash"] for row in result["rows"]}
    result["provenance"] = provenance(host, threads=timed.threads(), plans=plans, **origin)
    if args.output is not None:
        write_whole(args.output, f"{json.dumps(result, indent=1, default=to_plain)}\n".encode())
    if not args.json:
        tables.print_bench(result)
    return result

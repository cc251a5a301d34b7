"""`spectralkv eval`: what methods cost in quality, and the bytes they take, over texts and documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..benchmark.provenance import provenance
from ..errors import UsageError
from ..evaluation import report
from ..evaluation import run as evaluation
from ..evaluation.settings import DEFAULT_KEEP, SUITES, Settings
from ..evaluation.text import Text, default_texts, read_text
from ..hosts.backends import load_backend
from ..planning.methods import get_method
from ..profile.profile import Profile
from ..scorers.waveletkv import WAVELET
from .options import check_profile, listed, model_options, model_path, read_file, tiers_of, values_of

NAME, HELP = "eval", "measure methods against the plain cache on texts"
PARENTS = (model_options,)
DEFAULTS = Settings  # a field's default is an attribute of its class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    _add_what(parser)
    _add_how(parser)


def _by_suite(field: str) -> str:
    """What `field` is in every suite."""
    shown = {name: suite[field] for name, suite in SUITES.items()}
    return ", ".join(f"{name}: {listed(v) if isinstance(v, tuple) else v}" for name, v in shown.items())


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Options that say what is measured."""
    add = parser.add_argument
    add("--methods", required=True, metavar="A,B", help="recipes, see: spectralkv methods")
    add("--bits", metavar="A,B", help=f"stored bits per sealed element (default {listed(DEFAULTS.bits)})")
    add("--suite", choices=tuple(SUITES), default="quick", help="the five defaults that follow")
    add(
        "--tasks",
        metavar="A,B",
        help="text: score what follows; copy: a span of the prefix, again; drift: turns on one cache; needle: a number hidden "
        "at ten depths (quick: text,copy; full: all)",
    )
    add("--prefix", metavar="A,B", help=f"tokens before the scored ones ({_by_suite('prefixes')})")
    add("--scored", type=int, help=f"tokens scored after every prefix ({_by_suite('scored')})")
    add("--documents", type=int, help=f"documents per text and prefix, at most ({_by_suite('documents')})")
    add("--greedy", type=int, help=f"tokens to generate too, in the task text; 0 for none ({_by_suite('greedy')})")
    add(
        "--metrics",
        metavar="A,B",
        help="kl (always measured), aop: attention outputs, reconstruction: keys and values (all)",
    )
    add("--turns", type=int, default=DEFAULTS.turns, help="turns of the task drift (default %(default)s)")
    add(
        "--turn-tokens",
        type=int,
        default=DEFAULTS.turn_tokens,
        help="prompt tokens of every turn (default %(default)s)",
    )
    add(
        "--keep",
        metavar="A,B",
        help=f"shares of the prefix to keep, for methods that drop tokens (default {listed(DEFAULT_KEEP)})",
    )
    add("--wavelet", metavar="A,B", help=f"filters of wavelet scorers, one cache each (default {WAVELET}, untold)")
    add(
        "--rounding-scores", metavar="A,B", help="what weighs tokens when codes are rounded, one cache each; or nearest"
    )
    add(
        "--tiers",
        nargs="+",
        action="extend",
        metavar="SHARE:BITS,...",
        help="bits by rank, for SCORER+METHOD, which then drops nothing",
    )
    add("--text", nargs="+", action="extend", metavar="[NAME=]FILE", help="texts (default: a novel and Python code)")


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Options that say how the model is run, and where the results go."""
    add = parser.add_argument
    add("--step", type=int, default=DEFAULTS.step, help="scored tokens per model call (default %(default)s)")
    add("--prefill-chunk", type=int, help="prefix tokens per model call (default: all in one)")
    add("--window", type=int, default=DEFAULTS.window, help="recent tokens kept exactly (default %(default)s)")
    add("--sinks", type=int, default=DEFAULTS.sinks, help="first tokens kept exactly (default %(default)s)")
    add("--profile", default="auto", help="profile file; auto looks for one, or calibrates")
    add("--output", required=True, metavar="DIR", help="results; a run that was cut off goes on from them")


def run(args: argparse.Namespace) -> dict:
    """Measure, save and report."""
    settings, texts = _settings(args), _texts(args)
    loaded = Profile.load(args.profile) if args.profile != "auto" else None
    for method in map(get_method, settings.methods):
        if loaded is not None:
            check_profile(loaded, method.profile_set, method)
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"Expected a folder for --output, received the file {output}.")
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(model_path(args.model), args.dtype)
    called = {"model": args.model, "backend": name}
    result = evaluation.evaluate(backend, model, tokenizer, settings, texts, output, names=called, profile=loaded)
    plans = {f"{r['method']} at {r['bits']:g} bits": r["plan"] for r in result["documents"]}
    origin = {"weights": result["weights"], "plans": plans, "texts": result["settings"]["texts"]}
    result["provenance"] = provenance(backend, threads=load_backend(name, "bench")[1].threads(), **origin)
    report.save_evaluation(result, output)
    if not args.json:
        report.print_evaluation(result)
        print(f"Saved {output / 'summary.md'}, summary.json and rows.jsonl")
    return result


def _settings(args: argparse.Namespace) -> Settings:
    suite = SUITES[args.suite]
    return Settings(
        methods=values_of(args.methods, "--methods", str),
        bits=values_of(args.bits, "--bits", float) or DEFAULTS.bits,
        tasks=values_of(args.tasks, "--tasks", str) or suite["tasks"],
        metrics=values_of(args.metrics, "--metrics", str) or DEFAULTS.metrics,
        prefixes=values_of(args.prefix, "--prefix", int) or suite["prefixes"],
        scored=suite["scored"] if args.scored is None else args.scored,
        documents=suite["documents"] if args.documents is None else args.documents,
        step=args.step,
        prefill_chunk=args.prefill_chunk,
        window=args.window,
        sinks=args.sinks,
        greedy=suite["greedy"] if args.greedy is None else args.greedy,
        turns=args.turns,
        turn_tokens=args.turn_tokens,
        keep=values_of(args.keep, "--keep", float),
        wavelets=values_of(args.wavelet, "--wavelet", str),
        rounding_scores=values_of(args.rounding_scores, "--rounding-scores", str),
        tiers=tuple(tuple(tiers_of(text)) for text in args.tiers or ()),
    )


def _texts(args: argparse.Namespace) -> list[Text]:
    texts = [_named_text(argument) for argument in args.text or ()] or default_texts()
    names = [text.name for text in texts]
    if len(set(names)) < len(names):
        raise UsageError(f"Expected texts with different names, received {', '.join(names)}. Use --text NAME=FILE.")
    return texts


def _named_text(argument: str) -> Text:
    """The text of a `--text` argument: FILE, named after its stem, or NAME=FILE."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).is_file():
        name, path = Path(argument).stem, argument
    if not name:
        raise UsageError(f"Expected FILE or NAME=FILE for --text, received {argument!r}.")
    return read_text(name, read_file(path, "--text"))

"""The command `spectralkv`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

from .. import __version__
from ..benchmark.synthetic import PLANS, SHAPES
from ..cache.eviction import EVERY
from ..cache.prompt_cache_file import DEFAULT_FILE_METHOD
from ..evaluation.run import SUITES
from ..planning.methods import DEFAULT_METHOD, ROUNDINGS
from ..plotting import draw as plots
from ..scorers.selection import MODES
from ..scorers.waveletkv import WAVELET
from . import commands, report

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands; wrong use exits with 2 and one line."""
    parser = argparse.ArgumentParser(prog="spectralkv", description="KV-cache compression: real bytes, honest quality.")
    parser.add_argument("--version", action="version", version=f"spectralkv {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    host = argparse.ArgumentParser(add_help=False)
    host.add_argument("--backend", default="auto", help="auto (mlx on Apple silicon, else torch), mlx or torch")
    model = argparse.ArgumentParser(add_help=False, parents=[host])
    model.add_argument("--model", required=True, help="a directory, a hub id, or demo")
    model.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")

    def command(name: str, run, help: str, *parents) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=help, parents=[*parents, common])
        sub.set_defaults(run=run)
        return sub

    sub = command("profile", commands.profile, "calibrate a model once and save its profile", model)
    sub.add_argument("--text", nargs="+", metavar="FILE", help="calibration text (default: the packaged mixture)")
    sub.add_argument("--tokens", type=int, default=32768, help="calibration tokens in all (default %(default)s)")
    sub.add_argument("--document", type=int, default=2048, help="tokens per document, which bounds memory")
    sub.add_argument(
        "--positions", type=int, help="context length to prepare for (default: the model's, at most 32768)"
    )
    sub.add_argument("--no-gradients", action="store_true", help="no backward pass: less memory, somewhat worse plans")
    sub.add_argument("--no-probes", action="store_true", help="do not measure every layer: fewer minutes, worse plans")
    sub.add_argument(
        "--pairs",
        action="store_true",
        help="a basis for every two layers too, for spectral-dense-pairs and spectral-stored-pairs: a larger file",
    )
    sub.add_argument(
        "--joint", action="store_true", help="a basis for all layers together too, for kvtc: a larger file"
    )
    sub.add_argument("--target-energy", type=float, default=0.95, help="energy that the summary reports ranks at")
    sub.add_argument("--output", metavar="FILE", help="where to save (default: the user cache folder)")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    prompt = argparse.ArgumentParser(add_help=False)
    prompt.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    prompt.add_argument(
        "--profile", default="auto", help="profile file; auto looks for one and calibrates if there is none"
    )
    given = prompt.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="the prompt; with --prompt-cache-file what follows the stored one")
    given.add_argument("--prompt-file", metavar="FILE", help="file with the prompt, - for standard input")

    sub = command("generate", commands.generate, "generate text from a compressed cache", model, prompt)
    sub.add_argument("--prompt-cache-file", metavar="FILE", help="go on from a prompt stored by cache-prompt")
    sub.add_argument("--score-file", metavar="FILE", help="text after the prompt to compare the two caches on")
    sub.add_argument("--max-tokens", type=int, default=128, help="tokens to generate (default %(default)s)")
    sub.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    budget = sub.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float, help="stored bits per sealed element (default 3)")
    budget.add_argument("--budget-bytes", type=int, help="bytes that the whole cache may take at --max-context tokens")
    sub.add_argument(
        "--max-context", type=int, help="tokens that --budget-bytes must hold (default: what this run needs)"
    )
    sub.add_argument(
        "--method", help=f"recipe, see: spectralkv methods (default {DEFAULT_METHOD}, or what a prompt cache file has)"
    )
    sub.add_argument("--window", type=int, help=f"recent tokens kept exactly (default {commands.WINDOW})")
    sub.add_argument("--sinks", type=int, help=f"first tokens kept exactly (default {commands.SINKS})")
    sub.add_argument(
        "--budget-tokens", type=int, help="tokens to keep, sinks and window included, by a method that drops"
    )
    sub.add_argument(
        "--protect", nargs="+", action="extend", metavar="A:B", help="tokens never dropped: positions, or system"
    )
    sub.add_argument(
        "--tiers",
        metavar="SHARE:BITS,...",
        help="bits by rank for SCORER+spectral, such as 0.25:4,0.75:1; drops nothing",
    )
    sub.add_argument(
        "--rounding-scores", choices=ROUNDINGS, help="what weighs tokens when codes are rounded (default: the recipe's)"
    )
    sub.add_argument("--selection", choices=MODES, help=f"who keeps the same tokens (default {MODES[0]})")
    sub.add_argument(
        "--evict-every", type=int, help=f"generated tokens between two rounds of dropping (default {EVERY})"
    )
    sub.add_argument(
        "--wavelet", metavar="NAME", help=f"filters of a wavelet scorer: haar, sym4, bior2.2, ... (default {WAVELET})"
    )
    sub.add_argument(
        "--compare", action="store_true", help="run the plain cache too and compare bytes, quality and speed"
    )

    sub = command(
        "cache-prompt", commands.cache_prompt, "read a prompt once and store its compressed cache", model, prompt
    )
    sub.add_argument(
        "--method", default=DEFAULT_FILE_METHOD, help="recipe, see: spectralkv methods (default %(default)s)"
    )
    sub.add_argument("--bits", type=float, help="stored bits per sealed element (default: the recipe's)")
    sub.add_argument(
        "--window", type=int, default=commands.WINDOW, help="last tokens kept exactly (default %(default)s)"
    )
    sub.add_argument(
        "--sinks", type=int, default=commands.SINKS, help="first tokens kept exactly (default %(default)s)"
    )
    sub.add_argument("--output", required=True, metavar="FILE", help="where to save")

    sub = command("eval", commands.evaluate, "measure methods against the plain cache on texts", model)
    sub.add_argument("--methods", required=True, metavar="A,B", help="recipes, see: spectralkv methods")
    sub.add_argument("--bits", metavar="A,B", help="stored bits per sealed element (default 4,3,2)")
    sub.add_argument("--suite", choices=tuple(SUITES), default="quick", help="the five defaults that follow")
    sub.add_argument(
        "--tasks",
        metavar="A,B",
        help="text: score what follows; copy: a span of the prefix, again; drift: turns on one cache; needle: a number hidden "
        "at ten depths (quick: text,copy; full: all)",
    )
    sub.add_argument("--prefix", metavar="A,B", help="tokens before the scored ones (quick: 1024, full: 1024,2048)")
    sub.add_argument("--scored", type=int, help="tokens scored after every prefix (quick: 64, full: 128)")
    sub.add_argument("--documents", type=int, help="documents per text and prefix, at most (quick: 2, full: 4)")
    sub.add_argument(
        "--greedy", type=int, help="tokens to generate too, in the task text; 0 for none (quick: 32, full: 128)"
    )
    sub.add_argument(
        "--metrics",
        metavar="A,B",
        help="kl (always measured), aop: attention outputs, reconstruction: keys and values (all)",
    )
    sub.add_argument("--turns", type=int, default=5, help="turns of the task drift (default %(default)s)")
    sub.add_argument("--turn-tokens", type=int, default=256, help="prompt tokens of every turn (default %(default)s)")
    sub.add_argument(
        "--keep", metavar="A,B", help="shares of the prefix to keep, for methods that drop tokens (default 0.5,0.25)"
    )
    sub.add_argument(
        "--wavelet", metavar="A,B", help=f"filters of wavelet scorers, one cache each (default {WAVELET}, untold)"
    )
    sub.add_argument(
        "--rounding-scores", metavar="A,B", help="what weighs tokens when codes are rounded, one cache each; or nearest"
    )
    sub.add_argument(
        "--tiers",
        nargs="+",
        action="extend",
        metavar="SHARE:BITS,...",
        help="bits by rank, for SCORER+METHOD, which then drops nothing",
    )
    sub.add_argument(
        "--text", nargs="+", action="extend", metavar="[NAME=]FILE", help="texts (default: a novel and Python code)"
    )
    sub.add_argument("--step", type=int, default=1, help="scored tokens per model call (default %(default)s)")
    sub.add_argument("--prefill-chunk", type=int, help="prefix tokens per model call (default: all in one)")
    sub.add_argument("--window", type=int, default=64, help="recent tokens kept exactly (default %(default)s)")
    sub.add_argument("--sinks", type=int, default=4, help="first tokens kept exactly (default %(default)s)")
    sub.add_argument("--profile", default="auto", help="profile file; auto looks for one, or calibrates")
    sub.add_argument("--output", required=True, metavar="DIR", help="results; a run that was cut off goes on from them")

    sub = command(
        "bench", commands.bench, "measure speed and memory beside the host's plain and quantized caches", host
    )
    measured = sub.add_mutually_exclusive_group()
    measured.add_argument("--model", help="a directory, a hub id, or demo (default demo)")
    measured.add_argument("--synthetic", metavar="NAME", help=f"one random layer: {', '.join(SHAPES)}")
    sub.add_argument("--dtype", choices=DTYPES, help="of weights and caches; default: as stored")
    sub.add_argument("--context", metavar="A,B", help="tokens in the cache (default 1024,4096,16384)")
    sub.add_argument("--methods", metavar="A,B", default=DEFAULT_METHOD, help="recipes (default %(default)s)")
    sub.add_argument("--bits", type=float, default=3.0, help="stored bits per sealed element (default %(default)g)")
    sub.add_argument(
        "--plan",
        choices=PLANS,
        help="of a synthetic layer: every width --bits (flat), or as in a real plan (default flat)",
    )
    sub.add_argument("--output", metavar="FILE", help="file to write the JSON object to")

    sub = command(
        "inspect", commands.inspect, "show a profile and the plan a budget gets from it, or a stored prompt cache"
    )
    sub.add_argument("file", metavar="FILE", help="profile or prompt cache file")
    sub.add_argument("--bits", type=float, help="budget of the plan (default 3)")
    sub.add_argument("--method", default=DEFAULT_METHOD, help="recipe of the plan (default %(default)s)")

    command("methods", commands.methods, "list the recipes")

    sub = command("fit", commands.fit, "what context fits in memory at which bits, without loading the model", model)
    sub.add_argument("--memory", required=True, metavar="SIZE", help="for weights and cache: 8GB, 8GiB, 512MB or bytes")
    sub.add_argument("--bits", metavar="A,B", help="stored bits per sealed element (default 4,3,2,1)")
    sub.add_argument(
        "--context", metavar="A,B", help="tokens (default: from 4096 on, doubled up to the model's context)"
    )
    sub.add_argument("--method", default=DEFAULT_METHOD, help="recipe, see: spectralkv methods (default %(default)s)")
    sub.add_argument("--window", type=int, default=commands.WINDOW, help="recent tokens kept exactly (%(default)s)")
    sub.add_argument("--sinks", type=int, default=commands.SINKS, help="first tokens kept exactly (%(default)s)")
    sub.add_argument(
        "--profile", default="auto", help="profile file; auto looks for one, and counts a typical one if there is none"
    )

    sub = command("plot", commands.plot, "draw pictures of the JSON of eval and bench, and of profiles")
    sub.add_argument("results", nargs="+", metavar="RESULTS", help="result JSON, profile, or a folder of result JSON")
    sub.add_argument("--output", default="figures", metavar="DIR", help="where to draw (default %(default)s)")
    sub.add_argument("--format", metavar="A,B", help=f"{', '.join(plots.FORMATS)} (default png)")
    sub.add_argument("--only", metavar="A,B", help=f"of {', '.join(plots.PICTURES)} (default: all that can be drawn)")
    sub.add_argument("--bits", type=float, help="budget of the plan that a profile's bits are shown for (default 3)")

    report.add_arguments(command(report.NAME, report.run, report.HELP))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0 done, 2 wrong use, 1 anything else; errors are one line on stderr."""
    args = build_parser().parse_args(arguments)
    # the hosts' own chatter would drown the one line that matters
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="spectralkv: %(message)s")
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"spectralkv: {text}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
    if args.json:
        print(json.dumps(result, default=commands.to_plain))
    return 0

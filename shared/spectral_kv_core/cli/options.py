"""Options that several commands share, and how the text of an option becomes a value."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..codecs.registry import check_bits
from ..errors import UsageError
from ..hosts.demo_model import demo_model_path
from ..planning.methods import Method
from ..profile.profile import Profile

DTYPES = ("float32", "bfloat16", "float16")


def common_options() -> argparse.ArgumentParser:
    """Options of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def host_options() -> argparse.ArgumentParser:
    """Options of commands that run on a backend."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", default="auto", help="auto (mlx on Apple silicon, else torch), mlx or torch")
    return parser


def model_options() -> argparse.ArgumentParser:
    """Options of commands that load a model."""
    parser = argparse.ArgumentParser(add_help=False, parents=[host_options()])
    parser.add_argument("--model", required=True, help="a directory, a hub id, or demo")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    return parser


def prompt_options() -> argparse.ArgumentParser:
    """Options of commands that read a prompt."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    add_profile_option(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="the prompt; with --prompt-cache-file what follows the stored one")
    given.add_argument("--prompt-file", metavar="FILE", help="file with the prompt, - for standard input")
    return parser


def add_profile_option(parser: Any) -> None:
    """Add `--profile` to a parser, or to a group of one."""
    parser.add_argument(
        "--profile", default="auto", help="profile file; auto looks for one and calibrates if there is none"
    )


def add_sampling_options(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """Add how tokens are chosen; without `seed` where every request says its own."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most likely token (default 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the probability to draw from (default 1)")
    if seed:
        parser.add_argument("--seed", type=int, help="of what is drawn (default: another one every time)")


def model_path(name: str) -> str:
    """The directory or hub id behind `--model`; raises UsageError for a directory without a model."""
    if name == "demo":
        return str(demo_model_path())
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"Expected a model directory with a config.json, received {name}.")
    return name


def prompt_text(args: argparse.Namespace) -> str:
    """The text of `--prompt` or `--prompt-file`; raises UsageError for an empty one."""
    text = read_file(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt
    if not (text or "").strip():
        raise UsageError("Expected a prompt, received an empty one. Give --prompt TEXT or --prompt-file FILE.")
    return text


def read_file(path: str, option: str) -> str:
    """The UTF-8 text of a file that `option` names; - is standard input."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected a text file for {option}, found nothing at {path}.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UsageError(f"Expected a UTF-8 text file for {option}, {path} is none.") from None


def check_context(backend, model, prompt: int, longest: int) -> None:
    """Raise UsageError for `longest` tokens, `prompt` of them given, beyond the model's context."""
    limit = backend.context_limit(model)
    if limit and longest > limit:
        raise UsageError(
            f"Expected at most {limit:,} tokens, the model's context, received {prompt:,} of prompt and {longest - prompt:,} "
            "more. Shorten the prompt or lower --max-tokens."
        )


def check_profile(profile: Profile, basis_set: str | None, method: Method, bits: float | None = None) -> None:
    """Raise UsageError for a profile without `basis_set`, and for `bits` that `method` has for no model of its shape."""
    if basis_set is not None:
        profile.basis_set(basis_set)
    check_bits(method, bits, profile.shape)


def check_output(path: str, option: str = "--output") -> None:
    """Raise UsageError for a file that cannot be written, before anything long runs."""
    if Path(path).is_dir():
        raise UsageError(f"Expected a file name for {option}, received the folder {path}.")
    folder = next(p for p in Path(path).absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"Expected a place for {option} that can be written, {folder} cannot. Name another file.")


def listed(values: Iterable[float]) -> str:
    """Numbers as `values_of` reads them."""
    return ",".join(f"{value:g}" if value < 100 else str(value) for value in values)


def values_of(text: str | None, option: str, kind: type) -> tuple:
    """The values of a comma-separated option, each once; empty without the option."""
    if text is None:
        return ()
    what = {int: "whole numbers", float: "numbers", str: "names"}[kind]
    wrong = UsageError(f"Expected {what} separated by commas for {option}, received {text!r}.")
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise wrong
    try:
        return tuple(dict.fromkeys(map(kind, parts)))
    except ValueError:
        raise wrong from None


def spans_of(arguments: list[str] | None) -> list[tuple[int, int]]:
    """The spans of tokens that `--protect` arguments A:B name; `system` is left to the tokenizer."""
    spans = []
    for argument in arguments or ():
        if argument == "system":
            continue
        start, colon, end = argument.partition(":")
        if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
            raise UsageError(
                f"Expected system, or A:B with token positions A < B, for --protect, received {argument!r}."
            )
        spans.append((int(start), int(end)))
    return spans


def tiers_of(text: str) -> list[tuple[float, float]]:
    """The (share, bits) pairs of `--tiers`."""
    try:
        return [(float(share), float(bits)) for share, bits in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise UsageError(
            f"Expected SHARE:BITS separated by commas for --tiers, such as 0.25:4,0.75:1, received {text!r}."
        ) from None

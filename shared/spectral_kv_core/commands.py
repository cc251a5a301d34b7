"""What the commands of the command line do; each returns the object that `--json` prints."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from . import evaluation, report
from .backends import load_backend
from .calibration_text import load_texts
from .demo import demo_model_path
from .divergence import compare_logits
from .evaluation_text import Text, default_texts, read_text
from .methods import METHODS, get_method
from .plan import make_plan
from .profile import Profile
from .profile_store import cached_profile_path

WARM_UP = 32  # tokens run once before anything is timed


def profile(args: argparse.Namespace) -> dict:
    """`spectralkv profile`: calibrate a model and save its profile."""
    texts = load_texts(args.text) if args.text else None
    if args.output is not None and Path(args.output).is_dir():
        raise ValueError(f"Expected a file name for --output, received the folder {args.output}.")
    name, backend = load_backend(args.backend)
    profiler = backend.SpectralProfiler(
        target_energy=args.target_energy,
        tokens=args.tokens,
        document=args.document,
        positions=args.positions,
        gradients=not args.no_gradients,
        progress=not args.quiet,
    )
    model, tokenizer = backend.load_model(_model_path(args.model), args.dtype)
    started = time.perf_counter()
    made = profiler.profile_from_model(model, tokenizer, texts, name=args.model)
    seconds = time.perf_counter() - started
    path = made.save(args.output or cached_profile_path(made.shape))
    if not args.json:
        print(made.summary())
        print(f"  Saved {path} ({path.stat().st_size:,} bytes) after {seconds:.0f} s")
    return {
        "profile": str(path),
        "model": args.model,
        "backend": name,
        "tokens": made.calibration["tokens"],
        "seconds": seconds,
        "bytes": path.stat().st_size,
    }


def generate(args: argparse.Namespace) -> dict:
    """`spectralkv generate`: an answer from a compressed cache, beside the plain cache's with `--compare`."""
    method = get_method(args.method)
    for option in ("budget_tokens", "protect"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"Expected a method that drops tokens for --{option.replace('_', '-')}, {method.name} keeps every token."
            )
    prompt_text = _read(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt
    if not (prompt_text or "").strip():
        raise ValueError("Expected a prompt, received an empty one. Give --prompt TEXT or --prompt-file FILE.")
    score_text = _read(args.score_file, "--score-file") if args.score_file else None
    if args.max_tokens < 0 or (args.max_tokens == 0 and score_text is None):
        raise ValueError(f"Expected --max-tokens of at least 1, or 0 with --score-file, received {args.max_tokens}.")
    loaded = Profile.load(args.profile) if args.profile != "auto" and method.basis_set else None
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(_model_path(args.model), args.dtype)
    prompt = _encode_prompt(tokenizer, prompt_text, args.raw)
    labels = tokenizer.encode(score_text, add_special_tokens=False) if score_text else []
    if score_text is not None and not labels:
        raise ValueError(f"Expected text to score in --score-file, received none from {args.score_file}.")
    longest, limit = len(prompt) + max(args.max_tokens, len(labels)), backend.context_limit(model)
    if limit and longest > limit:
        raise ValueError(
            f"Expected at most {limit:,} tokens, the model's context, received {len(prompt):,} of prompt and "
            f"{longest - len(prompt):,} more. Shorten the prompt or lower --max-tokens."
        )

    def new_cache():
        return backend.make_prompt_cache(
            model,
            loaded,
            args.bits,
            budget_bytes=args.budget_bytes,
            max_context=(args.max_context or longest) if args.budget_bytes is not None else None,
            method=method,
            window=args.window,
            sinks=args.sinks,
            tokenizer=tokenizer,
        )

    cache = new_cache()  # raises for a wrong budget or profile before anything long runs
    compare = args.compare or score_text is not None
    backend.generate(model, tokenizer, prompt[:WARM_UP], backend.plain_cache(model), 2, True, lambda token: None)

    show = None if args.json else report.Stream(tokenizer)
    if show and compare:
        show.title(f"{method.name} cache")
    result, _ = _run(backend, model, tokenizer, prompt, cache, args, show)
    del cache
    result = {
        **result,
        "backend": name,
        "method": method.name,
    }
    if compare:
        if show and args.max_tokens:
            show.title("plain cache")
        plain, plain_tokens = _run(backend, model, tokenizer, prompt, backend.plain_cache(model), args, show)
        result["dense"] = {**plain, "backend": name, "method": "plain"}
        labels = labels or plain_tokens
        scored = new_cache()
        logits = backend.score(model, prompt, labels, scored)
        if not args.max_tokens:
            result |= _sizes(backend, scored)
        del scored
        plain_scored = backend.plain_cache(model)
        reference = backend.score(model, prompt, labels, plain_scored)
        if not args.max_tokens:
            result["dense"] |= _sizes(backend, plain_scored)
        result |= compare_logits(reference, logits, labels) | {"scored_tokens": len(labels)}
    if not args.json:
        report.print_generation(result)
    return result


def evaluate(args: argparse.Namespace) -> dict:
    """`spectralkv eval`: what methods cost in quality, and the bytes they take, over texts and documents."""
    suite = evaluation.SUITES[args.suite]
    settings = evaluation.Settings(
        methods=_values(args.methods, "--methods", str),
        bits=_values(args.bits, "--bits", float) or evaluation.DEFAULT_BITS,
        tasks=_values(args.tasks, "--tasks", str) or suite["tasks"],
        prefixes=_values(args.prefix, "--prefix", int) or suite["prefixes"],
        scored=suite["scored"] if args.scored is None else args.scored,
        documents=suite["documents"] if args.documents is None else args.documents,
        step=args.step,
        prefill_chunk=args.prefill_chunk,
        window=args.window,
        sinks=args.sinks,
    )
    texts = [_named_text(argument) for argument in args.text or ()] or default_texts()
    names = [text.name for text in texts]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected texts with different names, received {', '.join(names)}. Use --text NAME=FILE.")
    loaded = Profile.load(args.profile) if args.profile != "auto" else None
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"Expected a folder for --output, received the file {output}.")
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(_model_path(args.model), args.dtype)
    called = {"model": args.model, "backend": name}
    result = evaluation.evaluate(backend, model, tokenizer, settings, texts, output, names=called, profile=loaded)
    report.save_evaluation(result, output)
    if not args.json:
        report.print_evaluation(result)
        print(f"Saved {output / 'summary.md'}, summary.json and rows.jsonl")
    return result


def inspect(args: argparse.Namespace) -> dict:
    """`spectralkv inspect`: what a profile holds, and the plan that a budget gets from it."""
    loaded = Profile.load(args.file)
    plan = make_plan(loaded.shape, loaded, args.method, args.bits)
    result = {
        "profile": args.file,
        "model": loaded.model,
        "bytes": os.path.getsize(args.file),
        "library_version": loaded.library_version,
        "shape": loaded.shape.to_json(),
        "calibration": loaded.calibration,
        "basis_sets": {name: report.basis_set_summary(b) for name, b in loaded.basis_sets.items()},
        "plan": report.plan_summary(plan),
    }
    if not args.json:
        print(loaded.summary())
        report.print_plan(plan)
    return result


def methods(args: argparse.Namespace) -> dict:
    """`spectralkv methods`: the recipe table."""
    rows = [
        {
            "name": m.name,
            "summary": m.summary,
            "codec": m.codec,
            "rope": m.rope,
            "group": m.group,
            "time": m.time,
            "block": m.block,
            "needs_profile": m.basis_set is not None,
            "latent_attention": m.latent,
            "source": m.source,
        }
        for m in METHODS.values()
    ]
    if not args.json:
        report.print_methods(rows)
    return {"methods": rows}


def _run(backend, model, tokenizer, prompt, cache, args, show) -> tuple[dict, list[int]]:
    backend.reset_peak()
    if not args.max_tokens:
        return {"text": "", "prompt_tokens": len(prompt), "generated_tokens": 0}, []
    on_token = show.token if show else lambda token: None
    out = backend.generate(model, tokenizer, prompt, cache, args.max_tokens, args.ignore_eos, on_token)
    if show:
        show.end()
    result = {
        "text": tokenizer.decode(out.tokens, skip_special_tokens=True),
        "prompt_tokens": len(prompt),
        "generated_tokens": len(out.tokens),
        **_sizes(backend, cache),
        "peak_bytes": backend.peak_bytes(),
        "prefill_tokens_per_s": out.prefill_tokens_per_s(len(prompt)),
        "decode_tokens_per_s": out.decode_tokens_per_s(),
    }
    return result, out.tokens


def _sizes(backend, cache) -> dict:
    size = backend.cache_nbytes(cache)
    return {
        "bits_per_element": size.bits_per_element,
        "cache_bytes": int(size),
        "table_bytes": size.table_nbytes,
        "dense_bytes": size.dense_nbytes,
        "compression": size.compression,
    }


def _model_path(name: str) -> str:
    if name == "demo":
        return str(demo_model_path())
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"Expected a model directory with a config.json, received {name}.")
    return name


def _encode_prompt(tokenizer, text: str, raw: bool) -> list[int]:
    if raw or not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _values(text: str | None, option: str, kind: type) -> tuple:
    """The values of a comma-separated option, each once; empty without the option."""
    if text is None:
        return ()
    try:
        values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        values = ("",)
    if "" in values:
        what = {int: "whole numbers", float: "numbers", str: "names"}[kind]
        raise ValueError(f"Expected {what} separated by commas for {option}, received {text!r}.")
    return values


def _named_text(argument: str) -> Text:
    """The text of a `--text` argument: FILE, named after its stem, or NAME=FILE."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).is_file():
        name, path = Path(argument).stem, argument
    if not name:
        raise ValueError(f"Expected FILE or NAME=FILE for --text, received {argument!r}.")
    return read_text(name, _read(path, "--text"))


def _read(path: str, option: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected a text file for {option}, found nothing at {path}.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"Expected a UTF-8 text file for {option}, {path} is none.") from None


def to_plain(x):
    """NumPy scalars and arrays as JSON knows them."""
    return x.tolist() if isinstance(x, (np.generic, np.ndarray)) else str(x)

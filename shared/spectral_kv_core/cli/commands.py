"""What the commands of the command line do; each returns the object that `--json` prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from .. import native
from ..arrays.divergence import compare_logits
from ..benchmark import bench as benchmark
from ..benchmark import footprint as fitting
from ..cache.prompt_cache_file import FORMAT as PROMPT_FORMAT
from ..cache.prompt_cache_file import PromptFile
from ..calibration.text import load_texts
from ..codecs.registry import make_plan, plan_for
from ..evaluation import report as evaluation_report
from ..evaluation import run as evaluation
from ..evaluation.text import Text, default_texts, read_text
from ..files.container import format_name
from ..hosts.backends import load_backend
from ..hosts.chat_template import encode_opening, encode_prompt, encode_rest, has_template, system_tokens
from ..hosts.demo_model import demo_model_path
from ..planning.methods import DEFAULT_METHOD, METHODS, Method, get_keeping_method, get_live_method
from ..plotting import draw as plots
from ..plotting.results import read_results
from ..profile.profile import Profile
from ..profile.store import cached_profile_path, find_profile
from . import tables as report

WARM_UP = 32  # tokens run once before anything is timed
WINDOW, SINKS = 64, 4  # of a cache that nobody said more about


def profile(args: argparse.Namespace) -> dict:
    """`spectralkv profile`: calibrate a model and save its profile."""
    texts = load_texts(args.text) if args.text else None
    if args.output is not None:
        _check_output(args.output)
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
    stored = _open_prompt_file(args) if args.prompt_cache_file else None
    method = _live_method(args, stored)
    protect, tiers = _spans(args.protect), _tiers(args.tiers)
    prompt_text = _prompt_text(args)
    score_text = _read(args.score_file, "--score-file") if args.score_file else None
    if args.max_tokens < 0 or (args.max_tokens == 0 and score_text is None):
        raise ValueError(f"Expected --max-tokens of at least 1, or 0 with --score-file, received {args.max_tokens}.")
    given = args.profile != "auto" and (stored or method.profile_set)
    loaded = Profile.load(args.profile) if given else None
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(_model_path(args.model), args.dtype)
    before = stored.seen if stored else 0
    if stored:
        prompt = encode_rest(tokenizer, prompt_text, stored.metadata.get("raw", True))
    else:
        prompt = encode_prompt(tokenizer, prompt_text, args.raw)
    if "system" in (args.protect or ()):
        if args.raw:
            raise ValueError(
                "Expected no --protect system with --raw, which has no system prompt. Name positions: A:B."
            )
        protect.append((0, system_tokens(tokenizer)))
    labels = tokenizer.encode(score_text, add_special_tokens=False) if score_text else []
    if score_text is not None and not labels:
        raise ValueError(f"Expected text to score in --score-file, received none from {args.score_file}.")
    longest = before + len(prompt) + max(args.max_tokens, len(labels))
    _check_context(backend, model, before + len(prompt), longest)

    def new_cache():
        if stored:
            return backend.load_prompt_cache(stored, model, loaded, method=method, bits=args.bits)[0]
        return backend.make_prompt_cache(
            model,
            loaded,
            args.bits,
            budget_bytes=args.budget_bytes,
            max_context=(args.max_context or longest) if args.budget_bytes is not None else None,
            budget_tokens=args.budget_tokens,
            protect=protect,
            selection=args.selection,
            evict_every=args.evict_every,
            wavelet=args.wavelet,
            tiers=tiers,
            rounding_scores=args.rounding_scores,
            method=method,
            window=WINDOW if args.window is None else args.window,
            sinks=SINKS if args.sinks is None else args.sinks,
            tokenizer=tokenizer,
        )

    cache = new_cache()  # raises for a wrong budget or profile before anything long runs
    compare = args.compare or score_text is not None
    native.library()  # what must be built on this machine is built now, before anything is timed
    backend.generate(model, tokenizer, prompt[:WARM_UP], backend.plain_cache(model), 2, True, lambda token: None)

    used = method or stored.method
    label = used.name if used != "plain" and used.live else "plain"  # what is for files only is decoded to use it
    show = None if args.json else report.Stream(partial(backend.text_stream, tokenizer))
    if show and compare:
        show.title(f"{label} cache from the file" if stored else f"{label} cache")
    result, _ = _run(backend, model, tokenizer, prompt, cache, args, show)
    del cache
    result |= {"prompt_tokens": before + len(prompt), "backend": name, "method": label}
    if stored:
        result |= {
            "prompt_cache_file": args.prompt_cache_file,
            "file_method": stored.method.name,
            "file_bytes": os.path.getsize(args.prompt_cache_file),
            "cached_tokens": before,
        }
    if compare:
        whole = [*np.ravel(stored.tokens).tolist(), *prompt] if stored else prompt
        if show and args.max_tokens:
            show.title("plain cache, which reads everything" if stored else "plain cache")
        plain, plain_tokens = _run(backend, model, tokenizer, whole, backend.plain_cache(model), args, show)
        result["dense"] = {**plain, "backend": name, "method": "plain"}
        labels = labels or plain_tokens
        scored = new_cache()
        logits = backend.score(model, prompt, labels, scored)
        if not args.max_tokens:
            result |= _sizes(backend, scored)
        del scored
        plain_scored = backend.plain_cache(model)
        reference = backend.score(model, whole, labels, plain_scored)
        if not args.max_tokens:
            result["dense"] |= _sizes(backend, plain_scored)
        result |= compare_logits(reference, logits, labels) | {"scored_tokens": len(labels)}
    if not args.json:
        report.print_generation(result)
    return result


def cache_prompt(args: argparse.Namespace) -> dict:
    """`spectralkv cache-prompt`: read a prompt once and store its compressed cache.

    The plain cache reads it, so that every token attends exactly; what is stored is encoded at the end.
    """
    _check_output(args.output)
    method = get_keeping_method(args.method)
    prompt_text = _prompt_text(args)
    loaded = Profile.load(args.profile) if args.profile != "auto" and method.basis_set else None
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(_model_path(args.model), args.dtype)
    raw = args.raw or not has_template(tokenizer)
    prompt = encode_opening(tokenizer, prompt_text, raw)
    _check_context(backend, model, len(prompt), len(prompt) + 1)
    shape, _, found = backend.SpectralProfiler().profile_for(model, method, loaded, tokenizer)
    options = {"window": args.window, "sinks": args.sinks}
    plan_for(shape, found, method, args.bits, **options)  # raises for a wrong budget before anything long runs
    started = time.perf_counter()
    cache = backend.plain_cache(model)
    backend.prefill(model, prompt, cache)
    options |= {"model": model, "method": method, "bits": args.bits, "profile": found, "metadata": {"raw": raw}}
    backend.save_prompt_cache(args.output, cache, prompt, **options)
    seconds = time.perf_counter() - started
    summary = report.prompt_file_summary(PromptFile.load(args.output))
    if not args.json:
        report.print_prompt_file(summary)
        print(f"Saved {args.output} after {seconds:.1f} s")
    return summary | {"backend": name, "output": args.output, "seconds": seconds}


def evaluate(args: argparse.Namespace) -> dict:
    """`spectralkv eval`: what methods cost in quality, and the bytes they take, over texts and documents."""
    suite = evaluation.SUITES[args.suite]
    settings = evaluation.Settings(
        methods=_values(args.methods, "--methods", str),
        bits=_values(args.bits, "--bits", float) or evaluation.DEFAULT_BITS,
        tasks=_values(args.tasks, "--tasks", str) or suite["tasks"],
        metrics=_values(args.metrics, "--metrics", str) or evaluation.METRICS,
        prefixes=_values(args.prefix, "--prefix", int) or suite["prefixes"],
        scored=suite["scored"] if args.scored is None else args.scored,
        documents=suite["documents"] if args.documents is None else args.documents,
        step=args.step,
        prefill_chunk=args.prefill_chunk,
        window=args.window,
        sinks=args.sinks,
        greedy=suite["greedy"] if args.greedy is None else args.greedy,
        turns=args.turns,
        turn_tokens=args.turn_tokens,
        keep=_values(args.keep, "--keep", float),
        wavelets=_values(args.wavelet, "--wavelet", str),
        rounding_scores=_values(args.rounding_scores, "--rounding-scores", str),
        tiers=tuple(tuple(_tiers(text)) for text in args.tiers or ()),
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
    evaluation_report.save_evaluation(result, output)
    if not args.json:
        evaluation_report.print_evaluation(result)
        print(f"Saved {output / 'summary.md'}, summary.json and rows.jsonl")
    return result


def bench(args: argparse.Namespace) -> dict:
    """`spectralkv bench`: speed, bytes and peak memory beside the host's plain and quantized caches."""
    settings = benchmark.Settings(
        methods=_values(args.methods, "--methods", str),
        contexts=_values(args.context, "--context", int) or benchmark.CONTEXTS,
        bits=args.bits,
        synthetic=args.synthetic,
        plan=args.plan or ("flat" if args.synthetic else None),
    )
    if args.output is not None:
        _check_output(args.output)
    name, host = load_backend(args.backend)
    _, timed = load_backend(name, "bench")
    result = {"backend": name, "bits": args.bits, "machine": benchmark.machine(host, timed)}
    if args.synthetic:
        result |= {"synthetic": args.synthetic, "plan": settings.plan}
        result |= benchmark.bench_layer(timed, name, settings, args.dtype or timed.default_dtype())
    else:
        path = _model_path(args.model or "demo")
        model, tokenizer = host.load_model(path, args.dtype)
        settings = settings.within(host.context_limit(model), drop=args.context is None)
        result["model"] = args.model or "demo"
        result |= benchmark.bench_model(
            host, timed, model, tokenizer, settings, {"backend": name, "model": path, "dtype": args.dtype}
        )
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(result, indent=1, default=to_plain) + "\n", encoding="utf-8")
    if not args.json:
        report.print_bench(result)
    return result


def inspect(args: argparse.Namespace) -> dict:
    """`spectralkv inspect`: what a profile holds, and the plan that a budget gets from it; or what a prompt cache holds."""
    if format_name(args.file) == PROMPT_FORMAT.name:
        summary = report.prompt_file_summary(PromptFile.load(args.file))
        if not args.json:
            report.print_prompt_file(summary)
        return summary
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


def fit(args: argparse.Namespace) -> dict:
    """`spectralkv fit`: which context fits in memory at which bits; nothing of the weights is read but their sizes."""
    memory = fitting.parse_bytes(args.memory)
    bits, contexts = _values(args.bits, "--bits", float), _values(args.context, "--context", int)
    method = get_live_method(args.method)
    for option in ("window", "sinks"):
        if getattr(args, option) < 0:
            raise ValueError(
                f"Expected --{option} to be a number of tokens, 0 or more, received {getattr(args, option)}."
            )
    loaded = Profile.load(args.profile) if args.profile != "auto" and method.basis_set else None
    name, backend = load_backend(args.backend, "footprint")
    model = backend.footprint(_model_path(args.model), args.dtype)
    if loaded is not None:
        loaded.check(model.shape)
    elif method.basis_set:
        loaded = find_profile(model.shape, method.basis_set)
    options = {"window": args.window, "sinks": args.sinks}
    result = {
        "model": args.model,
        "backend": name,
        "method": method.name,
        "memory_bytes": memory,
        "weights_bytes": model.weights_bytes,
        "element_bytes": model.element_bytes,
        "context_limit": model.context,
        "profile": None if loaded is None else loaded.path,
        "passed": {i: reason for i, reason in model.passed.items() if i in model.passed_tokens},
        "uncounted": {i: reason for i, reason in model.passed.items() if i not in model.passed_tokens},
        **options,
        **fitting.fit(model, memory, method, loaded, backend.table_nbytes, bits, contexts, **options),
    }
    if not args.json:
        report.print_fit(result)
    return result


def plot(args: argparse.Namespace) -> dict:
    """`spectralkv plot`: pictures of result JSON, and of profiles; what a result lacks the fields for is named."""
    formats = _values(args.format, "--format", str) or ("png",)
    if Path(args.output).is_file():
        raise ValueError(f"Expected a folder for --output, received the file {args.output}.")
    _check_output(str(Path(args.output) / "picture"))
    results = read_results(args.results, args.bits)
    result = plots.draw(results, args.output, formats, _values(args.only, "--only", str))
    for skipped in result["skipped"]:
        print(
            f"spectralkv: no picture {skipped['picture']} of {skipped['result']}: {skipped['reason']}", file=sys.stderr
        )
    if not args.json:
        print("\n".join(result["pictures"]))
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
            "needs_profile": m.profile_set is not None,
            "latent_attention": m.latent,
            "drops_tokens": m.scorer is not None,
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


def _open_prompt_file(args: argparse.Namespace) -> PromptFile:
    """The file of `--prompt-cache-file`; raises ValueError for options that it leaves no choice in."""
    stored = PromptFile.load(args.prompt_cache_file)
    for option in (
        "window",
        "sinks",
        "budget_bytes",
        "max_context",
        "budget_tokens",
        "protect",
        "selection",
        "evict_every",
        "wavelet",
        "tiers",
        "rounding_scores",
    ):
        if getattr(args, option) is not None:
            raise ValueError(
                f"Expected no --{option.replace('_', '-')} with --prompt-cache-file, which has its own window and sinks and "
                "takes --method and --bits."
            )
    if args.raw and not stored.metadata.get("raw", True):
        raise ValueError(
            f"Expected no --raw, {args.prompt_cache_file} was made with the chat template. Leave --raw out, or make it with "
            "--raw too."
        )
    if len(stored.padding) > 1:
        raise ValueError(f"Expected a prompt cache of one prompt, {args.prompt_cache_file} has {len(stored.padding)}.")
    if stored.tokens is None and (args.compare or args.score_file):
        raise ValueError(
            f"Expected a prompt cache with its token ids for --compare, {args.prompt_cache_file} has none. Make it with "
            "spectralkv cache-prompt, or give them to save_prompt_cache."
        )
    return stored


def _live_method(args: argparse.Namespace, stored: PromptFile | None) -> Method | str | None:
    """What the cache is to be: a recipe, or of a stored one `plain`; None leaves a stored one as it is."""
    if stored is None:
        return get_live_method(args.method or DEFAULT_METHOD)
    if args.method == "plain" or (args.method is None and args.bits is None):
        return args.method
    return get_live_method(args.method or (stored.method if stored.method.live else DEFAULT_METHOD))


def _prompt_text(args: argparse.Namespace) -> str:
    text = _read(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt
    if not (text or "").strip():
        raise ValueError("Expected a prompt, received an empty one. Give --prompt TEXT or --prompt-file FILE.")
    return text


def _check_context(backend, model, prompt: int, longest: int) -> None:
    limit = backend.context_limit(model)
    if limit and longest > limit:
        raise ValueError(
            f"Expected at most {limit:,} tokens, the model's context, received {prompt:,} of prompt and {longest - prompt:,} "
            "more. Shorten the prompt or lower --max-tokens."
        )


def _check_output(path: str) -> None:
    """Raise ValueError for a file that cannot be written, before anything long runs."""
    if Path(path).is_dir():
        raise ValueError(f"Expected a file name for --output, received the folder {path}.")
    folder = next(p for p in Path(path).absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"Expected a place for --output that can be written, {folder} cannot. Name another file.")


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


def _spans(arguments: list[str] | None) -> list[tuple[int, int]]:
    """The spans of tokens that `--protect` arguments A:B name; `system` is left to the tokenizer."""
    spans = []
    for argument in arguments or ():
        if argument == "system":
            continue
        start, colon, end = argument.partition(":")
        if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
            raise ValueError(
                f"Expected system, or A:B with token positions A < B, for --protect, received {argument!r}."
            )
        spans.append((int(start), int(end)))
    return spans


def _tiers(text: str | None) -> list[tuple[float, float]] | None:
    """The (share, bits) pairs of `--tiers`."""
    if text is None:
        return None
    try:
        return [(float(share), float(bits)) for share, bits in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ValueError(
            f"Expected SHARE:BITS separated by commas for --tiers, such as 0.25:4,0.75:1, received {text!r}."
        ) from None


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

"""Tables and streamed text for the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..arrays.basis import effective_rank, rank_for_energy
from ..arrays.transform import band_sizes
from ..cache.prompt_cache_file import PromptFile
from ..codecs.transform import TransformPlan
from ..planning.plan import Plan
from ..profile.basis_set import BasisSet
from ..profile.profile import Profile
from .output import counted, lines_of, printable, without_control


class Terminal(Console):
    """A console that leaves a broken pipe to `main`, and text of files without a meaning of its own."""

    def __init__(self, width: int | None = None):
        """`width`: columns where there is no terminal to ask."""
        super().__init__(highlight=False, markup=False, emoji=False)
        if width is not None and not self.is_terminal:
            self.width = width

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich has it; what a text has from a file moves no cursor, and fills no screen."""
        super().print(*(lines_of(x) if isinstance(x, str) else x for x in objects), **options)

    def on_broken_pipe(self) -> None:
        raise  # rich would end the program


def print_table(
    rows: Iterable[Sequence[str]],
    columns: Sequence[str],
    title: str | None = None,
    *,
    left: Sequence[str] | None = None,
    width: int | None = None,
) -> None:
    """Print `rows` under the names of their `columns`, of which those in `left`, or the first, are not set to the right."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(name), justify="left" if name in (columns[:1] if left is None else left) else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Terminal(width)
    if title is not None:
        console.print(title, style="bold")
    console.print(table)


class Stream:
    """Prints tokens as text as they come, by a backend's `text_stream`."""

    def __init__(self, new_text: Callable):
        """`new_text` begins a text, an object with `token(id) -> str` and `end() -> str`."""
        self.new_text, self.text = new_text, new_text()

    def title(self, text: str) -> None:
        Terminal().print(f"--- {text}", style="bold")

    def token(self, token: int) -> None:
        if text := self.text.token(token):
            print(without_control(text), end="", flush=True)

    def end(self) -> None:
        print(without_control(self.text.end()), flush=True)
        self.text = self.new_text()


_GENERATION_ROWS = (  # label, key of a result, format
    ("prompt tokens", "prompt_tokens", "{:,}"),
    ("generated tokens", "generated_tokens", "{:,}"),
    ("cache bytes", "cache_bytes", "{:,}"),
    ("bits per element", "bits_per_element", "{:.2f}"),
    ("times smaller than 16 bits", "compression", "{:.2f}"),
    ("shared tables, bytes", "table_bytes", "{:,}"),
    ("prefill tokens/s", "prefill_tokens_per_s", "{:.1f}"),
    ("decode tokens/s", "decode_tokens_per_s", "{:.1f}"),
)


def print_generation(result: dict) -> None:
    """Bytes, quality and speed, beside the plain cache's where it ran."""
    names, runs = [f"{result['method']}, stored" if "file_method" in result else result["method"]], [result]
    if "dense" in result:
        names, runs = [*names, "plain"], [*runs, result["dense"]]
    rows = [
        (label, *(form.format(run[key]) if key in run else "" for run in runs)) for label, key, form in _GENERATION_ROWS
    ]
    print_table(rows, ("", *names))
    if "bytes_by_kind" in result:
        Terminal().print(f"{result['method']} cache: {kinds_line(result)}")
    if "kl" in result:
        Terminal().print(
            f"against the plain cache over {result['scored_tokens']} tokens: KL {result['kl']:.4f} nats/token, "
            f"top-1 agreement {result['top1']:.1%}, perplexity {result['nd_ppl']:+.1%}"
        )


def print_profile(profile: Profile) -> None:
    """A profile's summary; the name of its model is a text out of a file."""
    calibration = profile.calibration | {"text": printable(profile.calibration.get("text", "unknown text"))}
    named = replace(profile, model=printable(profile.model), calibration=calibration)
    print(lines_of(named.summary()))


def basis_set_summary(basis_set: BasisSet) -> dict:
    """Ranks and sizes of a basis set, for JSON."""
    variance = basis_set.channel_variance()
    return {
        "group": basis_set.group,
        "rope": basis_set.rope,
        "time": basis_set.time,
        "block": basis_set.block,
        "channels": basis_set.mean.shape[-1],
        "rank_95": rank_for_energy(variance, 0.95),
        "effective_rank": np.round(effective_rank(variance), 2),
    }


def plan_summary(plan: Plan) -> dict:
    """Bits per layer and side, and how many coefficients each width (or each entropy-coded rate) has, for JSON."""
    summary = {
        "method": plan.method.name,
        "bits": plan.bits,
        "bits_per_element": plan.bits_per_element,
        "hash": plan.hash,
    }
    if not isinstance(plan, TransformPlan):
        return summary
    sizes = band_sizes(plan.basis_set.block)
    heads = 2 * plan.shape.kv_heads * np.array([[len(layers)] for layers in plan.layer_groups])
    channels = heads * plan.shape.head_dim / plan.basis_set.mean.shape[1]  # [L, 1]
    per_group = (plan.rates * sizes).sum((-1, -2)) / (plan.basis_set.block * channels)  # [L, G]
    half = max(per_group.shape[1] // 2, 1)
    widths, counts = np.unique(np.repeat(plan.rates.reshape(-1, len(sizes)), sizes, axis=1), return_counts=True)
    return {
        **summary,
        "layers": [layers[0] if len(layers) == 1 else list(layers) for layers in plan.layer_groups],
        "key_bits": np.round(per_group[:, :half].mean(1), 3),
        "value_bits": np.round(per_group[:, half:].mean(1), 3) if per_group.shape[1] > 1 else None,
        "coefficients_by_width": {f"{b:.3g}": int(n) for b, n in zip(widths, counts)},
    }


def print_plan(plan: Plan) -> None:
    """The plan as a table, a row per layer."""
    summary = plan_summary(plan)
    Terminal().print(
        f"Plan: {summary['method']} at {summary['bits']:g} bits: {summary['bits_per_element']:.4f} stored bits per element"
    )
    if "layers" not in summary:
        return
    values = summary["value_bits"] if summary["value_bits"] is not None else summary["key_bits"]
    sides = zip(summary["layers"], summary["key_bits"], values)
    rows = [(str(layer).strip("[]"), f"{k:.2f}", f"{v:.2f}") for layer, k, v in sides]
    print_table(rows, ("layer", "bits per key element", "bits per value element"), left=())
    total = sum(summary["coefficients_by_width"].values())
    shares = ", ".join(f"{b} bits {n / total:.0%}" for b, n in summary["coefficients_by_width"].items())
    Terminal().print(f"Coefficients by width: {shares}")


def prompt_file_summary(file: PromptFile) -> dict:
    """What a stored prompt cache holds, for JSON."""
    assert file.path is not None  # it was loaded
    size = file.size()
    return {
        "prompt_cache": file.path,
        "model": file.model,
        "method": file.method.name,
        "bits": file.bits,
        "prompt_tokens": file.seen,
        "prompts": len(file.padding),
        "has_tokens": file.tokens is not None,
        "raw": file.metadata.get("raw"),
        "sinks": file.sinks,
        "window": file.window,
        "file_bytes": os.path.getsize(file.path),
        "cache_bytes": int(size),
        "dense_bytes": size.dense_nbytes,
        "compression": size.compression,
        "bits_per_element": size.bits_per_element,
        "bytes_by_kind": size.by_kind,
        "exact_tokens": size.exact_tokens,
        "profile": file.profile,
        "plan_hash": file.plan_hash,
        "library_version": file.library_version,
    }


def print_prompt_file(summary: dict) -> None:
    """A stored prompt cache: what made it, and where its bytes are."""
    Terminal().print(
        f"Prompt cache: {summary['prompt_tokens']:,} tokens of {printable(summary['model'] or 'an unnamed model')}, "
        f"{printable(summary['method'])} at {summary['bits']:.3g} bits, {summary['sinks']} sinks, window {summary['window']}"
    )
    rows = {kind: size for kind, size in summary["bytes_by_kind"].items() if size} | {
        "file, header and token ids included": summary["file_bytes"],
        "plain cache at 16 bits": summary["dense_bytes"],
    }
    print_table([(label, f"{number:,}") for label, number in rows.items()], ("bytes", ""))
    Terminal().print(
        f"The file is {summary['dense_bytes'] / summary['file_bytes']:.1f} times smaller than the plain cache."
    )


def print_methods(methods: list[dict]) -> None:
    """The method table."""
    columns = ("method", "what it does", "profile", "attends to codes")
    yes, mark = {True: "yes", False: "no"}, {True: " *", False: ""}
    cells = [
        (
            m["name"] + mark[m["suffers_from_key_means"]],
            m["summary"],
            yes[m["needs_profile"]],
            yes[m["latent_attention"]],
        )
        for m in methods
    ]
    print_table(cells, columns, left=columns)
    Terminal().print(
        "* Large errors where keys have a large constant part, as those of Qwen2.5 have. A cache warns of that."
    )


def print_bench(result: dict) -> None:
    """A table per context: the host's caches, then the methods with their ratios."""
    console, machine = Terminal(_BENCH_WIDTH), result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    name = f"a layer of {result['synthetic']}, {result['plan']} plan" if "synthetic" in result else result["model"]
    on = "" if machine["device"] == "cpu" else f", {machine['device']}"
    rest = f" on {machine['cpu']}{on}: {machine['cores']} cores, {machine['threads']} threads; {versions}"
    console.print(Text.assemble((printable(name), "bold"), rest))
    console.print(
        f"Memory is read at {result['machine_read_gb_per_s']:.1f} GB/s. Ratios above 1: faster than that cache."
    )
    for context, group in groupby(result["rows"], lambda record: record["context"]):
        records = list(group)
        first = records[0]
        title = f"{context:,} tokens, {first['dtype']}"
        print_table(_bench_lines(records), ("cache", *_BENCH_COLUMNS), title, width=_BENCH_WIDTH)
        _print_end_to_end(records)
        if first["host_quantized_reason"]:
            console.print(f"{machine['host_quantized']}: not measured. {first['host_quantized_reason']}")


_BENCH_WIDTH = 140
_PLAIN_WAYS = {
    "host": "plain, as the host calls it",
    "gqa": "plain, kernel with enable_gqa",
    "grouped": "plain, kernel with grouped rows",
}
_BENCH_COLUMNS = {  # label: key of a record, format
    "µs": ("attention_us", "{:,.0f}"),
    "x fastest plain": ("ratio_to_dense", "{:.2f}"),
    "x host": ("ratio_to_host", "{:.2f}"),
    "x gqa": ("ratio_to_gqa", "{:.2f}"),
    "x quantized": ("ratio_to_host_quantized", "{:.2f}"),
    "kept": ("kept_share", "{:.0%}"),
    "bytes": ("bytes", "{:,}"),
    "GB/s": ("read_gb_per_s", "{:.1f}"),
}


def _bench_lines(records: list[dict]) -> list[list[str]]:
    """Cells of the plain cache, each way of attending to it, of the host's quantized cache, and of every method."""
    first, table = records[0], []
    for way, label in _PLAIN_WAYS.items():
        microseconds = first[f"plain_{way}_us"]
        rate = first["plain_bytes"] / microseconds / 1e3
        plain = {"attention_us": microseconds, "bytes": first["plain_bytes"], "read_gb_per_s": rate}
        table.append([label, *_bench_cells(plain)])
    if first["host_quantized_us"]:
        table.append(["host's quantized cache", *_bench_cells({"attention_us": first["host_quantized_us"]})])
    return table + [
        [f"{record['method']}, {record['bits_per_element']:.3g} bits", *_bench_cells(record)] for record in records
    ]


def _bench_cells(record: dict) -> list[str]:
    return ["" if record.get(key) is None else form.format(record[key]) for key, form in _BENCH_COLUMNS.values()]


def _print_end_to_end(records: list[dict]) -> None:
    columns = {
        "decode tokens/s": ("decode_tokens_per_s", 1),
        "prefill tokens/s": ("prefill_tokens_per_s", 1),
        "peak MiB": ("peak_bytes", 2**20),
    }
    columns = {name: (key, unit) for name, (key, unit) in columns.items() if key in records[0]}
    runs = [("plain", records[0], "plain_"), *((record["method"], record, "") for record in records)]
    table = [
        (label, *(f"{record[prefix + key] / unit:,.1f}" for key, unit in columns.values()))
        for label, record, prefix in runs
    ]
    print_table(table, ("cache", *columns), width=_BENCH_WIDTH)


_FIT_WIDTH = 120


def print_fit(result: dict) -> None:
    """How many tokens fit by bits, and the bits that contexts allow."""
    console = Terminal(_FIT_WIDTH)
    sizes = f"weights {_amount(result['weights_bytes'])} of {_amount(result['memory_bytes'])}"
    rest = f" on {result['backend']}: {sizes}; sinks and window in {8 * result['element_bytes']} bits"
    console.print(Text.assemble((printable(result["model"]), "bold"), rest))
    for note in _fit_notes(result):
        console.print(note)
    limits = [
        (
            limit["method"],
            f"{limit['bits']:g}",
            f"{limit['max_prompt']:,}",
            f"{limit['max_context']:,}",
            limit["limited_by"],
        )
        for limit in result["limits"]
    ]
    names = ("cache", "bits", "one prompt, tokens", "in turns, tokens", "limited by")
    print_table(limits, names, left=("cache", "limited by"), width=_FIT_WIDTH)
    columns = ("cache", "bits", "cache size", "smaller", "tables", "prompt on top", "peak", "fits")
    for context, group in groupby(result["rows"], lambda record: record["context"]):
        records = list(group)
        console.print(Text.assemble((f"{context:,} tokens", "bold"), f": {_bits_allowed(result, context)}"))
        print_table(map(_fit_cells, records), columns, left=("cache", "fits"), width=_FIT_WIDTH)
        console.print(f"The last one: {kinds_line(records[-1])}")
    console.print(
        "A prompt of more than one call waits at 4 bits until it ends; in turns: the context comes in pieces of one call. "
        "The peak counts weights, profile, cache, tables and the arrays of one layer at work, not the process itself."
    )


def _fit_notes(result: dict) -> Iterator[str]:
    """What the figures leave out or assume."""
    if result["passed"]:
        of_reason = Counter(result["passed"].values())
        whole = ", ".join(f"{counted(number, 'layer')} with {reason}" for reason, number in of_reason.items())
        yield f"Passed through, and counted as they are: {whole}."
    if result["uncounted"]:
        reasons = ", ".join(sorted(set(result["uncounted"].values())))
        yield f"Not counted: what is held by {counted(len(result['uncounted']), 'layer')} with {reasons}."
    if result["profile"] is None and result["method"] not in ("affine", "identity"):
        yield "No profile of this model yet: tables are those of a typical one. spectralkv profile --model MODEL"


def _fit_cells(record: dict) -> tuple[str, ...]:
    fits = "yes" if record["fits"] else "in turns" if record["fits_in_turns"] else "no"
    sizes = (_amount(record[key]) for key in ("table_bytes", "prefill_bytes", "peak_bytes"))
    smaller = f"{record['compression']:.2f}"
    return record["method"], f"{record['bits']:g}", _amount(record["cache_bytes"]), smaller, *sizes, fits


def _bits_allowed(result: dict, context: int) -> str:
    allowed = next(x for x in result["contexts"] if x["context"] == context)
    prompt, turns = allowed["max_bits"], allowed["max_bits_in_turns"]
    if turns is None:
        return "nothing fits"
    if turns == prompt:
        return f"up to {turns:g} bits fit"
    return f"up to {turns:g} bits fit in turns, {'none' if prompt is None else f'up to {prompt:g}'} as one prompt"


def kinds_line(record: dict) -> str:
    """Bytes by kind and tokens held exactly, in one line."""
    kinds = ", ".join(f"{kind} {_amount(size)}" for kind, size in record["bytes_by_kind"].items() if size)
    return f"{kinds or 'nothing'}; {record['exact_tokens']:,.0f} tokens exact"


def _amount(size: int) -> str:
    """`size` bytes as a person reads them, decimal as disks and cards are sold."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.{2 if unit == 10**9 else 1}f} {name}"
    return f"{size} B"

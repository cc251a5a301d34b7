"""Tables and streamed text for the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.table import Table

from ..arrays.basis import effective_rank, rank_for_energy
from ..arrays.transform import band_sizes
from ..cache.prompt_cache_file import PromptFile
from ..codecs.transform import TransformPlan
from ..planning.plan import Plan
from ..profile.basis_set import BasisSet


class Stream:
    """Prints tokens as text as they come, by a backend's `text_stream`."""

    def __init__(self, new_text: Callable):
        """`new_text` begins a text, an object with `token(id) -> str` and `end() -> str`."""
        self.new_text, self.text = new_text, new_text()

    def title(self, text: str) -> None:
        Console(highlight=False).print(f"[bold]--- {text}[/bold]")

    def token(self, token: int) -> None:
        if text := self.text.token(token):
            print(text, end="", flush=True)

    def end(self) -> None:
        print(self.text.end(), flush=True)
        self.text = self.new_text()


def print_generation(result: dict) -> None:
    """Bytes, quality and speed, beside the plain cache's where it ran."""
    table = Table(box=None, pad_edge=False)
    own = f"{result['method']}, stored" if "file_method" in result else result["method"]
    columns = [own, *(["plain"] if "dense" in result else [])]
    runs = [result, *([result["dense"]] if "dense" in result else [])]
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")

    def row(label: str, key: str, form: str) -> None:
        table.add_row(label, *(form.format(run[key]) if key in run else "" for run in runs))

    row("prompt tokens", "prompt_tokens", "{:,}")
    row("generated tokens", "generated_tokens", "{:,}")
    row("cache bytes", "cache_bytes", "{:,}")
    row("bits per element", "bits_per_element", "{:.2f}")
    row("times smaller than 16 bits", "compression", "{:.2f}")
    row("shared tables, bytes", "table_bytes", "{:,}")
    row("prefill tokens/s", "prefill_tokens_per_s", "{:.1f}")
    row("decode tokens/s", "decode_tokens_per_s", "{:.1f}")
    console = Console(highlight=False)
    console.print(table)
    if "kl" in result:
        console.print(
            f"against the plain cache over {result['scored_tokens']} tokens: KL {result['kl']:.4f} nats/token, "
            f"top-1 agreement {result['top1']:.1%}, perplexity {result['nd_ppl']:+.1%}"
        )


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
    console = Console(highlight=False)
    console.print(
        f"Plan: {summary['method']} at {summary['bits']:g} bits: {summary['bits_per_element']:.4f} stored bits per element"
    )
    if "layers" not in summary:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "bits per key element", "bits per value element"):
        table.add_column(name, justify="right")
    values = summary["value_bits"] if summary["value_bits"] is not None else summary["key_bits"]
    for layer, k, v in zip(summary["layers"], summary["key_bits"], values):
        table.add_row(str(layer).strip("[]"), f"{k:.2f}", f"{v:.2f}")
    console.print(table)
    total = sum(summary["coefficients_by_width"].values())
    shares = ", ".join(f"{b} bits {n / total:.0%}" for b, n in summary["coefficients_by_width"].items())
    console.print(f"Coefficients by width: {shares}")


def prompt_file_summary(file: PromptFile) -> dict:
    """What a stored prompt cache holds, for JSON."""
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
        "bytes_by_part": file.bytes_by_part(),
        "profile": file.profile,
        "plan_hash": file.plan_hash,
        "library_version": file.library_version,
    }


def print_prompt_file(summary: dict) -> None:
    """A stored prompt cache: what made it, and where its bytes are."""
    console = Console(highlight=False)
    console.print(
        f"Prompt cache: {summary['prompt_tokens']:,} tokens of {summary['model'] or 'an unnamed model'}, "
        f"{summary['method']} at {summary['bits']:.3g} bits, {summary['sinks']} sinks, window {summary['window']}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes")
    table.add_column("", justify="right")
    parts = summary["bytes_by_part"]
    rows = {"codes": parts["codes"], "exact sinks and window": parts["exact"], "layers passed through": parts["passed"]}
    rows |= {
        "file, header and token ids included": summary["file_bytes"],
        "plain cache at 16 bits": summary["dense_bytes"],
    }
    for label, number in rows.items():
        table.add_row(label, f"{number:,}")
    console.print(table)
    console.print(
        f"The file is {summary['dense_bytes'] / summary['file_bytes']:.1f} times smaller than the plain cache."
    )


def print_methods(rows: list[dict]) -> None:
    """The method table."""
    table = Table(box=None, pad_edge=False)
    for name in ("method", "what it does", "profile", "attends to codes"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["name"],
            row["summary"],
            "yes" if row["needs_profile"] else "no",
            "yes" if row["latent_attention"] else "no",
        )
    Console(highlight=False).print(table)


def print_bench(result: dict) -> None:
    """A table per context: the host's caches, then the methods with their ratios."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    name = f"a layer of {result['synthetic']}, {result['plan']} plan" if "synthetic" in result else result["model"]
    on = "" if machine["device"] == "cpu" else f", {machine['device']}"
    console.print(
        f"[bold]{name}[/bold] on {machine['cpu']}{on}: {machine['cores']} cores, "
        f"{machine['threads']} threads; {versions}"
    )
    console.print(
        f"Memory is read at {result['machine_read_gb_per_s']:.1f} GB/s. Ratios above 1: faster than that cache."
    )
    for context, rows in groupby(result["rows"], lambda row: row["context"]):
        rows = list(rows)
        first = rows[0]
        console.print(f"[bold]{context:,} tokens, {first['dtype']}[/bold]")
        table = Table(box=None, pad_edge=False)
        table.add_column("cache")
        for name in _BENCH_COLUMNS:
            table.add_column(name, justify="right")
        for way, label in _PLAIN_WAYS.items():
            microseconds = first[f"plain_{way}_us"]
            rate = first["plain_bytes"] / microseconds / 1e3
            table.add_row(
                label,
                *_bench_cells({"attention_us": microseconds, "bytes": first["plain_bytes"], "read_gb_per_s": rate}),
            )
        if first["host_quantized_us"]:
            table.add_row("host's quantized cache", *_bench_cells({"attention_us": first["host_quantized_us"]}))
        for row in rows:
            table.add_row(f"{row['method']}, {row['bits_per_element']:.3g} bits", *_bench_cells(row))
        console.print(table)
        console.print(_end_to_end(rows))
        if first["host_quantized_reason"]:
            console.print(f"{machine['host_quantized']}: not measured. {first['host_quantized_reason']}")


_PLAIN_WAYS = {
    "host": "plain, as the host calls it",
    "gqa": "plain, kernel with enable_gqa",
    "grouped": "plain, kernel with grouped rows",
}
_BENCH_COLUMNS = {  # label: key of a row, format
    "µs": ("attention_us", "{:,.0f}"),
    "x fastest plain": ("ratio_to_dense", "{:.2f}"),
    "x host": ("ratio_to_host", "{:.2f}"),
    "x gqa": ("ratio_to_gqa", "{:.2f}"),
    "x quantized": ("ratio_to_host_quantized", "{:.2f}"),
    "kept": ("kept_share", "{:.0%}"),
    "bytes": ("bytes", "{:,}"),
    "GB/s": ("read_gb_per_s", "{:.1f}"),
}


def _bench_cells(row: dict) -> list[str]:
    return ["" if row.get(key) is None else form.format(row[key]) for key, form in _BENCH_COLUMNS.values()]


def _end_to_end(rows: list[dict]) -> Table:
    columns = {
        "decode tokens/s": ("decode_tokens_per_s", 1),
        "prefill tokens/s": ("prefill_tokens_per_s", 1),
        "peak MiB": ("peak_bytes", 2**20),
    }
    columns = {name: (key, unit) for name, (key, unit) in columns.items() if key in rows[0]}
    table = Table(box=None, pad_edge=False)
    table.add_column("cache")
    for name in columns:
        table.add_column(name, justify="right")
    for label, row, prefix in [("plain", rows[0], "plain_"), *((row["method"], row, "") for row in rows)]:
        table.add_row(label, *(f"{row[prefix + key] / unit:,.1f}" for key, unit in columns.values()))
    return table


def print_fit(result: dict) -> None:
    """How many tokens fit by bits, and the bits that contexts allow."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(
        f"[bold]{result['model']}[/bold] on {result['backend']}: weights {_amount(result['weights_bytes'])} of "
        f"{_amount(result['memory_bytes'])}; sinks and window in {8 * result['element_bytes']} bits"
    )
    if result["passed"]:
        console.print(f"{len(result['passed'])} layers with a sliding window are counted with their window.")
    if result["uncounted"]:
        reasons = ", ".join(sorted(set(result["uncounted"].values())))
        console.print(f"Not counted: the state of {len(result['uncounted'])} layers with {reasons}.")
    if result["profile"] is None and result["method"] not in ("affine", "identity"):
        console.print(
            "No profile of this model yet: tables are those of a typical one. spectralkv profile --model MODEL"
        )
    table = Table(box=None, pad_edge=False)
    for name in ("cache", "bits", "one prompt, tokens", "in turns, tokens", "limited by"):
        table.add_column(name, justify="left" if name in ("cache", "limited by") else "right")
    for row in result["limits"]:
        table.add_row(
            row["method"], f"{row['bits']:g}", f"{row['max_prompt']:,}", f"{row['max_context']:,}", row["limited_by"]
        )
    console.print(table)
    for context, rows in groupby(result["rows"], lambda row: row["context"]):
        console.print(f"[bold]{context:,} tokens[/bold]: {_bits_allowed(result, context)}")
        table = Table(box=None, pad_edge=False)
        for name in ("cache", "bits", "cache size", "smaller", "tables", "prompt on top", "peak", "fits"):
            table.add_column(name, justify="left" if name in ("cache", "fits") else "right")
        for row in rows:
            fits = "yes" if row["fits"] else "in turns" if row["fits_in_turns"] else "no"
            sizes = (_amount(row[key]) for key in ("table_bytes", "prefill_bytes", "peak_bytes"))
            smaller = f"{row['compression']:.2f}"
            table.add_row(row["method"], f"{row['bits']:g}", _amount(row["cache_bytes"]), smaller, *sizes, fits)
        console.print(table)
    console.print(
        "A prompt of more than one call waits at 4 bits until it ends; in turns: the context comes in pieces of one call. "
        "The peak counts weights, profile, cache, tables and the arrays of one layer at work, not the process itself."
    )


def _bits_allowed(result: dict, context: int) -> str:
    allowed = next(x for x in result["contexts"] if x["context"] == context)
    prompt, turns = allowed["max_bits"], allowed["max_bits_in_turns"]
    if turns is None:
        return "nothing fits"
    if turns == prompt:
        return f"up to {turns:g} bits fit"
    return f"up to {turns:g} bits fit in turns, {'none' if prompt is None else f'up to {prompt:g}'} as one prompt"


def _amount(size: int) -> str:
    """`size` bytes as a person reads them, decimal as disks and cards are sold."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.{2 if unit == 10**9 else 1}f} {name}"
    return f"{size} B"

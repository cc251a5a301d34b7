"""Tables of an evaluation, for the terminal and as Markdown: one or two per text, prefix and task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..files.replacing import write_whole
from .records import VARIANT

SHOWN_TURNS = 6  # of the task drift, in a table
_JOB_COLUMNS = (  # label, key of a summary record, format
    ("method", "method", "{}"),
    ("bits", "bits", "{:g}"),
    ("keep", "keep", "{:.0%}"),
    ("rounded by", "rounding_scores", "{}"),
    ("tiers", "tiers", "{}"),
    ("wavelet", "wavelet", "{}"),
)
_SIZE_COLUMNS = (
    ("cache bytes", "cache_bytes", "{:,.0f}"),
    ("smaller", "compression", "{:.2f}"),
    ("bits/el.", "bits_per_element", "{:.2f}"),
)
_SCORE_COLUMNS = (
    *_JOB_COLUMNS,
    ("KL", "kl", "{:.4f}"),
    ("± s.e.", "kl_se", "{:.4f}"),
    ("worst", "kl_worst", "{:.4f}"),
    ("top-1", "top1", "{:.1%}"),
    ("top-5", "top5", "{:.1%}"),
    ("PPL", "nd_ppl", "{:+.1%}"),
    *_SIZE_COLUMNS,
)
_INSIDE_COLUMNS = (
    *_JOB_COLUMNS,
    ("AOP", "aop", "{:.4f}"),
    ("p95", "aop_p95", "{:.4f}"),
    ("max", "aop_max", "{:.3f}"),
    ("worst layer", "worst_layer", "{}"),
    ("key error", "key_error", "{:.5f}"),
    ("value error", "value_error", "{:.5f}"),
    ("spectra", "spectral_fidelity", "{:.5f}"),
    ("diverges at", "first_divergence", "{:.1f}"),
    ("same tokens", "token_match", "{:.0%}"),
)
_NEEDLE_COLUMNS = (
    *_JOB_COLUMNS,
    ("found", "found", "{:.0%}"),
    ("plain", "found_ref", "{:.0%}"),
    ("KL", "needle_kl", "{:.4f}"),
    ("worst depth", "worst_depth", "{}"),
    ("log p", "needle_logp", "{:.3f}"),
    ("plain", "needle_logp_ref", "{:.3f}"),
    *_SIZE_COLUMNS,
)


def _drift_columns(turns: list[int]) -> tuple:
    """Columns of up to `SHOWN_TURNS` of `turns`, evenly spread; the control and AOP of the first and the last."""
    places = np.linspace(0, len(turns) - 1, min(len(turns), SHOWN_TURNS)).round().astype(int)
    kl = [(f"KL {turns[i]}", f"kl{turns[i]}", "{:.4f}") for i in places]
    ends = [
        (f"{label} {turn}", f"{name}{turn}", "{:.4f}")
        for label, name in (("fresh", "kl_fresh"), ("AOP", "aop"))
        for turn in dict.fromkeys((turns[0], turns[-1]))
    ]
    return (*_JOB_COLUMNS, *kl, *ends, *_SIZE_COLUMNS)


def _evaluation_tables(result: dict):
    """(title, columns, records) by text, prefix and task; columns that no record fills are left out."""

    def place(record):
        return record["text"], record["prefix"], record["task"]

    order = list(dict.fromkeys(map(place, result["rows"])))
    for (text, prefix, task), group in groupby(sorted(result["rows"], key=lambda r: order.index(place(r))), place):
        records = list(group)
        many = f"{records[0]['documents']} document{'s' if records[0]['documents'] > 1 else ''}"
        title = f"{text}, {task}: {many} of {prefix:,} tokens, "
        if task == "drift":
            records, turns = _by_job(records, _over_turns), list(dict.fromkeys(record["turn"] for record in records))
            ways = "KL of one cache, and of one that is made at that turn"
            tables = [(f"{title}{len(turns)} turn{'s' if len(turns) > 1 else ''}: {ways}", _drift_columns(turns))]
        elif task == "needle":
            records, depths = _by_job(records, _over_depths), len({record["depth"] for record in records})
            tables = [
                (f"{title}a number hidden at {depths} depths of each, asked for after compression", _NEEDLE_COLUMNS)
            ]
        else:
            records = [record | _worst_layer(record, result["layers"]) for record in records]
            ppl = f"plain PPL {records[0]['ppl_ref']:.2f}{' (low)' if records[0].get('low_ppl') else ''}"
            tables = [(f"{title}{records[0]['scored_tokens']:,} scored in all, {ppl}", _SCORE_COLUMNS)]
            tables.append((f"{text}, {task}, {prefix:,} tokens: inside", _INSIDE_COLUMNS))
        for title, columns in tables:
            filled = [
                c for c in columns if c in _JOB_COLUMNS[:2] or any(record.get(c[1]) is not None for record in records)
            ]
            if any(column not in _JOB_COLUMNS for column in filled):
                yield title, filled, records


def _by_job(records: list[dict], join) -> list[dict]:
    """`join` of the records of every cache."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in VARIANT), []).append(record)
    return [join(group) for group in groups.values()]


def _over_turns(records: list[dict]) -> dict:
    """The last of the records, with figures of all turns under their names and the turn."""
    names = ("kl", "kl_fresh", "aop")
    return records[-1] | {f"{name}{record['turn']}": record.get(name) for record in records for name in names}


def _over_depths(records: list[dict]) -> dict:
    """Means over depths; the depth where the KL is largest."""
    worst = max(records, key=lambda record: record["needle_kl"])
    numbers = ("found", "found_ref", "needle_kl", "needle_logp", "needle_logp_ref")
    return (
        records[0]
        | {name: float(np.mean([record[name] for record in records])) for name in numbers}
        | {"worst_depth": f"{worst['depth']:.0%}: {worst['needle_kl']:.4f}"}
    )


def _worst_layer(record: dict, layers: list[int]) -> dict:
    if "aop_layers" not in record:
        return {}
    layer, aop = max(zip(layers, record["aop_layers"]), key=lambda pair: pair[1])
    return {"worst_layer": f"{layer}: {aop:.4f}"}


def _cells(record: dict, columns) -> list[str]:
    return ["-" if record.get(key) is None else form.format(record[key]) for _, key, form in columns]


def print_evaluation(result: dict) -> None:
    """A table or two per text, task and prefix."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 127
    for title, columns, records in _evaluation_tables(result):
        console.print(f"[bold]{title}[/bold]")
        table = Table(box=None, pad_edge=False)
        for label, key, _ in columns:
            table.add_column(label, justify="left" if key == "method" else "right")
        for record in records:
            table.add_row(*_cells(record, columns))
        console.print(table)


def provenance_line(origin: Mapping) -> str:
    """A sentence or two for the reader of a table."""
    packages = ", ".join(f"{name} {number}" for name, number in origin["packages"].items())
    threads = f"{origin['threads']} thread{'' if origin['threads'] == 1 else 's'}"
    return (
        f"Made on {origin['date'][:10]} by `{origin['command']}`, with spectralkv {origin['spectralkv']}, {packages}, on "
        f"{origin['cpu']}, {threads}."
    )


def save_evaluation(result: dict, folder: Path) -> None:
    """summary.json and summary.md, each written whole or not at all."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    settings = {key: value for key, value in result["settings"].items() if key != "texts"}
    lines = [f"# {result['model']}, {result['backend']}, {result['dtype']}", "", f"{versions}. {json.dumps(settings)}"]
    if "provenance" in result:
        lines += ["", provenance_line(result["provenance"])]
    for title, columns, records in _evaluation_tables(result):
        lines += [
            "",
            f"## {title}",
            "",
            f"| {' | '.join(label for label, _, _ in columns)} |",
            "|---" * len(columns) + "|",
        ]
        lines += [f"| {' | '.join(_cells(record, columns))} |" for record in records]
    for name, text in (("summary.json", json.dumps(result, indent=1)), ("summary.md", "\n".join(lines))):
        write_whole(folder / name, f"{text}\n".encode())

"""Tables of an evaluation, for the terminal and as Markdown: one or two per text, prefix and task."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..files.replacing import write_whole
from .rows import VARIANT

SHOWN_TURNS = 6  # of the task drift, in a table
_JOB_COLUMNS = (  # label, key of a summary row, format
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
    """(title, columns, rows) by text, prefix and task; columns that no row fills are left out."""

    def place(row):
        return row["text"], row["prefix"], row["task"]

    order = list(dict.fromkeys(map(place, result["rows"])))
    for (text, prefix, task), group in groupby(sorted(result["rows"], key=lambda r: order.index(place(r))), place):
        rows = list(group)
        many = f"{rows[0]['documents']} document{'s' if rows[0]['documents'] > 1 else ''}"
        title = f"{text}, {task}: {many} of {prefix:,} tokens, "
        if task == "drift":
            rows, turns = _by_job(rows, _over_turns), list(dict.fromkeys(row["turn"] for row in rows))
            ways = "KL of one cache, and of one that is made at that turn"
            tables = [(f"{title}{len(turns)} turn{'s' if len(turns) > 1 else ''}: {ways}", _drift_columns(turns))]
        elif task == "needle":
            rows, depths = _by_job(rows, _over_depths), len({row["depth"] for row in rows})
            tables = [
                (f"{title}a number hidden at {depths} depths of each, asked for after compression", _NEEDLE_COLUMNS)
            ]
        else:
            rows = [row | _worst_layer(row, result["layers"]) for row in rows]
            ppl = f"plain PPL {rows[0]['ppl_ref']:.2f}{' (low)' if rows[0].get('low_ppl') else ''}"
            tables = [(f"{title}{rows[0]['scored_tokens']:,} scored in all, {ppl}", _SCORE_COLUMNS)]
            tables.append((f"{text}, {task}, {prefix:,} tokens: inside", _INSIDE_COLUMNS))
        for title, columns in tables:
            filled = [c for c in columns if c in _JOB_COLUMNS[:2] or any(row.get(c[1]) is not None for row in rows)]
            if any(column not in _JOB_COLUMNS for column in filled):
                yield title, filled, rows


def _by_job(rows: list[dict], join) -> list[dict]:
    """`join` of the rows of every cache."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in VARIANT), []).append(row)
    return [join(group) for group in groups.values()]


def _over_turns(rows: list[dict]) -> dict:
    """The last of the rows, with figures of all turns under their names and the turn."""
    names = ("kl", "kl_fresh", "aop")
    return rows[-1] | {f"{name}{row['turn']}": row.get(name) for row in rows for name in names}


def _over_depths(rows: list[dict]) -> dict:
    """Means over depths; the depth where the KL is largest."""
    worst = max(rows, key=lambda row: row["needle_kl"])
    numbers = ("found", "found_ref", "needle_kl", "needle_logp", "needle_logp_ref")
    return (
        rows[0]
        | {name: float(np.mean([row[name] for row in rows])) for name in numbers}
        | {"worst_depth": f"{worst['depth']:.0%}: {worst['needle_kl']:.4f}"}
    )


def _worst_layer(row: dict, layers: list[int]) -> dict:
    if "aop_layers" not in row:
        return {}
    layer, aop = max(zip(layers, row["aop_layers"]), key=lambda pair: pair[1])
    return {"worst_layer": f"{layer}: {aop:.4f}"}


def _cells(row: dict, columns) -> list[str]:
    return ["-" if row.get(key) is None else form.format(row[key]) for _, key, form in columns]


def print_evaluation(result: dict) -> None:
    """A table or two per text, task and prefix."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 127
    for title, columns, rows in _evaluation_tables(result):
        console.print(f"[bold]{title}[/bold]")
        table = Table(box=None, pad_edge=False)
        for label, key, _ in columns:
            table.add_column(label, justify="left" if key == "method" else "right")
        for row in rows:
            table.add_row(*_cells(row, columns))
        console.print(table)


def save_evaluation(result: dict, folder: Path) -> None:
    """summary.json and summary.md, each written whole or not at all."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    settings = {key: value for key, value in result["settings"].items() if key != "texts"}
    lines = [f"# {result['model']}, {result['backend']}, {result['dtype']}", "", f"{versions}. {json.dumps(settings)}"]
    for title, columns, rows in _evaluation_tables(result):
        lines += [
            "",
            f"## {title}",
            "",
            f"| {' | '.join(label for label, _, _ in columns)} |",
            "|---" * len(columns) + "|",
        ]
        lines += [f"| {' | '.join(_cells(row, columns))} |" for row in rows]
    for name, text in (("summary.json", json.dumps(result, indent=1)), ("summary.md", "\n".join(lines))):
        write_whole(folder / name, f"{text}\n".encode())

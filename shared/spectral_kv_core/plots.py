"""Pictures of results: every number comes from a result JSON, or from a profile file. matplotlib is imported when needed.

Lines differ in marker and dash as well as in colour, so that they can be told apart in black and white.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from .basis import rank_for_energy
from .demo import DEMO_DIR
from .methods import METHODS
from .paths import model_name
from .plan import Plan, make_plan
from .profile import FORMAT, Profile
from .signed_file import format_name
from .transform import band_sizes

FORMATS = ("png", "svg", "pdf")
PER_TASK = ("drift", "needle")  # tasks with a picture of their own
COLUMNS = 3  # panels beside each other, at most
PANEL = (4.4, 3.3)  # inches
MOST_LINES = 8  # of a panel of (method, bits) pairs
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#8C4C96", "#B08300", "#3E9BCB", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (9, 3)), (0, (4, 1, 1, 1, 1, 1)), "-")
RATIOS = {  # key of a bench row: what it is a ratio to; ratio_to_dense is to the fastest of the plain ones
    "ratio_to_host": "plain, as the host calls it",
    "ratio_to_gqa": "plain, kernel with enable_gqa",
    "ratio_to_grouped": "plain, kernel with grouped rows",
    "ratio_to_host_quantized": "host's quantized cache",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "svg.hashsalt": "spectralkv",  # the same numbers give the same file
}


class Skip(Exception):
    """Why a picture cannot be drawn from a result."""


@dataclass(frozen=True)
class Result:
    """A result file: the object in it, and what its pictures are named after."""

    stem: str
    content: dict | Profile
    bits: float | None = None

    @property
    def kind(self) -> str:
        if isinstance(self.content, Profile):
            return "profile"
        return "bench" if any("ratio_to_dense" in row for row in self.content["rows"]) else "eval"

    def rows(self, field: str, task: str | None = None) -> list[dict]:
        """Rows that have `field`, of `task` or of all without a picture of their own; else documents, averaged.

        Raises Skip where there are none.
        """

        def wanted(row: dict) -> bool:
            mine = row.get("task") == task if task else row.get("task") not in PER_TASK
            return mine and row.get(field) is not None and row.get("method") != "identity"

        rows = [row for row in self.content["rows"] if wanted(row)]
        rows = rows or _averaged([row for row in self.content.get("documents", []) if wanted(row)], field)
        if not rows:
            raise Skip(f"no row{f' of the task {task}' if task else ''} has the field {field}")
        return rows

    @property
    def title(self) -> str:
        content = self.content
        if self.kind == "profile":
            return _model(content.model)
        if self.kind == "bench":
            machine = content["machine"]
            name = f"a layer of {content['synthetic']}" if "synthetic" in content else _model(content["model"])
            device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
            threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
            return f"{name}, {content['backend']}, {content['bits']:g} bits, {device}, {threads}"
        parts = (content.get(key) for key in ("backend", "dtype"))
        return ", ".join([_model(content.get("model", "")), *(part for part in parts if part)])


def read_results(paths: Iterable[str], bits: float | None = None) -> list[Result]:
    """Results in files and folders (all their .json files); raises for anything that is no result or profile."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if not files:
                raise ValueError(f"Expected result JSON in a folder, found no .json file in {path}.")
        elif path.is_file():
            files = [path]
        else:
            raise FileNotFoundError(f"Expected a result JSON, a profile or a folder, found nothing at {path}.")
        found += [_read(file, bits) for file in files]
    names = [result.stem for result in found]
    for name in {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Expected results with different names, received {name} more than once: plot them apart.")
    return found


def draw(
    results: list[Result], folder: str | os.PathLike, formats: tuple[str, ...] = ("png",), only: tuple[str, ...] = ()
) -> dict:
    """Draw what every result has the fields for into `folder`; `pictures` are the paths, `skipped` what was not drawn.

    only: names of `PICTURES`. Raises ValueError for unknown names and formats or when nothing could be drawn, and
    ImportError, which names the extra, without matplotlib.
    """
    for name, given, known in (("--format", formats, FORMATS), ("--only", only, tuple(PICTURES))):
        for value in given:
            if value not in known:
                raise ValueError(f"Expected {name} among {', '.join(known)}, received {value!r}.")
    matplotlib = _matplotlib()
    pictures, skipped = [], []
    for result in results:
        for name, (kind, paint) in PICTURES.items():
            if kind != result.kind or (only and name not in only):
                continue
            try:
                with matplotlib.rc_context(STYLE):
                    figure = paint(result)
                    pictures += [_save(figure, Path(folder) / f"{result.stem}_{name}.{form}") for form in formats]
            except Skip as reason:
                skipped.append({"result": result.stem, "picture": name, "reason": str(reason)})
    if not pictures:
        reasons = (
            "; ".join(f"{s['picture']}: {s['reason']}" for s in skipped) or f"only {', '.join(only)} were asked for"
        )
        raise ValueError(f"Expected results to draw, found none: {reasons}.")
    return {"pictures": list(map(str, pictures)), "skipped": skipped}


def rate_distortion(result: Result):
    """KL against stored bits per element, a line per method, a panel per text, task and prefix."""
    rows = [row for row in result.rows("kl") if row["kl"] > 0]
    if not rows:
        raise Skip("no row has a KL above 0")
    whole = any(row.get("budget_tokens") or row.get("sealed_bits") is None for row in rows)
    field, where = ("bits_per_element", "whole cache") if whole else ("sealed_bits", "sealed region")
    styles = _styles(row["method"] for row in rows)
    panels = _by_place(rows)
    figure, axes = _panels(result.title, len(panels), sharey=True)
    for axis, (place, members) in zip(axes, panels.items()):
        for method, style in styles.items():
            line = sorted((row for row in members if row["method"] == method), key=lambda row: row[field])
            if line:
                error = [[row.get("kl_se") or 0 for row in line]]
                # a standard error as large as the mean has no place on a logarithmic axis
                low = [min(e, 0.9 * row["kl"]) for e, row in zip(error[0], line)]
                x, y = [row[field] for row in line], [row["kl"] for row in line]
                axis.errorbar(x, y, yerr=[low, error[0]], label=method, capsize=2, elinewidth=0.8, **style)
        axis.set_yscale("log")
        axis.set_title(place)
    _label(axes, f"stored bits per key or value element ({where})", "KL from the plain cache (nats per token)")
    return _legend(figure, axes)


def aop_by_layer(result: Result):
    """Relative error of the attention output, layer by layer: a panel per place, and per bits where lines are many."""
    rows = result.rows("aop_layers")
    names = _methods_and_bits(rows)
    by_bits = len(names) > MOST_LINES
    panels: dict[str, list[dict]] = {}
    for place, members in _by_place(rows).items():
        for bits in sorted({row["bits"] for row in members}, reverse=True) if by_bits else (None,):
            title = f"{place}, {bits:g} bits" if by_bits else place
            panels[title] = [row for row in members if bits in (None, row["bits"])]
    styles = _styles(name for name, _ in names) if by_bits else _styles(names)
    figure, axes = _panels(result.title, len(panels), sharey=True)
    for axis, (title, members) in zip(axes, panels.items()):
        for row in members:
            layers, name = np.arange(len(row["aop_layers"])), (row["method"], row["bits"])
            label, style = (name[0], styles[name[0]]) if by_bits else (_name(name), styles[name])
            axis.plot(layers, row["aop_layers"], label=label, markevery=_every(layers), **style)
        axis.set_yscale("log")
        axis.set_title(title)
    _label(axes, "compressible layer (first is 0)", "relative error of the\nattention output (no unit)")
    return _legend(figure, axes)


def drift_by_turn(result: Result):
    """KL and error of the attention output turn by turn, a line per method and bits, a row of panels per text."""
    rows = result.rows("turn", "drift")
    fields = [(key, label) for key, label in _DRIFT.items() if any(row.get(key) is not None for row in rows)]
    if not fields:
        raise Skip(f"no row of the task drift has the fields {' or '.join(_DRIFT)}")
    names = _methods_and_bits(rows)
    if len(names) > MOST_LINES:
        raise Skip(f"{len(names)} pairs of method and bits are more than {MOST_LINES} lines, evaluate fewer at a time")
    styles = _styles(names)
    places = _by_place(rows)
    figure, axes = _panels(result.title, len(places) * len(fields), columns=len(fields))
    grid = zip(axes, ((place, field) for place in places.items() for field in fields))
    for axis, ((place, members), (field, label)) in grid:
        for name, style in styles.items():
            line = sorted(
                (r for r in members if (r["method"], r["bits"]) == name and r.get(field) is not None),
                key=lambda r: r["turn"],
            )
            if line:
                axis.plot([r["turn"] for r in line], [r[field] for r in line], label=_name(name), **style)
        if all(row[field] > 0 for row in members if row.get(field) is not None):
            axis.set_yscale("log")
            axis.minorticks_off()
            _plain_ticks(axis, axis.get_ylim())
        axis.set_xticks(sorted({row["turn"] for row in members}))
        axis.set_title(place)
        axis.set_xlabel("turn of the conversation")
        axis.set_ylabel(label)
    return _legend(figure, axes)


_DRIFT = {"kl": "KL from the plain cache\n(nats per token)", "aop": "relative error of the\nattention output (no unit)"}


def needle_grid(result: Result):
    """Share of needles found, depth by method and bits, a panel per text and prefix."""
    rows = [row for row in result.rows("found", "needle") if row.get("depth") is not None]
    if not rows:
        raise Skip("no row of the task needle has the field depth")
    places = _by_place(rows)
    most = max(len({(row["method"], row["bits"]) for row in members}) for members in places.values())
    figure, axes = _panels(result.title, len(places), columns=2, size=(5.4, 1.2 + 0.28 * most))
    for axis, (place, members) in zip(axes, places.items()):
        names = list(dict.fromkeys((row["method"], row["bits"]) for row in members))
        depths = sorted({row["depth"] for row in members})
        grid = np.full((len(names), len(depths)), np.nan)
        for row in members:
            grid[names.index((row["method"], row["bits"])), depths.index(row["depth"])] = row["found"]
        image = axis.imshow(grid, cmap="gray", vmin=0, vmax=1, aspect="auto")
        _write_cells(axis, grid, "{:.0%}", dark_below=0.5)
        axis.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_yticks(range(len(names)), list(map(_name, names)))
        axis.grid(False)
        axis.set_title(place)
        axis.set_xlabel("depth of the needle in the prefix")
    figure.colorbar(image, ax=list(axes), label="needles found (share)", shrink=0.9)
    return figure


def speed(result: Result):
    """How many times faster a decode step's attention is than the host's, against context; a panel per method."""
    rows = result.rows("ratio_to_dense")
    names = [key for key in RATIOS if any(row.get(key) is not None for row in rows)]
    styles = _styles(names)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    figure, axes = _panels(result.title, len(methods), sharey=True, size=(5.6, 3.4))
    for axis, method in zip(axes, methods):
        members = sorted((row for row in rows if row["method"] == method), key=lambda row: row["context"])
        if len(contexts) == 1:
            _bars(axis, members[0], names)
            continue
        fastest = [row["ratio_to_dense"] for row in members]  # one of the others at every context: drawn behind them
        axis.plot([row["context"] for row in members], fastest, label="fastest plain cache", color="0.8", linewidth=8)
        for name, style in styles.items():
            line = [row for row in members if row.get(name) is not None]
            axis.plot([r["context"] for r in line], [r[name] for r in line], label=RATIOS[name], **style)
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axis.minorticks_off()
        _plain_ticks(axis, axis.get_ylim())
        axis.set_title(f"{method}{_plan_name(result)}")
    if len(contexts) == 1:
        for axis, method in zip(axes, methods):
            axis.set_title(f"{method}{_plan_name(result)}, {contexts[0]:,} tokens")
        _label(axes, _SPEED, "")
        return figure
    _label(axes, "context (tokens)", _SPEED)
    return _legend(figure, axes, columns=2)


_SPEED = "time of the other / time of ours\n(above 1 ours is faster)"


def spectrum(result: Result):
    """Variance along the components, as a share of the largest, of some layers; a panel for keys and one for values."""
    profile = result.content
    basis_set = profile.basis_set(_map_method(profile).basis_set)
    variance = basis_set.channel_variance()  # [L, G, R]
    layers = profile.shape.layers
    chosen = sorted({round(i * (len(layers) - 1) / 4) for i in range(5)})
    styles = _styles(chosen)
    figure, axes = _panels(f"{result.title}: spectra by head, after RoPE", 2, sharey=True)
    heads = variance.shape[1] // 2
    for axis, side, part in zip(axes, ("keys", "values"), (variance[:, :heads], variance[:, heads:])):
        for row in chosen:
            mean = (part[row] / part[row].max(-1, keepdims=True)).mean(0)
            components = np.arange(1, len(mean) + 1)
            axis.plot(components, mean, label=f"layer {layers[row]}", markevery=_every(components), **styles[row])
        axis.set_yscale("log")
        axis.set_title(f"{side}, mean over {heads} head{'s' if heads > 1 else ''}")
    _label(axes, "component", "variance (share of the largest)")
    return _legend(figure, axes)


def rank_map(result: Result):
    """Components that hold 95 % of the variance, layer by head, for keys and values."""
    profile = result.content
    variance = profile.basis_set(_map_method(profile).basis_set).channel_variance()
    ranks = rank_for_energy(variance, 0.95).astype(float)
    label = f"components for 95 % of the variance (of {profile.shape.head_dim})"
    return _maps(result, ranks, "ranks", label, "{:.0f}")


def bit_map(result: Result):
    """Stored bits per element, layer by head, for keys and values, of the plan at `bits`."""
    profile = result.content
    plan = make_plan(profile.shape, profile, _map_method(profile), result.bits)
    title = f"{plan.method.name} at {plan.bits:g} bits"
    return _maps(result, _bits_by_head(plan), title, "stored bits per element", "{:.1f}")


PICTURES: dict[str, tuple[str, Callable]] = {  # name: kind of result it is drawn from, function
    "rate_distortion": ("eval", rate_distortion),
    "aop": ("eval", aop_by_layer),
    "drift": ("eval", drift_by_turn),
    "needle": ("eval", needle_grid),
    "speed": ("bench", speed),
    "spectrum": ("profile", spectrum),
    "ranks": ("profile", rank_map),
    "bits": ("profile", bit_map),
}


def _model(name: str) -> str:
    """What a title calls a model: no path, and the demo model by its name."""
    return DEMO_DIR.name if name == "demo" else model_name(str(name))


def _matplotlib():
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise ImportError('Expected matplotlib for pictures: pip install "spectralkv[plots]".') from None


def _read(path: Path, bits: float | None) -> Result:
    if path.suffix == ".safetensors" or format_name(path) == FORMAT.name:
        return Result(path.stem, Profile.load(path), bits)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["rows"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        rows = None
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(
            f"Expected a JSON object with rows, as spectralkv eval and bench write it, or a profile, {path} is neither."
        )
    return Result(path.resolve().parent.name if path.name == "summary.json" else path.stem, content)


def _averaged(rows: list[dict], field: str) -> list[dict]:
    """Rows of documents as one per place, method, bits, turn and depth, with the mean of the numbers that are drawn."""
    keys = ("method", "bits", "task", "text", "prefix", "turn", "depth")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    numbers = {field, "kl", "aop", "found", "sealed_bits", "bits_per_element"} - set(keys)
    made = []
    for key, members in groups.items():
        row = dict(zip(keys, key))
        for name in numbers:
            values = [member[name] for member in members if member.get(name) is not None]
            if values:
                row[name] = np.mean(values, axis=0).tolist()
        made.append(row)
    return made


def _by_place(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by panel title: text, task and prefix."""

    def place(row: dict) -> str:
        parts = [str(row[key]) for key in ("text", "task") if row.get(key) and row[key] not in PER_TASK]
        return ", ".join([*parts, *([f"{row['prefix']:,} tokens"] if row.get("prefix") else [])]) or "all rows"

    order = list(dict.fromkeys(map(place, rows)))
    ordered = sorted(rows, key=lambda row: order.index(place(row)))
    return {name: list(members) for name, members in groupby(ordered, place)}


def _methods_and_bits(rows: list[dict]) -> list[tuple]:
    """Pairs of method and bits in the order of the method table, most bits first."""
    order = list(METHODS)
    pairs = dict.fromkeys((row["method"], row["bits"]) for row in rows)
    return sorted(pairs, key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), -pair[1]))


def _name(pair: tuple) -> str:
    return f"{pair[0]}, {pair[1]:g} bits"


def _styles(names: Iterable) -> dict:
    """How the line of every one of `names` looks."""
    unique = list(dict.fromkeys(names))
    if all(name in METHODS for name in unique):
        unique.sort(key=list(METHODS).index)  # a method looks the same in every picture of the same methods
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
        for i, name in enumerate(unique)
    }


def _panels(title: str, count: int, columns: int = COLUMNS, size: tuple = PANEL, sharey: bool = False):
    """A figure with `count` axes and no empty one."""
    figure_type = importlib.import_module("matplotlib.figure").Figure
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = figure_type(figsize=(size[0] * columns, size[1] * lines + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey).reshape(-1)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _label(axes, x: str, y: str) -> None:
    """Names of the axes: below every column and left of every row."""
    for axis in axes:
        place = axis.get_subplotspec()
        below = [a for a in axes if a.get_subplotspec().colspan.start == place.colspan.start]
        if axis is max(below, key=lambda a: a.get_subplotspec().rowspan.start):
            axis.set_xlabel(x)
        if place.is_first_col():
            axis.set_ylabel(y)


def _legend(figure, axes, columns: int | None = None):
    """One legend below all panels."""
    entries: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    wide = 5 if figure.get_figwidth() > 2 * PANEL[0] - 1 else 2
    columns = columns or (len(entries) if len(entries) <= wide else -(-len(entries) // -(-len(entries) // wide)))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, handlelength=3.5
    )
    return figure


def _every(values) -> int:
    """Distance between markers: some twelve on a line."""
    return max(1, len(values) // 12)


def _plain_ticks(axis, limits: tuple[float, float]) -> None:
    """Ticks 1, 2, 5, 10, ... of a logarithmic axis as plain numbers, closer ones where it is short."""
    low, high = limits
    steps = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 7)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])


def _bars(axis, row: dict, names: list[str]) -> None:
    shown = [name for name in names if row.get(name) is not None]
    bars = axis.barh(range(len(shown)), [row[name] for name in shown], color="0.75", edgecolor="black", hatch="//")
    axis.bar_label(bars, [f"{row[name]:.2f}" for name in shown], padding=3)
    axis.set_yticks(range(len(shown)), [RATIOS[name] for name in shown])
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)


def _plan_name(result: Result) -> str:
    return f", {result.content['plan']} plan" if result.content.get("plan") else ""


def _map_method(profile: Profile):
    """The method whose groups are heads; raises Skip for a profile that has none."""
    for method in METHODS.values():
        if method.group == "head" and method.basis_set in profile.basis_sets:
            return method
    raise Skip("the profile has no basis per head")


def _bits_by_head(plan: Plan) -> np.ndarray:
    """Stored bits per element [L, G] of every head."""
    block = plan.basis_set.block
    return (plan.rates * band_sizes(block)).sum((-1, -2)) / (block * plan.shape.head_dim)


def _maps(result: Result, values: np.ndarray, title: str, label: str, form: str):
    """`values` [L, 2H] as two maps, layers down and heads across, on one scale."""
    heads, layers = values.shape[1] // 2, result.content.shape.layers
    size = (1.9 + 0.42 * heads, max(2.4, 0.8 + 0.2 * len(layers)))
    figure, axes = _panels(f"{result.title}: {title}", 2, size=size)
    low, high = values.min(), values.max()
    for axis, side, part in zip(axes, ("keys", "values"), (values[:, :heads], values[:, heads:])):
        image = axis.imshow(part, cmap="gray_r", vmin=low, vmax=high, aspect="auto")
        _write_cells(axis, part, form, dark_above=(low + high) / 2)
        axis.set_xticks(range(heads))
        axis.set_yticks(
            range(len(layers)), [str(i) if n % _every(layers[::2]) == 0 else "" for n, i in enumerate(layers)]
        )
        axis.grid(False)
        axis.set_title(side)
        axis.set_xlabel("KV head")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label=label)
    return figure


def _write_cells(axis, grid: np.ndarray, form: str, dark_below: float = -np.inf, dark_above: float = np.inf) -> None:
    """The numbers in the cells of a map, where there is room: white on what is dark."""
    if grid.size > 400:
        return
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = value < dark_below or value > dark_above
            axis.text(
                x, y, form.format(value), ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )


def _save(figure, path: Path) -> Path:
    """Write `figure` to `path`: temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    form = path.suffix[1:]
    dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    try:
        figure.savefig(temporary, format=form, dpi=130, metadata=dated)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

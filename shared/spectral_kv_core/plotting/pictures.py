"""The pictures of `spectralkv plot`: a function per picture, from a `Result` to a figure of matplotlib.

Lines differ in marker and dash as well as in color, so that they can be told apart in black and white.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

import numpy as np

from ..arrays.basis import rank_for_energy
from ..planning.methods import METHODS
from .plan_map import bits_by_head, map_basis_set, map_plan
from .results import RATIOS, Result, Skip, budget_name, by_place, curve_names, variant, variant_name, variants

COLUMNS = 3  # panels beside each other, at most
PANEL = (4.4, 3.3)  # inches
MOST_LINES = 8  # of a panel of (method, bits) pairs
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#8C4C96", "#B08300", "#3E9BCB", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (9, 3)), (0, (4, 1, 1, 1, 1, 1)), "-")


def rate_distortion(result: Result):
    """KL against stored bits per element, a line per method (and share of tokens kept), a panel per text, task and prefix."""
    records = [record for record in result.records("kl") if record["kl"] > 0]
    if not records:
        raise Skip("no record has a KL above 0")
    whole = any(record.get("budget_tokens") or record.get("sealed_bits") is None for record in records)
    field, where = ("bits_per_element", "whole cache") if whole else ("sealed_bits", "sealed region")
    records = [record for record in records if record.get(field) is not None]
    if not records:
        raise Skip(f"no record with a KL has the field {field}")
    names = curve_names(records)
    styles = _styles(names.values())
    panels = by_place(records)
    figure, axes = _panels(result.title, len(panels), sharey=True)
    for axis, (place, members) in zip(axes, panels.items()):
        for name, style in styles.items():
            line = sorted(
                (record for record in members if names[variant(record)] == name), key=lambda record: record[field]
            )
            if line:
                high = [record.get("kl_se") or 0 for record in line]
                # a standard error as large as the mean has no place on a logarithmic axis
                low = [min(e, 0.9 * record["kl"]) for e, record in zip(high, line)]
                x, y = [record[field] for record in line], [record["kl"] for record in line]
                error = {"yerr": [low, high], "capsize": 2, "elinewidth": 0.8} if any(high) else {}
                axis.errorbar(x, y, label=name, **error, **style)
        axis.set_yscale("log")
        axis.set_title(place)
    _label(axes, f"stored bits per key or value element ({where})", "KL from the plain cache (nats per token)")
    return _legend(figure, axes)


def aop_by_layer(result: Result):
    """Relative error of the attention output, layer by layer: a panel per place, and per budget where lines are many."""
    records = result.records("aop_layers")
    if not any(error > 0 for record in records for error in record["aop_layers"]):
        raise Skip("no record has an error of the attention output above 0")
    apart = len(variants(records)) > MOST_LINES
    names = {one: variant_name(one, budget="" if apart else None) for one in variants(records)}
    styles = _styles(names.values())
    panels: dict[str, list[dict]] = {}
    for place, members in by_place(records).items():
        for record in members:
            panels.setdefault(f"{place}, {budget_name(variant(record))}" if apart else place, []).append(record)
    columns = max(COLUMNS, len(panels) // len(by_place(records))) if apart else COLUMNS  # a row for every place
    figure, axes = _panels(result.title, len(panels), columns=min(columns, 4), sharey=True)
    for axis, (title, members) in zip(axes, panels.items()):
        for record in sorted(members, key=lambda record: list(names).index(variant(record))):
            layers, name = np.arange(len(record["aop_layers"])), names[variant(record)]
            axis.plot(layers, record["aop_layers"], label=name, markevery=_every(layers), **styles[name])
        axis.set_yscale("log")
        axis.set_title(title)
    _label(axes, "compressible layer (first is 0)", "relative error of the\nattention output (no unit)")
    return _legend(figure, axes)


def drift_by_turn(result: Result):
    """KL and error of the attention output turn by turn, a line per method and bits, a row of panels per text."""
    records = result.records("turn", "drift")
    fields = [(key, label) for key, label in _DRIFT.items() if any(record.get(key) is not None for record in records)]
    if not fields:
        raise Skip(f"no record of the task drift has the fields {' or '.join(_DRIFT)}")
    names = variants(records)
    if len(names) > MOST_LINES:
        raise Skip(f"{len(names)} pairs of method and bits are more than {MOST_LINES} lines, evaluate fewer at a time")
    styles = _styles(names)
    places = by_place(records)
    figure, axes = _panels(result.title, len(places) * len(fields), columns=len(fields))
    grid = zip(axes, ((place, field) for place in places.items() for field in fields))
    for axis, ((place, members), (field, label)) in grid:
        for name, style in styles.items():
            line = sorted(
                (r for r in members if variant(r) == name and r.get(field) is not None),
                key=lambda r: r["turn"],
            )
            if line:
                axis.plot([r["turn"] for r in line], [r[field] for r in line], label=variant_name(name), **style)
        if all(record[field] > 0 for record in members if record.get(field) is not None):
            axis.set_yscale("log")
            axis.minorticks_off()
            _plain_ticks(axis, axis.get_ylim())
        axis.set_xticks(sorted({record["turn"] for record in members}))
        axis.set_title(place)
        axis.set_xlabel("turn of the conversation")
        axis.set_ylabel(label)
    return _legend(figure, axes)


_DRIFT = {"kl": "KL from the plain cache\n(nats per token)", "aop": "relative error of the\nattention output (no unit)"}


def needle_grid(result: Result):
    """Share of needles found, depth by method and bits, a panel per text and prefix."""
    records = [record for record in result.records("found", "needle") if record.get("depth") is not None]
    if not records:
        raise Skip("no record of the task needle has the field depth")
    places = by_place(records)
    most = max(len(variants(members)) for members in places.values())
    longest = max(len(variant_name(one)) for one in variants(records))
    wide = 1.0 + 0.08 * longest + 0.42 * len({record["depth"] for record in records})
    figure, axes = _panels(result.title, len(places), columns=2, size=(wide, 1.2 + 0.28 * most))
    for axis, (place, members) in zip(axes, places.items()):
        names = variants(members)
        depths = sorted({record["depth"] for record in members})
        grid = np.full((len(names), len(depths)), np.nan)
        for record in members:
            grid[names.index(variant(record)), depths.index(record["depth"])] = record["found"]
        image = axis.imshow(grid, cmap="gray", vmin=0, vmax=1, aspect="auto")
        _write_cells(axis, grid, "{:.0%}", dark_below=0.5)
        axis.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_yticks(range(len(names)), list(map(variant_name, names)))
        axis.grid(False)
        axis.set_title(place)
        axis.set_xlabel("depth of the needle in the prefix")
    figure.colorbar(image, ax=list(axes), label="needles found (share)", shrink=0.9)
    return figure


def speed(result: Result):
    """How many times faster a decode step's attention is than the host's, against context; a panel per method."""
    records = result.records("ratio_to_dense")
    names = [key for key in RATIOS if any(record.get(key) is not None for record in records)]
    styles = _styles(names)
    methods = list(dict.fromkeys(record["method"] for record in records))
    contexts = sorted({record["context"] for record in records})
    figure, axes = _panels(result.title, len(methods), sharey=True, size=(5.6, 3.4))
    for axis, method in zip(axes, methods):
        own = [record for record in records if record["method"] == method]
        members = sorted(own, key=lambda record: record["context"])
        if len(contexts) == 1:
            _bars(axis, members[0], names)
            continue
        # the fastest is one of the others at every context: drawn behind them
        at, fastest = zip(*((record["context"], record["ratio_to_dense"]) for record in members))
        axis.plot(at, fastest, label="fastest plain cache", color="0.8", linewidth=8)
        for name, style in styles.items():
            line = [record for record in members if record.get(name) is not None]
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
    return _legend(figure, axes)


_SPEED = "time of the other / time of ours\n(above 1 ours is faster)"


def spectrum(result: Result):
    """Variance along the components, as a share of the largest, of some layers; a panel for keys and one for values."""
    profile = result.profile
    basis_set = map_basis_set(profile)
    variance = basis_set.channel_variance()  # [L, G, R]
    layers = profile.shape.layers
    chosen = sorted({round(i * (len(layers) - 1) / 4) for i in range(5)})
    styles = _styles(chosen)
    figure, axes = _panels(f"{result.title}: spectra by head, after RoPE", 2, sharey=True)
    heads = variance.shape[1] // 2
    for axis, side, part in zip(axes, ("keys", "values"), (variance[:, :heads], variance[:, heads:])):
        for layer in chosen:
            mean = (part[layer] / part[layer].max(-1, keepdims=True)).mean(0)
            components = np.arange(1, len(mean) + 1)
            axis.plot(components, mean, label=f"layer {layers[layer]}", markevery=_every(components), **styles[layer])
        axis.set_yscale("log")
        axis.set_title(f"{side}, mean over {heads} head{'s' if heads > 1 else ''}")
    _label(axes, "component", "variance (share of the largest)")
    return _legend(figure, axes)


def rank_map(result: Result):
    """Components that hold 95 % of the variance, layer by head, for keys and values."""
    profile = result.profile
    variance = map_basis_set(profile).channel_variance()
    ranks = rank_for_energy(variance, 0.95).astype(float)
    label = f"components for 95 % of the variance (of {profile.shape.head_dim})"
    return _maps(result, ranks, "ranks", label, "{:.0f}")


def bit_map(result: Result):
    """Stored bits per element, layer by head, for keys and values, of the plan at `bits`."""
    profile = result.profile
    plan = map_plan(profile, result.bits)
    title = f"{plan.method.name} at {plan.bits:g} bits"
    return _maps(result, bits_by_head(plan), title, "stored bits per element", "{:.1f}")


def _styles(names: Iterable) -> dict:
    """How the line of every one of `names` looks."""
    unique = list(dict.fromkeys(names))
    if all(name in METHODS for name in unique):
        unique.sort(key=list(METHODS).index)  # a method looks the same in every picture of the same methods
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
        for i, name in enumerate(unique)
    }


def _panels(title: str, count: int, columns: int = COLUMNS, size: tuple = PANEL, sharey: bool = False):
    """A figure with `count` axes and no empty one."""
    figure_type = importlib.import_module("matplotlib.figure").Figure
    columns = min(columns, 2 if (columns, count) == (COLUMNS, 4) else count)  # two lines of two leave no gap
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


def _legend(figure, axes):
    """One legend below all panels, in as many columns as fit; a figure grows with the lines of its legend."""
    entries: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    entry = 0.95 + 0.075 * max(map(len, map(str, entries)))  # inches, at the font size of `plots.STYLE`
    lines = -(-len(entries) // max(int(figure.get_figwidth() / entry), 1))
    columns = -(-len(entries) // lines)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(lines - 2, 0))
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


def _bars(axis, record: dict, names: list[str]) -> None:
    shown = [name for name in names if record.get(name) is not None]
    bars = axis.barh(range(len(shown)), [record[name] for name in shown], color="0.75", edgecolor="black", hatch="//")
    axis.bar_label(bars, [f"{record[name]:.2f}" for name in shown], padding=3)
    axis.set_yticks(range(len(shown)), [RATIOS[name] for name in shown])
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)


def _plan_name(result: Result) -> str:
    return f", {result.fields['plan']} plan" if result.fields.get("plan") else ""


def _maps(result: Result, values: np.ndarray, title: str, label: str, form: str):
    """`values` [L, 2H] as two maps, layers down and heads across, on one scale."""
    heads, layers = values.shape[1] // 2, result.profile.shape.layers
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

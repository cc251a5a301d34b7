"""`spectralkv plot`: every picture that result files have the numbers for. matplotlib is imported when needed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from . import pictures
from .results import Result, Skip

FORMATS = ("png", "svg", "pdf")
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
PICTURES: dict[str, tuple[str, Callable]] = {  # name: kind of result it is drawn from, function
    "rate_distortion": ("eval", pictures.rate_distortion),
    "aop": ("eval", pictures.aop_by_layer),
    "drift": ("eval", pictures.drift_by_turn),
    "needle": ("eval", pictures.needle_grid),
    "speed": ("bench", pictures.speed),
    "spectrum": ("profile", pictures.spectrum),
    "ranks": ("profile", pictures.rank_map),
    "bits": ("profile", pictures.bit_map),
}


def draw(
    results: list[Result], folder: str | os.PathLike, formats: tuple[str, ...] = ("png",), only: tuple[str, ...] = ()
) -> dict:
    """Draw what every result has the fields for into `folder`; `pictures` are the paths, `skipped` what was not drawn.

    only: names of `PICTURES`. Raises UsageError for unknown names and formats or when nothing could be drawn, and
    ImportError, which names the extra, without matplotlib.
    """
    for name, given, known in (("formats", formats, FORMATS), ("only", only, tuple(PICTURES))):
        for value in given:
            if value not in known:
                raise UsageError(f"Expected `{name}` among {', '.join(known)}, received {value!r}.")
    matplotlib = _matplotlib()
    drawn, skipped = [], []
    for result in results:
        for name, (kind, paint) in PICTURES.items():
            if kind != result.kind or (only and name not in only):
                continue
            try:
                with matplotlib.rc_context(STYLE):
                    figure = paint(result)
                    drawn += [_save(figure, Path(folder) / f"{result.stem}_{name}.{form}") for form in formats]
            except Skip as reason:
                skipped.append({"result": result.stem, "picture": name, "reason": str(reason)})
    if not drawn:
        reasons = (
            "; ".join(f"{s['picture']}: {s['reason']}" for s in skipped) or f"only {', '.join(only)} were asked for"
        )
        raise UsageError(f"Expected results to draw, found none: {reasons}.")
    return {"pictures": list(map(str, drawn)), "skipped": skipped}


def _matplotlib():
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise ImportError('Expected matplotlib for pictures: pip install "spectralkv[plots]".') from None


def _save(figure, path: Path) -> Path:
    """Write `figure` to `path`: temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    form = path.suffix[1:]
    dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    try:
        smaller = {"pil_kwargs": {"optimize": True}} if form == "png" else {}
        figure.savefig(temporary, format=form, dpi=120, metadata=dated, **smaller)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

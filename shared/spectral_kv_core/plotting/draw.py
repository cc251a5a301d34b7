"""`spectralkv plot`: every picture that result files have the numbers for. matplotlib is imported when needed."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from ..files.replacing import write_whole
from ..profile.profile import Profile
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
    drawn, skipped = [], []
    for result, name, figure in figures(results, only):
        if isinstance(figure, Skip):
            skipped.append({"result": result.stem, "picture": name, "reason": str(figure)})
        else:
            drawn += [_save(figure, Path(folder) / f"{result.stem}_{name}.{form}") for form in formats]
    if not drawn:
        reasons = (
            "; ".join(f"{s['picture']}: {s['reason']}" for s in skipped) or f"only {', '.join(only)} were asked for"
        )
        raise UsageError(f"Expected results to draw, found none: {reasons}.")
    return {"pictures": list(map(str, drawn)), "skipped": skipped}


def figures(results: list[Result], only: tuple[str, ...] = ()) -> Iterator[tuple]:
    """(result, name of `PICTURES`, figure) of every picture; in place of a figure the `Skip` that says why there is none.

    Raises ImportError, which names the extra, without matplotlib.
    """
    matplotlib = _matplotlib()
    for result in results:
        for name, (kind, paint) in PICTURES.items():
            if kind != result.kind or (only and name not in only):
                continue
            try:
                with matplotlib.rc_context(STYLE):
                    figure = paint(_literal(result))
            except Skip as reason:
                figure = reason
            yield result, name, figure


def _literal(result: Result) -> Result:
    """`result` with text that matplotlib can draw.

    It reads what stands between two dollar signs as mathematics, and cannot draw control characters and half pairs.
    """

    def escaped(x):
        if isinstance(x, str):
            return "".join(c if c.isprintable() else "\ufffd" for c in x).replace("$", r"\$")
        if isinstance(x, dict):
            return {key: escaped(value) for key, value in x.items()}
        return [escaped(value) for value in x] if isinstance(x, list) else x

    content = result.content
    if isinstance(content, Profile):
        return replace(result, content=replace(content, model=escaped(content.model)))
    return replace(result, content=escaped(content))


def render(figure, form: str, dpi: int = 120) -> bytes:
    """`figure` as a file of the format `form`: the same numbers give the same bytes."""
    dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    smaller = {"pil_kwargs": {"optimize": True}} if form == "png" else {}
    made = io.BytesIO()
    with _matplotlib().rc_context(STYLE):
        figure.savefig(made, format=form, dpi=dpi, metadata=dated, **smaller)
    return made.getvalue()


def _matplotlib():
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise ImportError('Expected matplotlib for pictures: pip install "spectralkv[plots]".') from None


def _save(figure, path: Path) -> Path:
    """Write `figure` to `path`: temporary name, then rename."""
    write_whole(path, render(figure, path.suffix[1:]))
    return path

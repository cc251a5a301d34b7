"""`spectralkv report`: pictures, plans and tables of results and profiles in one page, which needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from .. import __version__
from ..files.replacing import write_whole
from . import report_tables as tables
from .draw import figures, render
from .inline_svg import Inliner
from .markup import Markup, element, joined
from .plan_map import map_plan
from .results import Result, Skip

HERE = Path(__file__).parent
TITLE = "spectralkv report"
LARGE = 400_000  # characters of a picture in SVG, above which a bitmap may be smaller
BITMAP_DPI = 192  # two dots to a pixel of CSS
DIGITS = 12  # of a SHA-256
CAPTIONS = {
    "rate_distortion": "KL from the plain cache over stored bits, with the standard error over documents",
    "aop": "Error of the attention output, layer by layer",
    "drift": "Error turn by turn of a conversation on one cache",
    "needle": "Numbers found again, by their depth in the prefix",
    "speed": "A decode step's attention beside the plain caches: above 1 ours is faster",
    "spectrum": "Variance along the components, as a share of the largest",
    "ranks": "Components that hold 95 % of the variance",
    "bits": "Stored bits per element of the plan",
}
KINDS = {"profile": "Profiles", "eval": "Evaluations", "bench": "Benchmarks"}
MEANINGS = {
    "KL": "divergence of the next-token distribution from the plain cache's, in nats per token; 0 is equal",
    "s.e., worst": "standard error over documents, and the document with the largest KL",
    "top-1, top-5": "how often the plain cache's likeliest token stays the likeliest; share of its five likeliest that stay",
    "PPL change": "perplexity beside the plain cache's",
    "AOP": "relative error of the attention output",
    "bits, sealed": "stored bits per key or value element of the compressed region",
    "bits, whole cache": "the same with the exact first and last tokens and passed layers",
    "table bytes": "what every prompt shares, held once beside the cache",
    "x host, x gqa, …": "time of that cache's decode step over ours; above 1 ours is faster",
}


@dataclass
class Report:
    """What is gathered for a page: its pictures by result, and what is left out."""

    results: list[Result]
    inliner: Inliner = field(default_factory=Inliner)
    pictures: dict[str, list[Markup]] = field(default_factory=dict)
    skipped: list[dict] = field(default_factory=list)
    notice: str | None = None

    def skip(self, result: Result, picture: str, reason: str) -> None:
        self.skipped.append({"result": result.stem, "picture": picture, "reason": reason})


def write_report(results: list[Result], output: str | os.PathLike) -> dict:
    """Write the page of `results`, whole or not at all; its path, bytes, sections and what it has no picture of.

    Raises ValueError for a budget that a profile cannot have. Without matplotlib there are no pictures: the page and
    `skipped` say so.
    """
    report = Report(results)
    _draw(report)
    groups: dict[str, list[tuple[str, str, Markup]]] = {}  # heading: id, title and content of sections
    for kind, heading in KINDS.items():
        members = [result for result in results if result.kind == kind]
        if members:
            groups[heading] = [(f"{kind}-{result.stem}", result.stem, _section(result, report)) for result in members]
    content = {"files": [("files", "Files", _files(results, report.notice))], **groups}
    if report.skipped:
        content["more"] = [("not-drawn", "Not drawn", _not_drawn(report.skipped))]
    ids = _ids([id for sections in content.values() for id, _, _ in sections])
    page = _page(content, ids, report.inliner).encode(errors="replace")  # half pairs have no bytes
    write_whole(output, page)
    return {"output": str(output), "bytes": len(page), "sections": list(ids.values()), "skipped": report.skipped}


def _draw(report: Report) -> None:
    """All pictures; without matplotlib a notice that names the extra."""
    try:
        for result, name, figure in figures(report.results):
            if isinstance(figure, Skip):
                report.skip(result, name, str(figure))
            else:
                report.pictures.setdefault(result.stem, []).append(_figure(result, name, figure, report.inliner))
    except ImportError as error:
        report.notice = f"This page has no pictures. {error}"
        for result in report.results:
            report.skip(result, "all", str(error))


def _figure(result: Result, name: str, figure, inliner: Inliner) -> Markup:
    """A picture with its caption: as SVG, or as a bitmap where that is smaller."""
    label = f"{CAPTIONS[name]}: {result.stem}"
    picture = inliner.inline(render(figure, "svg"), label)
    if len(picture) > LARGE:
        data = base64.b64encode(render(figure, "png", BITMAP_DPI)).decode()
        width = f"--width:{figure.get_figwidth() * 96:.0f}px"
        bitmap = element("img", src=f"data:image/png;base64,{data}", alt=label, class_="picture paper", style=width)
        picture = min(bitmap, picture, key=len)
    return element("figure", tables.scrolling(picture, label), element("figcaption", CAPTIONS[name]))


def _section(result: Result, report: Report) -> Markup:
    """What a page says of one result below its heading."""
    pictures = joined(report.pictures.get(result.stem, ()))
    subtitle = element("p", f"{'Profile of ' if result.kind == 'profile' else ''}{result.title}", class_="quiet")
    if result.kind == "profile":
        return joined(
            (subtitle, _plan(result, report), tables.basis_set_table(result.profile), pictures, _facts(result))
        )
    made: Callable = tables.bench_table if result.kind == "bench" else tables.evaluation_tables
    return joined((subtitle, pictures, made(result.fields), _facts(result)))


def _plan(result: Result, report: Report) -> Markup | None:
    """The plan of a profile by layer and head; named among what is left out where the profile has no basis per head."""
    try:
        plan = map_plan(result.profile, result.bits)
    except Skip as reason:
        report.skip(result, "plan", str(reason))
        return None
    return element("div", tables.plan_maps(plan), class_="maps")


def _facts(result: Result) -> Markup:
    """What a file says of how it was made, folded up."""
    if result.kind == "profile":
        return joined((element("h3", "Model and calibration"), tables.profile_facts(result.profile)))
    said = {key: value for key, value in result.fields.items() if key not in ("rows", "documents")}
    return element("details", element("summary", "Settings, machine and versions"), tables.facts(said))


def _files(results: list[Result], notice: str | None) -> Markup:
    """Which files a page was made of, by their digests, and what they say of machine and versions."""
    rows = []
    for result in results:
        digest, size = ("-", None) if result.path is None else _digest(result.path)
        texts = (_file_name(result), digest, result.title, *_machine_and_versions(result))
        cells = [element("td", element("code", text) if i < 2 else text) for i, text in enumerate(texts)]
        cells.insert(2, element("td", tables.format_value(size, "{:,}"), class_="n"))
        rows.append(cells)
    labels = ["file", "SHA-256", "bytes", "what", "machine", "versions"]
    many = f"{len(results)} file{'s' if len(results) > 1 else ''}"
    meanings = element("details", element("summary", "What the columns mean"), tables.facts(MEANINGS))
    return joined(
        (
            element("p", f"Made by spectralkv {__version__} of {many}. Press a heading to sort by its column."),
            element("p", notice, class_="notice") if notice else None,
            tables.table(f"Files, with the first {DIGITS} digits of their SHA-256", labels, rows, "wrap"),
            meanings,
        )
    )


def _machine_and_versions(result: Result) -> tuple[str, str]:
    """What a file says of the machine it was measured on, and of the versions it was made with."""
    if result.kind == "profile":
        return "-", f"spectralkv {result.profile.library_version}"
    machine = result.fields.get("machine") or result.fields.get("provenance")
    machine = machine if isinstance(machine, dict) else {}
    versions = result.fields.get("versions") or machine.get("versions")
    parts = [str(machine[key]) for key in ("cpu", "device") if key in machine]
    parts += [f"{key} {machine[key]}" for key in ("cores", "threads") if key in machine]
    if isinstance(versions, dict):
        versions = ", ".join(f"{name} {number}" for name, number in versions.items())
    return ", ".join(parts) or "-", str(versions or "-")


def _file_name(result: Result) -> str:
    """No folder of the machine that the page was made on, but the one that a summary is named after."""
    if result.path is None:
        return result.stem
    return f"{result.stem}/{result.path.name}" if result.path.name == "summary.json" else result.path.name


def _digest(path: Path) -> tuple[str, int]:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest()[:DIGITS], len(data)


def _not_drawn(skipped: list[dict]) -> Markup:
    """Pictures that results lack the numbers for: a row per picture and reason."""
    groups: dict[tuple, list[str]] = {}
    for one in skipped:
        groups.setdefault((one["picture"], one["reason"]), []).append(one["result"])
    rows = [
        [element("td", text) for text in (picture, reason, ", ".join(results))]
        for (picture, reason), results in groups.items()
    ]
    return tables.table("Pictures left out, and why", ["picture", "reason", "results"], rows, "wrap")


def _ids(wanted: list[str]) -> dict[str, str]:
    """An id of letters, digits and hyphens for every one of `wanted`."""
    ids: dict[str, str] = {}
    for name in wanted:
        made = plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
        number = 1
        while made in ids.values():
            number += 1
            made = f"{plain}-{number}"
        ids[name] = made
    return ids


def _page(content: dict, ids: dict[str, str], inliner: Inliner) -> str:
    """The page of sections, with its contents, style and script inside."""
    contents, body = [], []
    for heading, sections in content.items():
        links = joined(element("li", element("a", title, href=f"#{ids[id]}")) for id, title, _ in sections)
        if heading in KINDS.values():
            contents.append(element("p", heading, class_="group"))
        contents.append(element("ul", links))
        for id, title, made in sections:
            body.append(element("section", element("h2", title), made, id=ids[id]))
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8").strip() for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    return Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        title=TITLE,
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
        outlines=inliner.definitions(),
        contents=joined(contents),
        body=joined(body),
    )

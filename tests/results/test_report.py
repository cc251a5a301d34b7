"""`spectralkv report`: one page that is whole by itself, with the numbers of its files and nothing that they could run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from cases import ToyModel, toy_profile_of
from chromium import BINARY, Page

from spectral_kv_core.cli import main as cli
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.planning.methods import METHODS
from spectral_kv_core.plotting import plan_map, report_page, report_tables
from spectral_kv_core.plotting.markup import Markup, element
from spectral_kv_core.plotting.results import read_results

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "report.html"
PROFILE = ROOT / "profiles" / "smollm2-135m-instruct.safetensors"
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>document.title='broken into'</script><img src=x onerror=\"document.title='broken into'\">&amp;'"


class Reader(HTMLParser):
    """What is in a page; raises AssertionError for elements that are not nested."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.targets, self.links, self.scripts = [], [], set(), [], []
        self.tables: list[list[list[str]]] = []
        self.headings, self.styles, self.pictures = [], [], 0
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.see(tag, dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, f"<{tag}/> closes itself in SVG only"
        self.see(tag, dict(attributes))

    def see(self, tag, attributes):
        names = list(attributes)
        assert not [name for name in names if name.startswith("on")], "handlers in attributes"
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name, value in attributes.items():
            if name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
                self.links.append(value)
            self.targets |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
        self.styles.append(attributes.get("style") or "")
        if tag == "script":
            self.scripts.append(attributes)
        self.pictures += "picture" in (attributes.get("class") or "").split()
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def check_page(text: str) -> Reader:
    """What every page must be: whole, with ids that occur once, and without anything from elsewhere."""
    page = Reader(text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.targets <= set(page.ids)
    for link in page.links:
        assert (link.startswith("#") and link[1:] in page.ids) or link.startswith("data:image/png;base64,"), link[:80]
    for style in page.styles:
        assert "@import" not in style and not re.search(r"url\((?!#)", style) and "//" not in style
    assert page.scripts == [{}], "one script, inside the page"
    assert "<!doctype html>" in text.lower() and 'name="viewport"' in text
    return page


def write(folder: Path, *results: Path, **options) -> tuple[dict, str]:
    made = report_page.write_report(read_results(map(str, results), **options), folder / "report.html")
    return made, (folder / "report.html").read_text(encoding="utf-8")


def toy_profile(folder: Path, **changes) -> Path:
    return dataclasses.replace(toy_profile_of(ToyModel()), **changes).save(folder / "toy.safetensors")


def eval_file(folder: Path, **fields) -> Path:
    """Two methods at two bits, one row without a KL, as `spectralkv eval` writes them."""
    rows = []
    for method, factor in (("spectral", 1.0), ("spectral-dense", 0.3)):
        for bits in (10.0, 2.0):
            row = {"method": method, "bits": bits, "text": "novel", "prefix": 1024, "task": "text", "top1": 0.9}
            row |= {"sealed_bits": bits, "bits_per_element": bits + 1, "cache_bytes": 1000.0 * bits, "documents": 2}
            rows.append(row | {"kl": factor / bits, "kl_se": 0.01})
    rows.append(rows[0] | {"bits": 5.0, "kl": None})
    content = {"rows": rows, "model": "tiny", "backend": "torch", "dtype": "float32", "versions": {"numpy": "2.0"}}
    (folder / "made.json").write_text(json.dumps(content | fields))
    return folder / "made.json"


def test_page_of_a_profile_shows_its_plan(tmp_path):
    made, text = write(tmp_path, toy_profile(tmp_path), bits=2.0)
    page = check_page(text)
    assert made["bytes"] == len(text.encode()) and made["sections"] == ["files", "profile-toy"] and not made["skipped"]
    assert set(made["sections"]) <= set(page.ids) and page.pictures == 3
    profile = toy_profile_of(ToyModel())
    plan = make_plan(profile.shape, profile, METHODS["spectral"], 2.0)
    maps = [table for table in page.tables if table[0][1:] == ["keys", "values"]]
    for shown, values in zip(maps, (plan_map.bits_by_head(plan), plan_map.kept_by_head(plan)), strict=True):
        cells = np.array([[float(cell) for cell in row[1:]] for row in shown[2:]])
        np.testing.assert_allclose(cells, values, atol=0.051)
    assert np.mean([float(c) for row in maps[0][2:] for c in row[1:]]) == pytest.approx(plan.bits_per_element, abs=0.01)
    assert any("head.post" in row and "keys" in row for table in page.tables for row in table)
    assert "calibration: tokens" in text and "1500" in text


def test_kept_components_are_the_share_of_coefficients_that_are_stored():
    profile = toy_profile_of(ToyModel())
    plan = make_plan(profile.shape, profile, METHODS["spectral"], 0.5)
    kept = plan_map.kept_by_head(plan)
    sizes = [1, 1, 2, 4, 8]  # frequencies of the bands of a block of 16
    by_hand = sum(size * (plan.widths[..., band] > 0).sum(-1) for band, size in enumerate(sizes)) / 16
    np.testing.assert_allclose(kept, by_hand)
    assert kept.min() > 0 and kept.max() < 64


def test_tables_have_the_numbers_of_the_file(tmp_path):
    path = eval_file(tmp_path)
    _, text = write(tmp_path, path)
    page = check_page(text)
    (table,) = [t for t in page.tables if "KL" in t[0]]
    assert table[0][:3] == ["method", "bits", "KL"], "text, prefix and documents are the same in all rows: in the title"
    assert "text, 5 records, text novel, prefix 1,024, documents 2" in text
    assert table[1] == ["spectral", "10", "0.10000", "0.01000", "90.00%", "10.000", "11.000", "10,000"]
    assert table[5][:3] == ["spectral", "5", "-"]
    (files,) = [t for t in page.tables if "SHA-256" in t[0]]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert files[1] == ["made.json", digest, f"{path.stat().st_size:,}", "tiny, torch, float32", "-", "numpy 2.0"]


def test_bench_table_and_machine(tmp_path):
    _, text = write(tmp_path, ROOT / "results" / "bench_demo.json")
    page = check_page(text)
    (table,) = [t for t in page.tables if "x host" in t[0]]
    (row,) = json.loads((ROOT / "results" / "bench_demo.json").read_text())["rows"]
    shown = dict(zip(table[0], table[1]))
    assert shown["x host"] == f"{row['ratio_to_host']:.2f}" and shown["bytes, ours"] == f"{row['bytes']:,}"
    assert shown["peak MiB"] == f"{row['peak_bytes'] / 2**20:,.0f}" and shown["kept"] == "85%"
    (files,) = [t for t in page.tables if "SHA-256" in t[0]]
    assert files[1][4] == "AMD EPYC, cpu, cores 2, threads 2"


def test_what_is_not_drawn_is_named_with_its_reason(capsys, tmp_path):
    layer = toy_profile_of(ToyModel(), "layer", "pre").save(tmp_path / "layer.safetensors")
    output = tmp_path / "new" / "folder" / "page.html"
    arguments = ["report", str(eval_file(tmp_path)), str(layer), "--output", str(output), "--json"]
    assert cli.main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["output"] == str(output) and made["bytes"] == output.stat().st_size
    assert {(s["result"], s["picture"]) for s in made["skipped"]} == {
        *(("made", name) for name in ("aop", "drift", "needle")),
        *(("layer", name) for name in ("spectrum", "ranks", "bits", "plan")),
    }
    page = check_page(output.read_text())
    rows = [tuple(row) for row in page.tables[-1][1:]]
    assert ("aop", "no record has the field aop_layers", "made") in rows
    assert ("plan", "the profile has no basis per head", "layer") in rows
    assert [path.name for path in output.parent.iterdir()] == ["page.html"], "no temporary file stays"
    assert cli.main(arguments[:-1]) == 0
    assert "Left out: 7 pictures." in capsys.readouterr().out


def test_text_of_files_is_escaped_everywhere(tmp_path):
    """Names of models, texts, methods, versions, machines and keys are what somebody wrote."""
    named = {
        "text": HOSTILE,
        "task": HOSTILE,
        "method": HOSTILE,
        "bits": 2,
        "kl": 1,
        "sealed_bits": 2,
        "tiers": HOSTILE,
    }
    hostile = {"model": HOSTILE, "backend": HOSTILE, "versions": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE}
    path = eval_file(tmp_path, rows=[named], settings={HOSTILE: [HOSTILE]}, machine={"cpu": HOSTILE}, **hostile)
    bench = json.loads((ROOT / "results" / "bench_demo.json").read_text()) | {"model": HOSTILE}
    bench["machine"] |= {"cpu": HOSTILE, "device": "cpu", "versions": HOSTILE}
    (tmp_path / "<b>&'bench.json").write_text(json.dumps(bench))
    profile = toy_profile(tmp_path, model=HOSTILE, calibration={HOSTILE: HOSTILE}, library_version=HOSTILE)
    _, text = write(tmp_path, path, tmp_path / "<b>&'bench.json", profile)
    page = check_page(text)
    assert text.count("<script") == 1 and "<img src=x" not in text and "<b>" not in text
    assert "<b>&'bench" in page.headings and any(HOSTILE in row for table in page.tables for row in table)
    assert page.pictures == 5


def test_characters_that_no_page_has_are_replaced(tmp_path):
    name = "a\x00\x1b[1m\ud800b"
    named = {"method": name, "text": name, "bits": 2, "kl": 1, "sealed_bits": 2}
    _, text = write(tmp_path, eval_file(tmp_path, rows=[named, named], model=name, settings={name: name}))
    assert check_page(text).pictures == 1 and "a\ufffd\ufffd[1m" in text and "\x00" not in text


def test_element_escapes_what_is_no_markup():
    assert element("p", "<b>", Markup("<i></i>"), None, title='"<', class_="x", hidden=True, lang=None, dir=False) == (
        '<p title="&quot;&lt;" class="x" hidden>&lt;b&gt;<i></i></p>'
    )


def test_ids_are_unique_whatever_files_are_called():
    ids = report_page._ids(["eval-a b", "eval-a-b", "eval-a_b", "eval-a-b-2", "eval-é"])
    assert len(set(ids.values())) == 5 and all(re.fullmatch("[A-Za-z0-9-]+", id) for id in ids.values())


def test_large_pictures_are_bitmaps_where_those_are_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "LARGE", 0)
    inline = report_page.Inliner.inline
    monkeypatch.setattr(report_page.Inliner, "inline", lambda *a: Markup(inline(*a) + " " * 10**6))
    _, text = write(tmp_path, eval_file(tmp_path))
    page = check_page(text)
    assert any(link.startswith("data:image/png") for link in page.links) and page.pictures == 1


def test_without_matplotlib_there_are_tables_and_the_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "page.html"
    arguments = ["report", str(toy_profile(tmp_path)), str(eval_file(tmp_path)), "--output", str(output), "--json"]
    assert cli.main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    page = check_page(output.read_text())
    assert page.pictures == 0 and "pip install &quot;spectralkv[plots]&quot;" in output.read_text()
    assert all("spectralkv[plots]" in s["reason"] for s in made["skipped"]) and len(made["skipped"]) == 2
    assert sum(table[0][1:] == ["keys", "values"] for table in page.tables) == 2
    assert any("KL" in table[0] for table in page.tables)


def test_same_files_give_the_same_page(tmp_path):
    paths = toy_profile(tmp_path), eval_file(tmp_path)
    assert write(tmp_path, *paths)[1] == write(tmp_path, *paths)[1]


def test_wrong_use(capsys, tmp_path):
    profile, made = str(toy_profile(tmp_path)), str(eval_file(tmp_path))
    (tmp_path / "cut.json").write_text(Path(made).read_text()[:100])
    (tmp_path / "cut.safetensors").write_bytes(Path(profile).read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    (tmp_path / "kept.html").write_text("kept")
    for arguments, message in (
        ([str(tmp_path / "missing.json")], "found nothing at"),
        ([str(tmp_path / "cut.json")], "rows"),
        ([str(tmp_path / "cut.safetensors")], "truncated"),
        ([str(tmp_path / "empty")], "no .json"),
        ([made, made], "more than once"),
        ([profile, "--bits", "99"], "bits"),
        ([made, "--output", str(tmp_path)], "received the folder"),
    ):
        output = [] if "--output" in arguments else ["--output", str(tmp_path / "kept.html")]
        assert cli.main(["report", *arguments, *output]) == 2, arguments
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out, (arguments, err)
    assert (tmp_path / "kept.html").read_text() == "kept"


def test_a_page_that_cannot_be_finished_leaves_the_one_before(monkeypatch, capsys, tmp_path):
    arguments = ["report", str(eval_file(tmp_path)), "--output", str(tmp_path / "kept.html")]
    (tmp_path / "kept.html").write_text("kept")

    def full(*paths):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert cli.main(arguments) == 1
    assert capsys.readouterr().err == "spectralkv: No space left on device\n"
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*html*")} == {"kept.html": 4}


def test_values_of_any_kind_have_a_cell():
    shown = report_tables.format_value
    assert [shown(x, "{:.2f}") for x in (None, True, "a", 1, float("nan"))] == ["-", "True", "a", "1.00", "nan"]
    assert shown(0.12345, "{:.1f}%") == "12.3%" and shown(3 * 2**20, 2**20) == "3" and shown(5, "") == "5"


def test_published_page_is_made_of_the_files_that_are_there():
    """`make report` makes it again."""
    text = PUBLISHED.read_text(encoding="utf-8")
    page = check_page(text)
    assert "http:" not in text and "https:" not in text and PUBLISHED.stat().st_size < 3e6
    (files,) = [t for t in page.tables if "SHA-256" in t[0]]
    sources = [*(ROOT / "results").glob("*.json"), PROFILE]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sources}
    assert {row[0]: row[1] for row in files[1:]} == digests
    assert {path.stem for path in sources} <= set(page.headings)


chromium = pytest.mark.skipif(not BINARY.exists(), reason=f"no {BINARY}, which runs the page's script")
COLUMN = "Array.from(document.querySelectorAll('#eval-made tbody tr'), row => row.cells[{}].textContent)"
SORTS = (
    "Array.from(document.querySelectorAll('#eval-made thead th'), th => th.ariaSort || th.getAttribute('aria-sort'))"
)


@pytest.mark.slow
@chromium
def test_a_press_of_a_heading_sorts(tmp_path):
    write(tmp_path, eval_file(tmp_path))
    with Page(tmp_path / "report.html", tmp_path / "browser") as page:
        before = page.run(COLUMN.format(2))
        assert before == ["0.10000", "0.50000", "0.03000", "0.15000", "-"]
        press = "document.querySelectorAll('#eval-made thead button')[{}].click()"
        page.run(press.format(2))
        assert page.run(COLUMN.format(2)) == ["0.03000", "0.10000", "0.15000", "0.50000", "-"]
        assert page.run(SORTS)[:4] == [None, None, "ascending", None]
        page.run(press.format(2))
        assert page.run(COLUMN.format(2)) == ["0.50000", "0.15000", "0.10000", "0.03000", "-"], "no value: last"
        assert page.run(SORTS)[:4] == [None, None, "descending", None]
        page.run(press.format(1))
        assert page.run(COLUMN.format(1)) == ["2", "2", "5", "10", "10"], "numbers, not text"
        page.run("document.querySelectorAll('#eval-made thead button')[0].focus()")
        page.press("Enter", 13, "\r")
        assert page.run(COLUMN.format(0)) == ["spectral"] * 3 + ["spectral-dense"] * 2
        page.press(" ", 32, " ")
        assert page.run(COLUMN.format(0)) == ["spectral-dense"] * 2 + ["spectral"] * 3
        assert page.run(SORTS)[:4] == ["descending", None, None, None]
        assert page.problems() == []


@pytest.mark.slow
@chromium
def test_nothing_of_a_file_runs_and_nothing_is_fetched(tmp_path):
    path = eval_file(tmp_path, model=HOSTILE, backend=HOSTILE, settings={HOSTILE: HOSTILE})
    write(tmp_path, path, toy_profile(tmp_path, model=HOSTILE))
    with Page(tmp_path / "report.html", tmp_path / "browser") as page:
        assert page.run("document.title") == "spectralkv report" and page.run("document.scripts.length") == 1
        assert page.problems() == []
        page.run("document.body.append(Object.assign(document.createElement('img'), {src: 'http://localhost:9/x'}))")
        assert page.problems(), "a page that asks for something else is noticed, and its own policy refuses it"


@pytest.mark.slow
@chromium
def test_page_fits_the_screen_and_can_be_read(tmp_path):
    """On a wide and a narrow screen, light and dark."""
    write(tmp_path, eval_file(tmp_path), toy_profile(tmp_path), ROOT / "results" / "needle_smollm2.json")
    light = "getComputedStyle(document.body).{}.match(/\\d+/g).reduce((a, b) => a + +b, 0) / 3"
    narrow = (
        "Array.from(document.querySelectorAll('.picture')).filter(s => s.getBoundingClientRect().width < 200).length"
    )
    with Page(tmp_path / "report.html", tmp_path / "browser") as page:
        for width in (1280, 390):
            for dark in (False, True):
                page.show(width, 900, dark)
                assert page.run("document.documentElement.scrollWidth") <= width, "tables scroll, the page does not"
                assert page.run("document.querySelector('nav details').open") == (width == 1280)
                ground, text = page.run(light.format("backgroundColor")), page.run(light.format("color"))
                assert (ground < 60 and text > 200) if dark else (ground > 230 and text < 60)
                assert page.run(narrow) == 0 and page.problems() == []

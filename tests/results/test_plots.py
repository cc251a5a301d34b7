"""Pictures: drawn from result JSON and profiles alone, with the numbers that are in them, and readable without color."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
from cases import ToyModel, toy_profile_of  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from spectral_kv_core.cli import main as cli  # noqa: E402
from spectral_kv_core.codecs.registry import make_plan  # noqa: E402
from spectral_kv_core.planning.methods import METHODS  # noqa: E402
from spectral_kv_core.plotting import draw as plots  # noqa: E402
from spectral_kv_core.plotting import pictures  # noqa: E402
from spectral_kv_core.plotting.draw import PICTURES, draw  # noqa: E402
from spectral_kv_core.plotting.results import Result, Skip, read_results  # noqa: E402

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    "codec_smollm2_1024": ("rate_distortion",),
    "methods_smollm2": ("rate_distortion",),
    "scorers_smollm2": ("rate_distortion", "aop"),
    "second_seed_smollm2": ("rate_distortion", "aop", "drift"),
    "needle_smollm2": ("needle",),
}
KINDS = {"eval": ("rate_distortion", "aop", "drift", "needle"), "bench": ("speed",)}


def eval_rows() -> list[dict]:
    """Rows as `spectralkv eval` writes them, of two methods at two bits over two texts."""
    rows = []
    for method, factor in (("spectral", 1.0), ("spectral-dense", 0.3)):
        for bits in (4.0, 2.0):
            for text in ("novel", "code"):
                place = {"method": method, "bits": bits, "text": text, "prefix": 1024}
                place |= {"sealed_bits": bits - 0.01, "bits_per_element": bits + 1}
                error = factor * 4**-bits
                layers = [error**0.5 * (1 + i) for i in range(5)]
                rows.append(place | {"task": "text", "kl": error, "kl_se": error / 4, "aop_layers": layers})
                drift = [{"task": "drift", "turn": t, "kl": error * t, "aop": error**0.5 * t} for t in range(1, 6)]
                needle = [{"task": "needle", "depth": d / 4, "found": 1 - factor * d / 8} for d in range(5)]
                rows += [place | row for row in drift + needle]
    rows.append({"method": "identity", "bits": 16.0, "text": "novel", "task": "text", "prefix": 1024, "kl": 1e-12})
    return rows


@pytest.fixture
def evaluation() -> Result:
    return Result("made", {"rows": eval_rows(), "model": "/somewhere/tiny", "backend": "torch", "dtype": "float32"})


def published(name: str = "bench_llama_flat") -> Result:
    """What a file of results/ holds."""
    return Result(name, json.loads((ROOT / "results" / f"{name}.json").read_text()))


def profile_result(bits: float = 2.0) -> Result:
    return Result("toy", toy_profile_of(ToyModel()), bits)


def lines_of(axis) -> dict:
    """Data of every line of an axis that has a label of ours."""
    handles = dict(zip(*axis.get_legend_handles_labels()[::-1]))
    return {label: getattr(handle, "lines", [handle])[0].get_xydata() for label, handle in handles.items()}


def looks(axis) -> list[tuple]:
    handles, _ = axis.get_legend_handles_labels()
    lines = [getattr(handle, "lines", [handle])[0] for handle in handles]
    return [
        (line.get_marker(), str(line.get_linestyle()), line._unscaled_dash_pattern, line.get_linewidth())
        for line in lines
    ]


def every_figure():
    made = Result("made", {"rows": eval_rows(), "model": "tiny", "backend": "torch", "dtype": "float32"})
    results = [made, published(), published("bench_demo"), published("bench_mlx_flat"), profile_result()]
    for result in results:
        for name, (kind, paint) in PICTURES.items():
            if kind == result.kind:
                yield pytest.param(result, paint, id=f"{result.stem}-{name}")
    for stem, names in PUBLISHED.items():
        for name in names:
            yield pytest.param(published(stem), PICTURES[name][1], id=f"{stem}-{name}")


@pytest.mark.parametrize("result, paint", every_figure())
def test_every_picture_is_labeled_and_nothing_overlaps(result, paint):
    with matplotlib.rc_context(plots.STYLE):
        figure = paint(result)
        FigureCanvasAgg(figure).draw()
    panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert panels and any(axis.get_xlabel() for axis in panels)
    if paint is not pictures.needle_grid and not (paint is pictures.speed and len(result.content["rows"]) == 1):
        assert any(axis.get_ylabel() for axis in panels)  # the others have names as ticks
    for axis in panels:
        assert axis.has_data() and axis.get_title()
        styles = looks(axis)
        assert len(set(styles)) == len(styles), "lines differ in more than their color"
    assert all(bar.get_ylabel() for bar in bars)
    boxes = [axis.get_tightbbox() for axis in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    boxes.append(figure._suptitle.get_window_extent())
    for first, second in combinations(boxes, 2):
        overlap = matplotlib.transforms.Bbox.intersection(first, second)
        assert overlap is None or min(overlap.width, overlap.height) < 1, (first, second)
    for axis in figure.axes:
        for row in (axis.get_xticklabels(), axis.get_yticklabels(), axis.texts):
            shown = [text.get_window_extent() for text in row if text.get_text()]
            for first, second in pairwise(shown):
                assert not first.overlaps(second), (axis.get_title(), first, second)
    for box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1


def test_rate_distortion_shows_what_is_in_the_file():
    content = json.loads((ROOT / "results" / "codec_smollm2_1024.json").read_text())
    figure = pictures.rate_distortion(Result("codec", content))
    assert [axis.get_title() for axis in figure.axes] == ["wiki, text, 1,024 tokens", "wiki, copy, 1,024 tokens"]
    for axis, task in zip(figure.axes, ("text", "copy")):
        lines = lines_of(axis)
        names = {"spectral", "spectral-trellis", "spectral-dense", "spectral-stored"}
        assert set(lines) == names and axis.get_yscale() == "log"
        for method, data in lines.items():
            rows = [row for row in content["rows"] if row["method"] == method and row["task"] == task]
            expected = sorted((row["sealed_bits"], row["kl"]) for row in rows)
            np.testing.assert_allclose(data, expected)
    assert "sealed region" in figure.axes[0].get_xlabel()


def test_a_method_that_drops_tokens_is_drawn_at_the_bits_of_its_whole_cache(evaluation):
    for row in evaluation.content["rows"]:
        row["budget_tokens"] = 512
    axis = pictures.rate_distortion(evaluation).axes[0]
    assert "whole cache" in axis.get_xlabel() and sorted(lines_of(axis)["spectral"][:, 0]) == [3.0, 5.0]


def test_dropping_methods_are_curves_over_the_tokens_kept(evaluation):
    """Alone over what they keep; with a codec over its bits, a curve for every share."""
    for method, bits in (("knorm", (16.0,)), ("knorm+spectral", (4.0, 2.0))):
        for keep in (0.5, 0.25):
            place = {"method": method, "keep": keep, "text": "novel", "prefix": 1024, "budget_tokens": int(1024 * keep)}
            for b in bits:
                row = place | {"bits": b, "bits_per_element": b * keep, "sealed_bits": b}
                evaluation.content["rows"] += [
                    row | {"task": "text", "kl": 1 / b / keep},
                    row | {"task": "drift", "turn": 1, "kl": 1.0},
                ]
    lines = lines_of(pictures.rate_distortion(evaluation).axes[0])
    np.testing.assert_allclose(lines["knorm"], [(4, 1 / 4), (8, 1 / 8)])
    np.testing.assert_allclose(lines["knorm+spectral, keeps 25%"], [(0.5, 2), (1, 1)])
    assert set(lines) == {
        "spectral",
        "spectral-dense",
        "knorm",
        "knorm+spectral, keeps 50%",
        "knorm+spectral, keeps 25%",
    }
    with pytest.raises(Skip, match="10 pairs"):
        pictures.drift_by_turn(evaluation)


def test_what_rounds_tiers_and_wavelets_have_names_of_their_own(evaluation):
    place = {"task": "text", "text": "novel", "prefix": 1024, "bits_per_element": 2.0, "sealed_bits": 2.0}
    evaluation.content["rows"] += [
        place | {"method": "spectral", "bits": 2.0, "rounding_scores": "nearest", "kl": 0.5},
        place | {"method": "knorm+spectral", "bits": 2.0, "tiers": "0.25:5,0.75:1", "kl": 0.25},
        place | {"method": "waveletkv+spectral", "bits": 2.0, "keep": 0.5, "wavelet": "bior2.2", "kl": 0.75},
    ]
    lines = lines_of(pictures.rate_distortion(evaluation).axes[0])
    np.testing.assert_allclose(lines["spectral, rounded by nearest"], [(2, 0.5)])
    np.testing.assert_allclose(lines["knorm+spectral, tiers 0.25:5,0.75:1"], [(2, 0.25)])
    assert [name for name in lines if name.startswith("waveletkv") and name.endswith(", bior2.2")]
    assert len(lines["spectral"]) == 2


def test_identity_and_other_tasks_stay_out_of_the_curves(evaluation):
    figure = pictures.rate_distortion(evaluation)
    assert len(figure.axes) == 2 and all(set(lines_of(axis)) == {"spectral", "spectral-dense"} for axis in figure.axes)
    assert "/somewhere" not in figure._suptitle.get_text()


def test_aop_drift_and_needles(evaluation):
    aop = pictures.aop_by_layer(evaluation)
    assert len(aop.axes) == 2 and set(lines_of(aop.axes[0])) >= {"spectral, 4 bits", "spectral-dense, 2 bits"}
    np.testing.assert_allclose(lines_of(aop.axes[0])["spectral, 4 bits"][:, 1], [(1 + i) / 16 for i in range(5)])
    drift = pictures.drift_by_turn(evaluation)
    assert len(drift.axes) == 4  # two texts, KL and AOP
    np.testing.assert_allclose(lines_of(drift.axes[0])["spectral, 2 bits"], [(t, t / 16) for t in range(1, 6)])
    needle = pictures.needle_grid(evaluation)
    (image,) = needle.axes[0].images
    np.testing.assert_allclose(image.get_array()[0], [1 - d / 8 for d in range(5)])
    assert next(t.get_text() for t in needle.axes[0].get_yticklabels()) == "spectral, 4 bits"


def test_many_lines_are_split_by_bits(evaluation):
    extra = [row | {"bits": row["bits"] + b} for row in evaluation.content["rows"] for b in (0.1, 0.2, 0.3)]
    evaluation.content["rows"] += extra
    assert len(pictures.aop_by_layer(evaluation).axes) == 2 * 8
    with pytest.raises(Skip, match="more than 8 lines"):
        pictures.drift_by_turn(evaluation)


def test_fields_of_documents_are_averaged(evaluation):
    documents = [
        row | {"kl": row["kl"] * f} for row in evaluation.content["rows"] if row["task"] == "drift" for f in (0.5, 1.5)
    ]
    rows = [row for row in evaluation.content["rows"] if row["task"] == "text"]
    only = Result("made", evaluation.content | {"rows": rows, "documents": documents})
    first, second = (lines_of(pictures.drift_by_turn(r).axes[0])["spectral, 2 bits"] for r in (only, evaluation))
    np.testing.assert_allclose(first, second)
    with pytest.raises(Skip, match="field turn"):
        pictures.drift_by_turn(Result("made", evaluation.content | {"rows": rows}))


def test_speed_shows_the_ratios():
    result = published()
    lines = lines_of(pictures.speed(result).axes[0])
    for key, label in pictures.RATIOS.items():
        np.testing.assert_allclose(lines[label][:, 1], [row[key] for row in result.content["rows"]])
    np.testing.assert_allclose(
        lines["fastest plain cache"][:, 1], [r["ratio_to_dense"] for r in result.content["rows"]]
    )
    (row,) = published("bench_demo").content["rows"]
    widths = [bar.get_width() for bar in pictures.speed(published("bench_demo")).axes[0].patches]
    np.testing.assert_allclose(widths, [row[key] for key in pictures.RATIOS])


def test_maps_of_a_profile_are_those_of_its_plan():
    result = profile_result(2.0)
    plan = make_plan(result.content.shape, result.content, METHODS["spectral"], 2.0)
    keys, values = (axis.images[0].get_array() for axis in pictures.bit_map(result).axes[:2])
    assert keys.shape == values.shape == (2, 2)  # layers, heads
    assert np.mean([keys, values]) == pytest.approx(plan.bits_per_element)
    ranks = pictures.rank_map(result).axes[0].images[0].get_array()
    assert ranks.min() >= 1 and ranks.max() <= 64
    with pytest.raises(Skip, match="per head"):
        pictures.bit_map(Result("toy", toy_profile_of(ToyModel(), "layer", "pre"), 2.0))


@pytest.fixture
def made_file(tmp_path, evaluation):
    (tmp_path / "made.json").write_text(json.dumps(evaluation.content))
    return tmp_path / "made.json"


@pytest.mark.slow
def test_command_draws_every_format_and_names_what_it_skips(capsys, tmp_path, made_file):
    rows = [row for row in eval_rows() if row["task"] == "text"]
    for row in rows:
        row.pop("aop_layers", None)
    (tmp_path / "few.json").write_text(
        json.dumps({"rows": rows, "model": "demo", "backend": "mlx", "dtype": "float32"})
    )
    arguments = ["plot", str(made_file), str(tmp_path / "few.json"), "--output", str(tmp_path / "new" / "folder")]
    assert cli.main([*arguments, "--format", "png,svg", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    names = {Path(p).name for p in result["pictures"]}
    assert names == {f"made_{n}.{f}" for n in KINDS["eval"] for f in ("png", "svg")} | {
        f"few_rate_distortion.{f}" for f in ("png", "svg")
    }
    assert {s["picture"] for s in result["skipped"]} == {"aop", "drift", "needle"} and "aop_layers" in err
    for path in map(Path, result["pictures"]):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b"</svg>" in data
    assert len(list((tmp_path / "new" / "folder").iterdir())) == len(names)  # no temporary file stays
    again = {p: Path(p).read_bytes() for p in result["pictures"]}
    assert cli.main([*arguments, "--format", "png,svg"]) == 0
    assert all(Path(p).read_bytes() == data for p, data in again.items()), "the same numbers give the same file"


def test_command_reads_folders_and_profiles(capsys, tmp_path):
    profile = toy_profile_of(ToyModel()).save(tmp_path / "toy.safetensors")
    arguments = ["plot", str(profile), "--bits", "2", "--output", str(tmp_path / "out"), "--json"]
    assert cli.main(arguments) == 0
    pictures = {Path(p).name for p in json.loads(capsys.readouterr().out)["pictures"]}
    assert pictures == {"toy_spectrum.png", "toy_ranks.png", "toy_bits.png"}
    assert (
        cli.main(["plot", str(ROOT / "results"), "--only", "speed", "--output", str(tmp_path / "out"), "--json"]) == 0
    )
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    assert len(pictures) == len(list((ROOT / "results").glob("bench_*.json")))


def test_a_summary_is_named_after_its_folder(tmp_path, made_file):
    (tmp_path / "run").mkdir()
    made_file.rename(tmp_path / "run" / "summary.json")
    assert [result.stem for result in read_results([str(tmp_path / "run")])] == ["run"]


def test_wrong_use(capsys, tmp_path, made_file):
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "empty.json").write_text('{"rows": []}')
    (tmp_path / "cut.json").write_text(made_file.read_text()[:100])
    (tmp_path / "folder").mkdir()
    text = [{"method": "spectral", "bits": 2, "other": 1}]
    (tmp_path / "nothing.json").write_text(json.dumps({"rows": text}))
    made = str(made_file)
    for arguments, message in (
        ([str(tmp_path / "missing.json")], "found nothing at"),
        ([str(tmp_path / "list.json")], "rows"),
        ([str(tmp_path / "empty.json")], "rows"),
        ([str(tmp_path / "cut.json")], "rows"),
        ([str(tmp_path / "folder")], "no .json"),
        ([str(tmp_path / "nothing.json")], "found none"),
        ([made, "--format", "gif"], "--format among png"),
        ([made, "--only", "spectrums"], "--only among"),
        ([made, "--only", "speed"], "found none"),
        ([made, made], "more than once"),
        ([made, "--output", made], "received the file"),
    ):
        output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
        assert cli.main(["plot", *arguments, *output]) == 2
        out, err = capsys.readouterr()
        assert message in err and "Traceback" not in err and not out, (arguments, err)


def test_missing_matplotlib_names_the_extra(capsys, monkeypatch, tmp_path, made_file):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(made_file), "--output", str(tmp_path)]) == 1
    assert 'pip install "spectralkv[plots]"' in capsys.readouterr().err


def test_reading_results_needs_no_matplotlib():
    import subprocess

    code = "import sys, spectral_kv_core.cli; raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_draw_needs_a_known_picture(evaluation, tmp_path):
    with pytest.raises(ValueError, match="only speed"):
        draw([evaluation], tmp_path, only=("speed",))


def test_four_panels_leave_no_gap(evaluation):
    extra = [row | {"text": f"{row['text']} again"} for row in evaluation.content["rows"] if row["task"] == "text"]
    evaluation.content["rows"] += extra
    places = [axis.get_subplotspec() for axis in pictures.rate_distortion(evaluation).axes]
    assert len(places) == 4 and {place.get_gridspec().get_geometry() for place in places} == {(2, 2)}


def test_dollar_signs_are_no_mathematics(evaluation, tmp_path):
    """Between two of them matplotlib reads TeX, and fails on what is none."""
    name = r"a$\nothing{b$c"
    for row in evaluation.content["rows"]:
        row["text"] = name
    evaluation.content["model"] = name
    profile = profile_result()
    named = Result("toy", dataclasses.replace(profile.content, model=name), 2.0)
    for _, _, figure in plots.figures([evaluation, named]):
        assert figure._suptitle.get_text().startswith(r"a\$\nothing{b\$c")
        plots.render(figure, "svg")


def test_rows_without_bits_or_errors_are_named(evaluation):
    for row in evaluation.content["rows"]:
        row["bits_per_element"] = row["sealed_bits"] = None
        if "aop_layers" in row:
            row["aop_layers"] = [0.0, 0.0]
    with pytest.raises(Skip, match="bits_per_element"):
        pictures.rate_distortion(evaluation)
    with pytest.raises(Skip, match="above 0"):
        pictures.aop_by_layer(evaluation)


def test_fields_of_the_wrong_kind_are_wrong_use(capsys, tmp_path, made_file):
    evaluation = json.loads(made_file.read_text())
    bench = published("bench_demo").content
    for change, content, message in (
        ({"method": 3}, evaluation, "a name as method"),
        ({"bits": None}, evaluation, "a number as bits"),
        ({"kl": "low"}, evaluation, "a number as kl"),
        ({"prefix": [1024]}, evaluation, "a number as prefix"),
        ({"kl": 10**400}, evaluation, "a number as kl"),
        ({"aop_layers": 3}, evaluation, "a list as aop_layers"),
        ({"aop_layers": ["x"]}, evaluation, "numbers as aop_layers"),
        ({"context": None}, bench, "a context in tokens"),
        ({"ratio_to_host": "x"}, bench, "a number as ratio_to_host"),
    ):
        rows = [*content["rows"][:-1], content["rows"][-1] | change]
        (tmp_path / "wrong.json").write_text(json.dumps(content | {"rows": rows}))
        assert cli.main(["plot", str(tmp_path / "wrong.json"), "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    for change, message in (
        ({"machine": {}}, "the machine"),
        ({"bits": "2"}, "backend, bits"),
        ({"documents": 3}, "documents"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps(bench | change))
        assert cli.main(["plot", str(tmp_path / "wrong.json"), "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err

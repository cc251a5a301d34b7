"""The tables of a report: rows of evaluations and benchmarks, the plan of a profile, and what files say of themselves."""

from __future__ import annotations

import json

import numpy as np

from ..arrays.basis import effective_rank, rank_for_energy
from ..codecs.transform import TransformPlan
from ..profile.basis_set import BasisSet
from ..profile.profile import Profile
from .markup import Markup, element, joined
from .plan_map import bits_by_head, kept_by_head

STEPS = 10  # shades of a map
_MIB = 2**20
_JOB_COLUMNS = (  # key of a record, label, format or unit in bytes
    ("method", "method", ""),
    ("bits", "bits", "{:g}"),
    ("keep", "keeps", "{:.3g}%"),
    ("rounding_scores", "rounded by", ""),
    ("tiers", "tiers", ""),
    ("wavelet", "wavelet", ""),
)
EVAL_COLUMNS = (
    *_JOB_COLUMNS,
    ("text", "text", ""),
    ("prefix", "prefix", "{:,}"),
    ("turn", "turn", "{:g}"),
    ("depth", "depth", "{:.3g}%"),
    ("kl", "KL", "{:.5f}"),
    ("kl_se", "± s.e.", "{:.5f}"),
    ("kl_worst", "worst", "{:.5f}"),
    ("kl_fresh", "KL, fresh cache", "{:.5f}"),
    ("top1", "top-1", "{:.2f}%"),
    ("top5", "top-5", "{:.2f}%"),
    ("nd_ppl", "PPL change", "{:+.2f}%"),
    ("found", "found", "{:.0f}%"),
    ("found_ref", "found, plain", "{:.0f}%"),
    ("needle_kl", "KL of the needle", "{:.5f}"),
    ("aop", "AOP", "{:.4f}"),
    ("aop_max", "AOP, worst", "{:.3f}"),
    ("key_error", "key error", "{:.5f}"),
    ("value_error", "value error", "{:.5f}"),
    ("spectral_fidelity", "spectra", "{:.5f}"),
    ("first_divergence", "diverges at", "{:.1f}"),
    ("token_match", "same tokens", "{:.0f}%"),
    ("sealed_bits", "bits, sealed", "{:.3f}"),
    ("bits_per_element", "bits, whole cache", "{:.3f}"),
    ("cache_bytes", "cache bytes", "{:,.0f}"),
    ("table_bytes", "table bytes", "{:,.0f}"),
    ("compression", "times smaller", "{:.2f}"),
    ("documents", "documents", "{:g}"),
)
BENCH_COLUMNS = (
    ("method", "method", ""),
    ("context", "context", "{:,}"),
    ("dtype", "dtype", ""),
    ("threads", "threads", "{:g}"),
    ("bits_per_element", "bits", "{:.3f}"),
    ("attention_us", "µs, ours", "{:,.0f}"),
    ("plain_host_us", "µs, host", "{:,.0f}"),
    ("plain_gqa_us", "µs, gqa", "{:,.0f}"),
    ("plain_grouped_us", "µs, grouped", "{:,.0f}"),
    ("host_quantized_us", "µs, quantized", "{:,.0f}"),
    ("ratio_to_dense", "x fastest plain", "{:.2f}"),
    ("ratio_to_host", "x host", "{:.2f}"),
    ("ratio_to_gqa", "x gqa", "{:.2f}"),
    ("ratio_to_grouped", "x grouped", "{:.2f}"),
    ("ratio_to_host_quantized", "x quantized", "{:.2f}"),
    ("kept_share", "kept", "{:.0f}%"),
    ("bytes", "bytes, ours", "{:,}"),
    ("plain_bytes", "bytes, plain", "{:,}"),
    ("read_gb_per_s", "GB/s", "{:.1f}"),
    ("decode_tokens_per_s", "decode tokens/s", "{:.1f}"),
    ("plain_decode_tokens_per_s", "decode, plain", "{:.1f}"),
    ("prefill_tokens_per_s", "prefill tokens/s", "{:.1f}"),
    ("plain_prefill_tokens_per_s", "prefill, plain", "{:.1f}"),
    ("peak_bytes", "peak MiB", _MIB),
    ("plain_peak_bytes", "peak MiB, plain", _MIB),
)
_CONSTANT = ("text", "prefix", "documents", "dtype", "threads")  # said once where all records have the same


def evaluation_tables(content: dict) -> Markup:
    """A table for every task of the records of `spectralkv eval`."""
    members: dict[str, list[dict]] = {}
    for record in content["rows"]:
        members.setdefault(str(record.get("task") or "rows"), []).append(record)
    return joined(records_table(task, found, EVAL_COLUMNS) for task, found in members.items())


def bench_table(content: dict) -> Markup:
    """The records of `spectralkv bench`; ratios above 1 say that ours is faster."""
    return records_table("decode step", content["rows"], BENCH_COLUMNS)


def records_table(title: str, records: list[dict], columns) -> Markup:
    """`records` as a table that can be sorted, without columns that are empty; some that do not vary stand in the title."""
    filled = [c for c in columns if any(record.get(c[0]) is not None for record in records)]
    said = [title, f"{len(records):,} record{'s' if len(records) > 1 else ''}"]
    shown = []
    for key, label, form in filled:
        values = {str(record.get(key)) for record in records}
        if key in _CONSTANT and len(values) == 1:
            said.append(f"{label} {format_value(records[0][key], form)}")
        else:
            shown.append((key, label, form))
    cells = [[_cell(record.get(key), form) for key, _, form in shown] for record in records]
    return table(", ".join(said), [label for _, label, _ in shown], cells)


def table(caption: str, labels: list[str], rows: list[list[Markup]], class_: str = "") -> Markup:
    """A table in a box of its own that scrolls; `report.js` makes its columns sortable."""
    aligned = ["n" if ' class="n"' in cell else None for cell in rows[0]]  # as the cells below
    head = element("tr", *(element("th", label, scope="col", class_=n) for label, n in zip(labels, aligned)))
    body = joined(element("tr", *row) for row in rows)
    made = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", body),
        class_=f"sortable {class_}".strip(),
    )
    return scrolling(made, caption)


def scrolling(made: Markup, label: str) -> Markup:
    """`made` in a box that scrolls, with the keyboard too."""
    return element("div", made, class_="box", tabindex=0, role="region", aria_label=label)


def format_value(value, form) -> str:
    """`value` as a cell shows it: shares in per cent, byte counts in the unit `form`; any other kind as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or form == "":
        return str(value)
    if isinstance(form, int):
        return f"{value / form:,.0f}"
    return form.format(100 * value if form.endswith("%") else value)


def _cell(value, form) -> Markup:
    number = form != "" and (value is None or isinstance(value, (int, float)))
    return element("td", format_value(value, form), class_="n" if number else None)


def facts(pairs: dict) -> Markup:
    """Names and values beside each other; what is no text is shown as JSON."""
    shown = []
    for name, value in pairs.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown += [element("dt", name), element("dd", text)]
    return element("dl", *shown)


def profile_facts(profile: Profile) -> Markup:
    """What a profile is of, and how it was calibrated."""
    shape = profile.shape
    rope = shape.rope
    described = {
        "model": profile.model,
        "layers": f"{shape.num_layers}, of which {len(shape.layers)} can be compressed",
        "heads": f"{shape.q_heads} for queries, {shape.kv_heads} for keys and values",
        "head_dim": str(shape.head_dim),
        "RoPE": "none" if rope is None else f"{rope.rotary_dim} of {shape.head_dim} dimensions",
        "weights": profile.weights_digest,
        "library version": profile.library_version,
        **{f"calibration: {key.replace('_', ' ')}": value for key, value in profile.calibration.items()},
    }
    return facts({name: value for name, value in described.items() if value != ""})


def basis_set_table(profile: Profile) -> Markup:
    """Sizes and ranks of every basis set, a row for its keys and one for its values."""
    labels = ["basis set", "part", "group", "RoPE", "time", "block", "components"]
    labels += ["rank at 95 %, median", "least", "most", "effective rank, median"]
    rows = []
    for basis_set in profile.basis_sets.values():
        for part, variance in _parts(basis_set).items():
            rank, effective = rank_for_energy(variance, 0.95), effective_rank(variance)
            texts = (basis_set.name, part, basis_set.group, basis_set.rope, basis_set.time)
            numbers = (basis_set.block, basis_set.rank, np.median(rank), rank.min(), rank.max())
            cells = [element("td", text) for text in texts]
            cells += [element("td", f"{number:g}", class_="n") for number in numbers]
            rows.append([*cells, element("td", f"{np.median(effective):.1f}", class_="n")])
    return table("Basis sets", labels, rows)


def _parts(basis_set: BasisSet) -> dict[str, np.ndarray]:
    variance = basis_set.channel_variance()  # [L, G, R]
    half = variance.shape[1] // 2
    return {"keys": variance[:, :half], "values": variance[:, half:]} if half else {"both": variance}


def plan_maps(plan: TransformPlan) -> Markup:
    """Stored bits and kept components of every layer and head, as two tables whose cells are shaded."""
    name = f"{plan.method.name} at {plan.bits:g} bits"
    total = f"{plan.bits_per_element:.4f} stored bits per element over all"
    bits = _map(plan, bits_by_head(plan), f"Stored bits per element: {name}, {total}", "{:.2f}")
    rank = plan.basis_set.rank
    return joined(
        (bits, _map(plan, kept_by_head(plan), f"Kept components of {rank}, mean over frequencies: {name}", "{:.1f}"))
    )


def _map(plan: TransformPlan, values: np.ndarray, caption: str, form: str) -> Markup:
    """`values` [L, 2H] as a table, layers down, heads of keys and then of values across."""
    heads = values.shape[1] // 2
    low, high = float(values.min()), float(values.max())
    shades = np.zeros(values.shape, int)
    if high > low:
        shades = np.minimum((values - low) / (high - low) * STEPS, STEPS - 1).astype(int)
    columns = [(side, head) for side in ("keys", "values") for head in range(heads)]
    over = [element("th", side, colspan=heads, scope="colgroup", class_="side") for side in ("keys", "values")]
    names = [element("th", head, scope="col", class_="n", aria_label=f"{side}, head {head}") for side, head in columns]
    head = joined(
        (
            element("tr", element("td"), *over),
            element("tr", element("th", "layer", scope="col", class_="n"), *names),
        )
    )
    body = []
    for layers, row, shade in zip(plan.layer_groups, values, shades):
        cells = [element("td", form.format(value), class_=f"n h{step}") for value, step in zip(row, shade)]
        body.append(element("tr", element("th", ", ".join(map(str, layers)), scope="row", class_="n"), *cells))
    made = element(
        "table",
        element("caption", caption, _scale(form.format(low), form.format(high))),
        element("thead", head),
        element("tbody", *body),
        class_="sortable map",
    )
    return scrolling(made, caption)


def _scale(low: str, high: str) -> Markup:
    """What the shades of a map mean."""
    steps = joined(element("i", class_=f"h{step}") for step in range(STEPS))
    return element("span", element("span", low), steps, element("span", high), class_="scale", aria_hidden="true")

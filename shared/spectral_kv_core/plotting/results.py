"""Result files as pictures need them: records of `spectralkv eval` and `bench`, or a profile."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..evaluation.records import GROUP, MEANS, PLACES, VARIANT
from ..files.container import format_name
from ..files.paths import model_name
from ..hosts.demo_model import DEMO_DIR
from ..planning.methods import METHODS
from ..profile.profile import FORMAT, Profile

RATIOS = {  # key of a bench record: what it is a ratio to; ratio_to_dense is to the fastest of the plain ones
    "ratio_to_host": "plain, as the host calls it",
    "ratio_to_gqa": "plain, kernel with enable_gqa",
    "ratio_to_grouped": "plain, kernel with grouped rows",
    "ratio_to_host_quantized": "host's quantized cache",
}
PER_TASK = ("drift", "needle")  # tasks with a picture of their own


class Skip(Exception):
    """Why a picture cannot be drawn from a result."""


@dataclass(frozen=True)
class Result:
    """A result file: the object in it, what its pictures are named after, and where it lies if it was read from there."""

    stem: str
    content: dict | Profile
    bits: float | None = None
    path: Path | None = None

    @property
    def kind(self) -> str:
        if isinstance(self.content, Profile):
            return "profile"
        return "bench" if any("ratio_to_dense" in record for record in self.content["rows"]) else "eval"

    @property
    def profile(self) -> Profile:
        """The content of the kind `profile`."""
        assert isinstance(self.content, Profile)
        return self.content

    @property
    def fields(self) -> dict:
        """The content of the other kinds."""
        assert isinstance(self.content, dict)
        return self.content

    def records(self, field: str, task: str | None = None) -> list[dict]:
        """Records that have `field`, of `task` or of all without a picture of their own; else documents, averaged.

        Raises Skip where there are none.
        """

        def wanted(record: dict) -> bool:
            mine = record.get("task") == task if task else record.get("task") not in PER_TASK
            return mine and record.get(field) is not None and record.get("method") != "identity"

        records = [record for record in self.fields["rows"] if wanted(record)]
        records = records or _averaged([record for record in self.fields.get("documents", []) if wanted(record)], field)
        if not records:
            raise Skip(f"no record{f' of the task {task}' if task else ''} has the field {field}")
        return records

    @property
    def title(self) -> str:
        if self.kind == "profile":
            return _model(self.profile.model)
        content = self.fields
        if self.kind == "bench":
            machine = content["machine"]
            name = f"a layer of {content['synthetic']}" if "synthetic" in content else _model(content["model"])
            device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
            threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
            return f"{name}, {content['backend']}, {content['bits']:g} bits, {device}, {threads}"
        parts = (content.get(key) for key in ("backend", "dtype"))
        return ", ".join([_model(content.get("model", "")), *(str(part) for part in parts if part)])


def read_results(paths: Iterable[str], bits: float | None = None) -> list[Result]:
    """Results in files and folders (all their .json files); raises for anything that is no result or profile."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if not files:
                raise UsageError(f"Expected result JSON in a folder, found no .json file in {path}.")
        elif path.is_file():
            files = [path]
        else:
            raise FileNotFoundError(f"Expected a result JSON, a profile or a folder, found nothing at {path}.")
        found += [_read(file, bits) for file in files]
    names = [result.stem for result in found]
    for name in {name for name in names if names.count(name) > 1}:
        raise UsageError(f"Expected results with different names, received {name} more than once: plot them apart.")
    return found


def by_place(records: list[dict]) -> dict[str, list[dict]]:
    """Records by panel title: text, task and prefix."""

    def place(record: dict) -> str:
        parts = [str(record[key]) for key in ("text", "task") if record.get(key) and record[key] not in PER_TASK]
        return ", ".join([*parts, *([f"{record['prefix']:,} tokens"] if record.get("prefix") else [])]) or "all records"

    order = list(dict.fromkeys(map(place, records)))
    ordered = sorted(records, key=lambda record: order.index(place(record)))
    return {name: list(members) for name, members in groupby(ordered, place)}


def variant(record: dict) -> tuple:
    """What a record measures: method, bits, the share of tokens kept (None for all), whose scores round, tiers, wavelet."""
    return tuple(record.get(name) for name in VARIANT)


def variants(records: list[dict]) -> list[tuple]:
    """Every `variant` of `records` once, in the order of the method table, most bits first."""
    order = list(METHODS)

    def place(one: tuple) -> tuple:
        method, bits, keep, scorer, tiers, wavelet = one
        return (
            order.index(method) if method in order else len(order),
            method,
            -bits,
            -(keep or 1),
            scorer or "",
            tiers or "",
            wavelet or "",
        )

    return sorted(dict.fromkeys(map(variant, records)), key=place)


def budget_name(one: tuple, bits: bool = True) -> str:
    """The bits, tiers and share of the tokens kept of a `variant`, as far as its method has them."""
    method, stored, keep, _, tiers, _ = one
    exact = keep is not None and "+" not in method  # what is kept is kept as it is
    parts = [f"{stored:g} bit{'s' if stored != 1 else ''}"] if bits and not (exact or tiers) else []
    parts += [f"keeps {100 * keep:.3g}%"] if keep is not None else []
    return ", ".join([*parts, *([f"tiers {tiers}"] if tiers else [])])


def variant_name(one: tuple, budget: str | None = None) -> str:
    """What a line of a picture is called; `budget` instead of `budget_name`, empty for none."""
    budget = budget_name(one) if budget is None else budget
    parts = (one[0], budget, f"rounded by {one[3]}" if one[3] else "", one[5] or "")
    return ", ".join(part for part in parts if part)


def curve_names(records: list[dict]) -> dict[tuple, str]:
    """Name of the curve of every `variant` of `records`, over its bits or, at one number of bits, over the tokens kept."""
    found = variants(records)
    several = {m for m, *_ in found if len({bits for method, bits, *_ in found if method == m}) > 1}
    tiered = {one for one in found if one[4]}
    return {
        one: variant_name(one, budget_name(one, bits=False) if one[0] in several or one in tiered else "")
        for one in found
    }


def _model(name: str) -> str:
    """What a title calls a model: no path, and the demo model by its name."""
    return DEMO_DIR.name if name == "demo" else model_name(str(name))


def _read(path: Path, bits: float | None) -> Result:
    if path.suffix == ".safetensors" or format_name(path) == FORMAT.name:
        return Result(path.stem, Profile.load(path), bits, path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = content["rows"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        records = None
    if not (isinstance(records, list) and records and all(isinstance(record, dict) for record in records)):
        raise UsageError(
            f"Expected a JSON object with rows, as spectralkv eval and bench write it, or a profile, {path} is neither."
        )
    _check_fields(content, path)
    stem = path.resolve().parent.name if path.name == "summary.json" else path.stem
    return Result(stem, content, bits, path)


def _check_fields(content: dict, path: Path) -> None:
    """Raise ValueError where pictures and tables would trip over a field of the wrong kind, or of none."""
    documents = content.get("documents", [])
    if not isinstance(documents, list) or not all(isinstance(record, dict) for record in documents):
        raise UsageError(f"Expected documents to be a list of objects, {path} has something else.")
    for record in [*content["rows"], *documents]:
        for name, (kind, noun, needed) in _FIELDS.items():
            value = record.get(name)
            if (
                (needed and value is None)
                or not isinstance(value, (*kind, type(None)))
                or isinstance(value, bool)
                or _huge(value)
            ):
                raise UsageError(f"Expected {noun} as {name} of every record, {path} has {value!r}.")
        if not all(isinstance(x, (int, float)) for x in record.get("aop_layers") or ()):
            raise UsageError(f"Expected numbers as aop_layers of every record, {path} has something else.")
    if any("ratio_to_dense" in record for record in content["rows"]):
        _check_bench(content, path)


def _huge(value) -> bool:
    """Whether a number of JSON is an integer that no float holds."""
    return isinstance(value, int) and value.bit_length() > 1023


def _check_bench(content: dict, path: Path) -> None:
    """`_check_fields` of what only a benchmark has."""
    machine = content.get("machine")
    if not (
        isinstance(machine, dict) and {"cpu", "device"} <= set(machine) and isinstance(machine.get("threads"), int)
    ):
        raise UsageError(f"Expected the machine of a benchmark with its cpu, device and threads, {path} has none.")
    if (
        not isinstance(content.get("bits"), _NUMBER)
        or "backend" not in content
        or not {"synthetic", "model"} & set(content)
    ):
        raise UsageError(f"Expected backend, bits and the model or layer of a benchmark, {path} lacks some of them.")
    if not all(isinstance(record.get("context"), int) for record in content["rows"]):
        raise UsageError(f"Expected a context in tokens in every record of a benchmark, {path} has records without.")


_NUMBER: tuple[type, ...] = (int, float)
_FIELDS: dict[
    str, tuple[tuple[type, ...], str, bool]
] = {  # name: kind, what messages call it, whether every record has it
    "method": ((str,), "a name", True),
    "bits": (_NUMBER, "a number", True),
    **dict.fromkeys(("text", "task", "rounding_scores", "tiers", "wavelet"), ((str,), "a name", False)),
    **dict.fromkeys(
        ("prefix", *PLACES, "keep", *MEANS, "kl_se", "ratio_to_dense", *RATIOS), (_NUMBER, "a number", False)
    ),
    "aop_layers": ((list,), "a list", False),
}


def _averaged(records: list[dict], field: str) -> list[dict]:
    """Records of documents as one per place, variant, turn and depth, with the mean of the numbers that are drawn."""
    keys = (*GROUP, *PLACES)
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    numbers = {field, "kl", "aop", "found", "sealed_bits", "bits_per_element", "budget_tokens"} - set(keys)
    made = []
    for key, members in groups.items():
        record = dict(zip(keys, key))
        for name in numbers:
            values = [member[name] for member in members if member.get(name) is not None]
            if values:
                record[name] = np.mean(values, axis=0).tolist()
        made.append(record)
    return made

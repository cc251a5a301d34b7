"""Records of an evaluation: a file that survives being cut off, and their summary."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..files.replacing import raise_if_full

#: What tells one measurement from another: a record that agrees in all of these is not run again.
KEY = (
    "method", "bits", "keep", "rounding_scores", "tiers", "wavelet", "task", "text", "text_digest", "document",
    "document_digest", "prefix", "scored", "step", "prefill_chunk", "window", "sinks", "metrics", "greedy",
    "turn", "depth", "model", "weights", "dtype", "backend", "plan", "library_version",
)  # fmt: skip
VARIANT = ("method", "bits", "keep", "rounding_scores", "tiers", "wavelet")  # what tells caches apart
GROUP = (*VARIANT, "task", "text", "prefix")
PLACES = ("turn", "depth")  # what tells records of a group apart in the tasks that have it
MEANS = (
    "kl", "kl_p95", "kl_fresh", "top1", "top5", "ppl", "ppl_ref", "nd_ppl", "aop", "aop_p95", "aop_layers", "key_error",
    "value_error", "spectral_fidelity", "first_divergence", "token_match", "found", "found_ref", "needle_kl", "needle_logp",
    "needle_logp_ref", "context", "budget_tokens", "cache_bytes", "exact_tokens", "dense_bytes", "compression",
    "bits_per_element", "table_bytes", "sealed_bits",
)  # fmt: skip


def record_key(record: dict) -> tuple:
    """The values of `KEY` in `record`."""
    return tuple(record.get(name) for name in KEY)


class RecordFile:
    """Finished records, one JSON object a line; every line is on the disk before `append` returns."""

    def __init__(self, path: str | os.PathLike):
        """Read what is there; a last line that was cut off is dropped. Raises UsageError for any other bad line."""
        self.path = Path(path)
        self.records: dict[tuple, dict] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record_key(record)] = record
            except (ValueError, AttributeError):
                raise UsageError(
                    f"Expected a JSON object on every line of {self.path}, line {number} is none. Move the file away or "
                    "choose another `output`."
                ) from None
        if whole < len(content):
            os.truncate(self.path, whole)

    def find(self, key: dict) -> dict | None:
        """The finished record with the values `key` of all fields of `KEY`."""
        return self.records.get(record_key(key))

    def append(self, record: dict) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kept = "The records before it are kept: the same command goes on from them."
            raise_if_full(error, self.path, len(line), kept)
            raise
        self.records[record_key(record)] = record


def summarize(records: list[dict]) -> list[dict]:
    """Means over documents: a record per cache (`VARIANT`), task, text and prefix, in `drift` per turn, in `needle` per depth.

    Numbers that not every record of a group has are left out. Of the KL, how far documents differ: `kl_se`, the standard error
    of the mean over documents, None of a single one; `kl_worst`, of the worst document. `aop_max` is over all documents.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in (*GROUP, *PLACES)), []).append(record)
    summary = []
    for key, members in groups.items():
        made = dict(zip(GROUP, key)) | {n: v for n, v in zip(PLACES, key[len(GROUP) :]) if v is not None}
        present = [name for name in MEANS if all(record.get(name) is not None for record in members)]
        made |= {name: np.mean([record[name] for record in members], axis=0).tolist() for name in present}
        if all("bytes_by_kind" in record for record in members):
            kinds = members[0]["bytes_by_kind"]
            made["bytes_by_kind"] = {k: float(np.mean([r["bytes_by_kind"][k] for r in members])) for k in kinds}
        if "kl" in present:
            kl = np.array([record["kl"] for record in members])
            made["kl_se"] = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None
            made["kl_worst"] = float(kl.max())
        if "aop" in present:
            made["aop_max"] = max(record["aop_max"] for record in members)
        made["documents"] = len(members)
        made["scored_tokens"] = sum(record["scored_tokens"] for record in members)
        made["seconds"] = sum(record["seconds"] for record in members)
        if any(record.get("low_ppl") for record in members):
            made["low_ppl"] = True
        summary.append(made)
    return summary

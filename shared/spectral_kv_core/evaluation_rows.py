"""Rows of an evaluation: a file that survives being cut off, and their summary."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

#: What tells one measurement from another: a row that agrees in all of these is not run again.
KEY = (
    "method", "bits", "task", "text", "text_digest", "document", "document_digest", "prefix", "scored", "step",
    "prefill_chunk", "window", "sinks", "model", "weights", "dtype", "backend", "plan", "library_version",
)  # fmt: skip
GROUP = ("method", "bits", "task", "text", "prefix")
MEANS = (
    "kl", "kl_p95", "top1", "top5", "ppl", "ppl_ref", "nd_ppl", "cache_bytes", "dense_bytes", "compression",
    "bits_per_element", "table_bytes", "sealed_bits",
)  # fmt: skip


def row_key(row: dict) -> tuple:
    """The values of `KEY` in `row`."""
    return tuple(row.get(name) for name in KEY)


class RowFile:
    """Finished rows, one JSON object a line; every line is on the disk before `append` returns."""

    def __init__(self, path: str | os.PathLike):
        """Read what is there; a last line that was cut off is dropped. Raises ValueError for any other bad line."""
        self.path = Path(path)
        self.rows: dict[tuple, dict] = {}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row_key(row)] = row
            except (ValueError, AttributeError):
                raise ValueError(
                    f"Expected a JSON object on every line of {self.path}, line {number} is none. Move the file away or "
                    "choose another --output."
                ) from None
        if whole < len(content):
            os.truncate(self.path, whole)

    def find(self, key: dict) -> dict | None:
        """The finished row with the values `key` of all fields of `KEY`."""
        return self.rows.get(row_key(key))

    def append(self, row: dict) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row_key(row)] = row


def summarise(rows: list[dict]) -> list[dict]:
    """One row per method, bits, task, text and prefix: means over documents, and how far documents differ.

    `kl_se`: standard error of the mean KL over documents, None of a single one; `kl_worst`: of the worst document.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    summary = []
    for key, members in groups.items():
        kl = np.array([row["kl"] for row in members])
        summary.append(
            dict(zip(GROUP, key))
            | {name: float(np.mean([row[name] for row in members])) for name in MEANS}
            | {
                "kl_se": float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None,
                "kl_worst": float(kl.max()),
                "documents": len(members),
                "scored_tokens": sum(row["scored_tokens"] for row in members),
                "seconds": sum(row["seconds"] for row in members),
            }
            | ({"low_ppl": True} if any(row.get("low_ppl") for row in members) else {})
        )
    return summary

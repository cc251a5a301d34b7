"""Where a result comes from: versions, machine, command, and what tells models, plans and texts from others of their names."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePath

from ..evaluation.run import versions
from ..native.variants import VARIANTS, processor_features
from .machine import cpu_cores, cpu_name

INSTRUCTION_SETS = {name for variant in VARIANTS for name in variant.features} | {
    "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve",
}  # fmt: skip
FOLDER = re.compile(r"(^|[=,])(?:/|~)[^=,]*/(?=[^/])")  # of an absolute path, also behind NAME= or in a list


def provenance(
    host,
    *,
    threads: int,
    weights: str = "",
    plans: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict:
    """What stands under `provenance` in a result. It names no folder of this machine.

    host: a backend's module `generation`. weights: digest of the model's; plans: hashes by method and bits; texts: digests
    by name.
    """
    found = versions(host)
    return {
        "spectralkv": found.pop("spectralkv"),
        "packages": found | {"python": sys.version.split()[0]},
        "cpu": cpu_name(),
        "instruction_sets": sorted(INSTRUCTION_SETS & processor_features()),
        "cores": cpu_cores(),
        "threads": threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "plans": dict(plans or {}),
        "weights": weights,
        "texts": dict(texts or {}),
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command as it was typed; of absolute paths the last part alone."""
    name = PurePath(arguments[0]).name
    name = "spectralkv" if name == "__main__.py" else name
    return shlex.join([name, *(FOLDER.sub(r"\1", argument) for argument in arguments[1:])])

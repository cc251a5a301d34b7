"""Writes the table of one host into docs/reference/models.md: python docs/make_models_page.py --host torch|mlx

Each host has a module tests/families/HOST_rows.py that gives the lines by `table()`, and a section between two comments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "models.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=("torch", "mlx"), required=True)
    host = parser.parse_args().host
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # models are tiny: threads that wait for each other cost more than they do
    sys.path[:0] = [str(ROOT / "tests" / "families")]
    lines = importlib.import_module(f"{host}_rows").table()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), host, lines), encoding="utf-8")


def with_table(page: str, host: str, lines: list[str]) -> str:
    """`page` with `lines` between the comments of `host`."""
    before, rest = page.split(f"<!-- {host} -->\n")
    _, after = rest.split(f"<!-- end of {host} -->\n")
    return f"{before}<!-- {host} -->\n\n" + "\n".join(lines) + f"\n\n<!-- end of {host} -->\n{after}"


if __name__ == "__main__":
    main()

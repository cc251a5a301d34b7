"""Whether version, changelog and citation agree: python tools/release_check.py [TAG]. With --wheel FILE: what it lacks.

Without a tag the changelog may have entries under Unreleased. With one, such as v1.2.3, everything names that version.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {  # folder of the repository -> folder of a wheel
    "shared/spectral_kv_core": "spectral_kv_core",
    "profiles": "spectral_kv_core/profiles",
    "spectral_kv_mlx": "spectral_kv_mlx",
    "spectral_kv_torch": "spectral_kv_torch",
}
HEADING = re.compile(r"^## \[([^]]+)\](?: - (\S+))?$", re.M)


def package_version(root: Path = ROOT) -> str:
    """`__version__` of the core, read without importing it."""
    for node in ast.parse((root / "shared" / "spectral_kv_core" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("Expected __version__ in the core's __init__.py, found none.")


def sections(changelog: str) -> list[tuple[str, str | None, str]]:
    """(version or Unreleased, date, text) of every section, newest first."""
    found = list(HEADING.finditer(changelog))
    stops = [heading.start() for heading in found[1:]] + [len(changelog)]
    return [(h[1], h[2], changelog[h.end() : stop].strip()) for h, stop in zip(found, stops)]


def citation_field(citation: str, name: str) -> str | None:
    """A field at the top level of CITATION.cff, None where it is missing."""
    found = re.search(rf"^{name}: *[\"']?([^\"'\n]+)", citation, re.M)
    return found[1] if found else None


def problems(version: str, changelog: str, citation: str, tag: str = "") -> list[str]:
    """What keeps these from being a release called `tag`; without a tag, from being on the way to one."""
    found, entries = [], sections(changelog)
    if not entries:
        return ["CHANGELOG.md: expected a section such as [Unreleased], found none"]
    if citation_field(citation, "version") != version:
        found.append(f"CITATION.cff: expected version {version}, found {citation_field(citation, 'version')}")
    if not tag:
        newest, _, text = entries[0]
        if newest != version and not (newest == "Unreleased" and text):
            found.append(f"CHANGELOG.md: expected {version} or entries under [Unreleased] on top, found {newest}")
        return found
    if tag != f"v{version}":
        found.append(f"tag: expected v{version}, received {tag}")
    if entries[0][0] == "Unreleased":
        _, _, text = entries.pop(0)
        if text:
            found.append(f"CHANGELOG.md: expected nothing under [Unreleased], move its entries to [{version}]")
    newest, day, text = entries[0] if entries else ("no version", None, "")
    if newest != version or not text:
        found.append(f"CHANGELOG.md: expected entries under [{version}] on top, found {newest}")
    if not _is_date(day):
        found.append(f"CHANGELOG.md: expected a date such as 2026-12-31 behind [{newest}], found {day}")
    elif citation_field(citation, "date-released") != day:
        released = citation_field(citation, "date-released")
        found.append(f"CITATION.cff: expected date-released {day}, found {released}")
    return found


def _is_date(day: str | None) -> bool:
    try:
        return bool(day) and date.fromisoformat(day).isoformat() == day
    except ValueError:
        return False


def missing(wheel: Path, root: Path = ROOT) -> list[str]:
    """Files of the packages that `wheel`, built from the source archive, does not have."""
    inside, found = set(zipfile.ZipFile(wheel).namelist()), []
    for folder, package in PACKAGES.items():
        files = (path for path in sorted((root / folder).rglob("*")) if path.suffix not in (".pyc", ".so"))
        names = (path.relative_to(root / folder).as_posix() for path in files if path.is_file())
        found += [f"{folder}/{name}" for name in names if f"{package}/{name}" not in inside]
    return found


def main(tag: str = "", wheel: str = "") -> int:
    if tag == "--wheel":
        lacks = missing(Path(wheel))
        print("\n".join(f"{wheel} lacks {name}" for name in lacks) or f"{Path(wheel).name}: has every file")
        return 1 if lacks else 0
    texts = ((ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff"))
    found = problems(package_version(), *texts, tag)
    print("\n".join(found) or f"version {package_version()}: changelog and citation agree")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:3]))

"""Gathers the pages of the site in build/pages: docs/ as it is, results/, and what they link to: python docs/stage.py

On a code host a page links to any file of the repository. A site has only its own pages, so links that leave docs/ are
turned to copies: results/ keeps its name, everything else goes into project/.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGED = ROOT / "build" / "pages"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def main() -> int:
    shutil.rmtree(STAGED, ignore_errors=True)
    waiting = [path for folder in ("docs", "results") for path in (ROOT / folder).rglob("*.md")]
    waiting += (ROOT / "docs").rglob("*.css")
    done: set[Path] = set()
    missing = []
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        target = staged(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(path, target)
            continue
        text, linked = turned(path)
        missing += [f"{path.relative_to(ROOT)}: {link.relative_to(ROOT)}" for link in linked if not link.exists()]
        waiting += [link for link in linked if link.is_file()]
        target.write_text(text, encoding="utf-8")
    for line in missing:
        print(f"stage: nothing at the end of the link in {line}", file=sys.stderr)
    return 1 if missing else 0


def staged(path: Path) -> Path:
    """Where a file of the repository lies in the site's sources."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs":
        return STAGED.joinpath(*inside.parts[1:])
    return STAGED / inside if inside.parts[0] == "results" else STAGED / "project" / inside


def turned(path: Path) -> tuple[str, list[Path]]:
    """Text of a page with its links as the site needs them, and the files that it links to."""
    linked: list[Path] = []

    def link(match: re.Match) -> str:
        if re.match(r"[a-z]+:", match[2]):
            return match[0]
        found = (path.parent / match[2]).resolve()
        linked.append(found)
        return match[1] + os.path.relpath(staged(found), staged(path).parent) + match[3]

    text = path.read_text(encoding="utf-8")
    # a table right below a comment is no table to Python-Markdown
    text = re.sub(r"^(<!-- table .*-->)$", r"\1\n", text, flags=re.M)
    pieces, at = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(link, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*pieces, LINK.sub(link, text[at:])]), linked


if __name__ == "__main__":
    sys.exit(main())

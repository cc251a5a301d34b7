"""Where files that can be made again are kept, how small ones are written, and what files call a model."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """Cache folder: $SPECTRALKV_CACHE, else $XDG_CACHE_HOME/spectralkv, else ~/.cache/spectralkv.

    Empty variables count as unset, as does a relative XDG_CACHE_HOME. The folder is not created.
    """
    if own := os.environ.get("SPECTRALKV_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "spectralkv"


def model_name(found: str) -> str:
    """What files call a model that was `found` there: its hub id, or the last part of its folder, which nobody else has."""
    return os.path.basename(os.path.normpath(found)) if os.path.isabs(found) else found


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all: temporary name, then rename. Folders are made as needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

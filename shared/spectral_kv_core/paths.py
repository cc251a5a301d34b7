"""Where files that can be made again are kept."""

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

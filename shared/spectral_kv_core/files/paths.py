"""Where files that can be made again are kept, and what files call a model."""

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

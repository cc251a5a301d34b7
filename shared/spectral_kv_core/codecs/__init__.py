"""Codecs of the methods that the field names, one family a file; spectral, affine and stored are the core's own."""

from __future__ import annotations

from importlib import import_module

FAMILIES: dict[str, tuple[str, str]] = {}  # codec of a method -> file, class of its plan


def plan_class(codec: str):
    """The `ArrayPlan` of a method's codec, None for the core's own; imported when it is first asked for."""
    if codec not in FAMILIES:
        return None
    file, name = FAMILIES[codec]
    return getattr(import_module(f".{file}", __name__), name)

"""What `pytest --quick` runs, and with it `make test-quick`."""

from __future__ import annotations

from collections.abc import Sequence

LIBRARIES = ("xp", "host")  # parameters that say which array library or host a test runs on: it runs on each


def one_of_each(items: Sequence) -> list:
    """The first case of every test among `items` that is not marked slow, on each library that it runs on."""
    first = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            first.setdefault((item.parent.nodeid, item.originalname, *map(params.get, LIBRARIES)), item)
    return list(first.values())

"""Checks of what a file says: that its checksum is right does not make it true."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import UsageError

LARGEST = 1e18  # of numbers in a file: squares stay finite in float32
MOST = 1 << 26  # of what a header counts: tokens, layers, channels


class Wrong(ValueError):
    """What was expected of a file, in words; `checking` makes the line of it."""


@contextmanager
def checking(path: str | os.PathLike, again: str) -> Iterator[None]:
    """Raise UsageError about the file `path` where what it has is `Wrong`; `again`: how it is made."""
    try:
        yield
    except Wrong as error:
        raise UsageError(f"Expected {error}, {path} has something else. Make it again: {again}") from None


def require(right: object, what: str) -> None:
    """Raise `Wrong` with `what` was expected unless it is `right`."""
    if not right:
        raise Wrong(what)


def require_fields(fields: Any, kinds: Mapping[str, Any], where: str) -> None:
    """Raise `Wrong` unless `fields` is an object that has all of `kinds`, each of its kind."""
    require(isinstance(fields, dict), f"an object as {where}")
    for name, kind in kinds.items():
        right = isinstance(fields.get(name), kind) and not (isinstance(fields[name], bool) and kind is not bool)
        require(right, f"{name} in {where}")


def whole(value: Any, least: int = 0, most: int = MOST) -> bool:
    """Whether `value` is an integer from `least` to `most`."""
    return type(value) is int and least <= value <= most


def number(value: Any, above: float = -LARGEST, most: float = LARGEST) -> bool:
    """Whether `value` is a number above `above`, at most `most`."""
    return type(value) in (int, float) and math.isfinite(value) and above < value <= most


def require_finite(x: np.ndarray, name: str, low: float = -LARGEST, high: float = LARGEST) -> None:
    """Raise `Wrong`, with the first place, unless all numbers of `x` are finite and from `low` to `high`."""
    if x.size and not (low <= float(x.min()) and float(x.max()) <= high):  # false where one is NaN
        wide = x.astype(np.float64)  # bounds may be none that the type of `x` has
        place = tuple(int(i) for i in np.argwhere(~((wide >= low) & (wide <= high)))[0])
        what = f"numbers from {low:g} to {high:g}" if np.isfinite(wide[place]) else "finite numbers"
        raise Wrong(f"{what} in {name}, not {wide[place]:g} at {list(place)}")

"""Every array that an object holds: NumPy arrays of this project's own, and arrays of a host in its cache layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

LEAVES = (str, bytes, int, float, type(None), type)
OWN = "spectral_kv"


def numpy_buffers(*roots: Any) -> dict[int, int]:
    """Bytes of the NumPy arrays under `roots`, by the array that owns them.

    Looks into lists, tuples, dicts and objects of this project's classes.
    """
    left, seen, found = list(roots), set(), {}
    while left:
        x = left.pop()
        if isinstance(x, LEAVES) or id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, np.ndarray):
            while isinstance(x.base, np.ndarray):
                x = x.base
            found[id(x)] = x.nbytes
        elif isinstance(x, (dict, WeakKeyDictionary, WeakValueDictionary)):
            left += list(x.values())
        elif isinstance(x, (list, tuple)):
            left += x
        if type(x).__module__.startswith(OWN):
            left += getattr(x, "__dict__", {}).values()
    return found


def host_arrays(layer: Any, array: type, layers: type) -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, array) of every `array` under the attributes of a host's cache layer, whatever its kind.

    Looks into lists, tuples and dicts, and into objects of the class `layers` that a layer is made of: these are then owners.
    """
    left, seen = [(layer, name, x) for name, x in vars(layer).items()], {id(layer)}
    while left:
        owner, name, x = left.pop(0)
        if isinstance(x, LEAVES) or id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, array):
            yield owner, name, x
        elif isinstance(x, (dict, list, tuple)):
            left += [(owner, name, part) for part in (x.values() if isinstance(x, dict) else x)]
        elif isinstance(x, layers):
            left += [(x, inner, part) for inner, part in vars(x).items()]

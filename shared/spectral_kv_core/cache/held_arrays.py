"""What objects of this project hold in NumPy arrays, beside the arrays of a host."""

from __future__ import annotations

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

"""Equality of objects that hold arrays: dataclasses would ask an array whether it is true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def same(a: Any, b: Any) -> bool:
    """Whether `a` and `b` are equal, arrays to the bit; what they hold is compared one by one."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return _same_arrays(a, b)
    if type(a) is not type(b):
        return bool(a == b)
    if is_dataclass(a):
        return same_fields(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_fields(a: Any, b: Any) -> bool:
    """Whether two dataclasses of one class are equal in every field that is compared."""
    return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a) if field.compare)


def _same_arrays(a: Any, b: Any) -> bool:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

"""Counting: tokens that are sealed at a time or stay exact, and elements."""

from __future__ import annotations

import operator

from ..errors import UsageError
from ..profile.model_shape import ModelShape

SEAL = 16  # tokens are sealed in multiples of this, and of the block of their codec
WAITING = SEAL - 1  # tokens that wait, at most, until a block of `SEAL` is full
WINDOW = 64  # last tokens that a cache keeps exactly, unless told
SINKS = 4  # first tokens that a cache keeps exactly, unless told
CHUNK_TOKENS = 1024  # tokens of a full chunk: the unit that is decoded at a time


def elements_per_token(shape: ModelShape) -> int:
    """K and V elements of one token over all compressible layers."""
    return 2 * len(shape.layers) * shape.kv_heads * shape.head_dim


def whole_number(name: str, value, least: int) -> None:
    """Raise UsageError unless `value` is a number of tokens, `least` or more; NumPy's integers are, True is not."""
    try:
        right = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        right = False
    if not right:
        raise UsageError(f"Expected {name} to be a number of tokens, {least} or more, received {value!r}.")

"""Counting: tokens that are sealed at a time, elements, and the bits that a number of bytes allows."""

from __future__ import annotations

import operator

import numpy as np

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


def bits_for_bytes(
    shape: ModelShape,
    budget_bytes: int,
    context: int,
    window: int,
    sinks: int,
    element_bytes: int,
    other_bytes: int,
    allowed: tuple[float, float],
    block: int = SEAL,
) -> float:
    """Bits per sealed element that keep a cache of `context` tokens within `budget_bytes`.

    `other_bytes`: what the layers that pass through need; `allowed`: lowest and highest bits of the method; `block`:
    tokens that are sealed at a time.
    Raises UsageError with the possible range.
    """
    waiting = block - 1  # tokens, at most, until their block is full
    exact = min(context, sinks + window + waiting)
    per_token = elements_per_token(shape)
    fixed = exact * per_token * element_bytes + other_bytes
    sealed = context - exact
    if sealed <= 0:
        raise UsageError(
            f"Expected a max_context above sinks + window + {waiting} = {exact} tokens for budget_bytes, received {context}."
        )
    bits = (budget_bytes - fixed) * 8 / (sealed * per_token)
    if not bits >= allowed[0]:
        low = int(np.ceil(fixed + allowed[0] * sealed * per_token / 8))
        high = int(fixed + allowed[1] * sealed * per_token / 8)
        raise UsageError(
            f"Expected budget_bytes between {low:,} and {high:,} for {context:,} tokens with {sinks} sinks and a window "
            f"of {window}, received {budget_bytes:,}."
        )
    return min(bits, allowed[1])

"""Layers as a prompt cache file has them: arrays by their names, and what the header says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..codecs.chunk import AdaptedChunk, Chunk, CutChunk, ExactChunk
from ..errors import UsageError
from .file_checks import ADAPTATION
from .layer_cache import LayerCache


@dataclass(frozen=True, eq=False)
class ExactLayer:
    """A layer that passes through: keys and values [B, H, n, D] of the last n of `seen` slots, oldest first.

    padding: left padding [B] in slots, where the host's layer knows of some.
    """

    keys: Any
    values: Any
    seen: int
    padding: list[int] | None = None


@dataclass(frozen=True, eq=False)
class StateLayer:
    """A layer of linear attention, which passes through: states [B, ...] by name; none of a layer that holds nothing.

    host: the library that lays them out so, for hosts differ.
    """

    host: str
    states: Mapping[str, Any]


def check_states(held: StateLayer, host: str, names: Iterable[str]) -> None:
    """Raise UsageError unless the states of `held` are those of `host`, with some of the `names` that a layer has."""
    if held.host != host:
        raise UsageError(
            f"Expected a prompt cache with the states of {host}, received states of {held.host}, which lays them out "
            "otherwise. Make it again with this backend."
        )
    if not held.states.keys() <= set(names):
        raise UsageError(
            f"Expected states {', '.join(names) or 'of no layer'}, received {', '.join(held.states)}: the cache is of a model "
            "with other layers. Make it again."
        )


def in_words(layer) -> str:
    """The class of a host's layer in words: what it holds stands in its name."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", type(layer).__name__)
    words = " ".join(word if word.isupper() else word.lower() for word in words.split())
    return words if words.endswith(("cache", "layer")) else f"{words} layer"


def pack_groups(xp, name: str, store: LayerCache, arrays: dict) -> dict:
    """Put the arrays of a compressed layer into `arrays`; returns what the header says of it."""
    padding_groups, dtype = [], None
    for number, group in enumerate(store.padding_groups):
        place = f"{name}/padding_groups/{number}"
        if group.exact_keys is not None:
            arrays[f"{place}/keys"], dtype = xp.to_file(group.exact_keys)
            arrays[f"{place}/values"], _ = xp.to_file(group.exact_values)
        chunks = [_pack_chunk(xp, f"{place}/chunks/{c}", chunk, arrays) for c, chunk in enumerate(group.chunks)]
        padding_groups.append({"sequences": group.sequences, "pad": group.pad, "chunks": chunks})
    return {"dtype": dtype, "padding_groups": padding_groups}


def _pack_chunk(xp, name: str, chunk: Chunk, arrays: dict) -> list:
    """Put the arrays of a chunk into `arrays`; returns its entry in the header."""
    whole = chunk.whole if isinstance(chunk, CutChunk) else chunk
    parts: tuple = tuple(range(len(whole.arrays)))
    held, kind = whole.arrays, "plain"
    if isinstance(whole, ExactChunk):
        parts, kind = ("keys", "values"), "exact"
    elif isinstance(whole, AdaptedChunk):
        parts, kind = (*parts, *ADAPTATION), "adapted"
        held = *held, *whole.adaptation.arrays
    arrays |= {f"{name}/{part}": xp.to_file(x)[0] for part, x in zip(parts, held)}
    if whole is chunk and kind == "plain":
        return [chunk.start, chunk.tokens]
    return [chunk.start, chunk.tokens, kind, whole.tokens]


def pack_exact(xp, name: str, layer: ExactLayer, arrays: dict) -> dict:
    """`pack_groups` for a layer that passes through."""
    arrays[f"{name}/keys"], dtype = xp.to_file(layer.keys)
    arrays[f"{name}/values"], _ = xp.to_file(layer.values)
    return {"dtype": dtype, "size": list(layer.keys.shape[1:])}


def pack_states(xp, name: str, layer: StateLayer, arrays: dict) -> dict:
    """`pack_groups` for a layer of linear attention."""
    states = {}
    for state, x in layer.states.items():
        arrays[f"{name}/{state}"], dtype = xp.to_file(x)
        states[state] = [dtype, list(x.shape[1:])]
    return {"host": layer.host, "states": states}

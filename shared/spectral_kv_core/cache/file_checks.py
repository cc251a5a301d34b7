"""What a prompt cache file must say, whatever the plan: sizes, places, batches that are whole, and numbers that are finite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..arrays.transform import TIME_TRANSFORMS
from ..errors import UsageError
from ..files.checks import Wrong, number, require, require_fields, require_finite, whole
from ..planning.methods import METHODS, Method
from ..profile.basis_set import LONGEST_BLOCK
from ..profile.model_shape import ModelShape

FILE_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}  # of exact keys and values
HEADER = {
    "method": dict, "shape": dict, "bits": (int, float), "plan_hash": str, "profile": str, "model": str,
    "weights_digest": str, "sinks": int, "window": int, "seen": int, "layers": list, "metadata": dict,
    "library_version": str,
}  # fmt: skip
RECIPE = {
    "name": str, "codec": str, "rope": str, "group": str, "time": str, "block": int, "group_size": int, "quantizer": str,
    "rounding": str, "reads": (str, type(None)),
}  # fmt: skip
KINDS = ("plain", "adapted", "exact")  # of chunks
ADAPTATION = ("key_offset", "value_offset", "gain")  # arrays of adapted chunks beside their codes
STATE_NAME = re.compile(r"[a-z0-9_]+(?:/[0-9]+)?")
MOST_BATCH = 1 << 16  # sequences
EXPONENT = np.uint16(0x7F80)  # of bfloat16; all ones in NaN and infinity


def check_header(header: dict) -> None:
    """Raise `Wrong` unless `header` has the fields of a prompt cache, within what can be worked with."""
    require_fields(header, HEADER, "the header")
    require(number(header["bits"], 0, 64), "bits above 0 in the header")
    require(whole(header["sinks"]) and whole(header["window"]), "sinks and window in tokens in the header")
    require(whole(header["seen"], 1), "1 or more tokens seen in the header")


def method_of(recipe: dict) -> Method:
    """The method that a header has; raises `Wrong` for a recipe that cannot be."""
    require_fields(recipe, RECIPE, "the method")
    require(set(recipe) == set(RECIPE), "the fields of a method and no others")
    block = recipe["block"]
    require(whole(block, 1, LONGEST_BLOCK) and LONGEST_BLOCK % block == 0, "a block of tokens in the method")
    require(whole(recipe["group_size"], 1, 1 << 16), "a group_size in the method")
    require(recipe["time"] in TIME_TRANSFORMS, "a time transform in the method")
    known = METHODS.get(recipe["name"])
    summary, source = (known.summary, known.source) if known else ("a recipe of its own", "")
    try:
        return Method(**recipe, summary=summary, source=source)
    except UsageError as error:
        raise Wrong(f"a method that there is. {error} In that file") from None


def check_layers(layers: list, shape: ModelShape, method: Method, sinks: int, seen: int) -> None:
    """Raise `Wrong` unless `layers` say what every layer of the model holds, all of the same sequences."""
    require(len(layers) == shape.num_layers, f"{shape.num_layers} layers in the header")
    try:
        rows = shape.layer_groups(method.group)
    except UsageError:
        raise Wrong(f"layers that {method.name} can code together") from None
    leading, following = {row[0] for row in rows}, {i for row in rows for i in row[1:]}
    batches = []
    for layer_idx, state in enumerate(layers):
        where = f"layer {layer_idx}"
        if layer_idx in following:
            require(state == {}, f"nothing of {where}, which is coded together with an earlier one")
            continue
        if layer_idx not in leading and "states" in state:
            _check_states(state, where)
            continue
        kind = {"padding_groups": list} if layer_idx in leading else {"size": list}
        require_fields(state, {"dtype": str, **kind}, where)
        require(len(state) == 2 and state["dtype"] in FILE_DTYPES, f"a dtype among {', '.join(FILE_DTYPES)} in {where}")
        if layer_idx in leading:
            batches.append(_batch(state["padding_groups"], method.block, sinks, seen, where))
            require(batches[-1] == batches[0], "the same sequences and left padding in all layers")
        else:
            size = state["size"]
            right = len(size) == 3 and all(whole(n) for n in size) and size[1] <= seen
            require(right, f"a size of three numbers, at most the tokens seen, in {where}")


def _check_states(state: dict, where: str) -> None:
    """Raise `Wrong` unless `state` says the dtype and the size of every state."""
    require_fields(state, {"host": str, "states": dict}, where)
    require(len(state) == 2, f"a host and its states, and nothing else, in {where}")
    for name, entry in state["states"].items():
        right = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)
        right = right and entry[0] in FILE_DTYPES and all(whole(n) for n in entry[1])
        require(right and STATE_NAME.fullmatch(name), f"the dtype and the size of every state in {where}")


def _batch(padding_groups: list, block: int, sinks: int, seen: int, where: str) -> list[int]:
    """Left padding of every sequence of the batch; raises `Wrong` unless each is in one group, whose chunks fit."""
    pads: dict[int, int] = {}
    require(padding_groups, f"padding groups in {where}")
    for group in padding_groups:
        require_fields(group, {"sequences": list, "pad": int, "chunks": list}, f"a padding group of {where}")
        sequences, pad = group["sequences"], group["pad"]
        right = bool(sequences) and all(whole(s, 0, MOST_BATCH - 1) for s in sequences)
        require(right and all(a < b for a, b in pairwise(sequences)), f"sequences that ascend in {where}")
        require(not pads.keys() & sequences, f"every sequence once in {where}")
        require(whole(pad, 0, seen), f"left padding from 0 to {seen:,} in {where}")
        pads |= dict.fromkeys(sequences, pad)
        sealed = 0
        for chunk in group["chunks"]:
            start, tokens = _chunk(chunk, block, where)
            require(start == sinks + sealed, f"chunks without gaps in {where}")
            sealed += tokens
        require(not sealed or sinks + sealed <= seen - pad, f"chunks of tokens that were seen in {where}")
    require(sorted(pads) == list(range(len(pads))), f"sequences 0, 1, ... without gaps in {where}")
    return [pads[sequence] for sequence in range(len(pads))]


def chunk_fields(entry: list) -> tuple[int, int, str, int]:
    """Position, tokens, kind and coded tokens of a header's entry of a chunk, of which plain ones have the first two."""
    return (*entry, "plain", entry[1]) if len(entry) == 2 else tuple(entry)  # type: ignore[return-value]


def _chunk(entry: list, block: int, where: str) -> tuple[int, int]:
    """Position and tokens of the chunk; raises `Wrong` for an entry that no chunk has."""
    right = isinstance(entry, list) and len(entry) in (2, 4) and all(whole(n) for n in (*entry[:2], *entry[3:]))
    require(right and entry[1] > 0, f"a position and a number of tokens for every chunk in {where}")
    start, tokens, kind, coded = chunk_fields(entry)
    require(kind in KINDS, f"chunks of the kinds {', '.join(KINDS)} in {where}")
    if kind == "exact":
        require(coded == tokens, f"exact chunks that are whole in {where}")
    else:
        fits = coded % block == 0 and coded - block < tokens <= coded
        require(fits, f"chunks of whole blocks of {block} tokens, of which the last may be cut, in {where}")
    return start, tokens


def check_tokens(arrays: dict[str, np.ndarray], seen: int) -> None:
    """Raise `Wrong` unless there are as many token ids as tokens seen, where there are any."""
    ids = arrays.get("tokens", np.zeros(seen, np.int32))
    require(ids.dtype == np.int32 and ids.ndim in (1, 2) and ids.shape[-1] == seen, "tokens, an id for every one seen")


def check_numbers(arrays: dict[str, np.ndarray], layers: list[dict]) -> None:
    """Raise `Wrong`, with the array and the first place, for NaN, infinity and token ids below 0."""
    brains = set(_brain_floats(layers))
    for name, x in arrays.items():
        if name == "tokens":
            require_finite(x, "tokens", 0)
        elif name in brains and x.dtype == np.uint16:
            wrong = (x & EXPONENT) == EXPONENT
            if wrong.any():
                raise Wrong(f"finite numbers in {name}, not NaN or infinity at {np.argwhere(wrong)[0].tolist()}")
        elif x.dtype.kind == "f":
            require_finite(x, name)
            require(not name.endswith("/gain") or bool((x > 0).all()), f"gains above 0 in {name}")


def _brain_floats(layers: list[dict]) -> Iterator[str]:
    """Names of the arrays that have the bits of bfloat16."""
    for layer_idx, state in enumerate(layers):
        brains = (name for name, (dtype, _) in state.get("states", {}).items() if dtype == "bfloat16")
        yield from (f"layers/{layer_idx}/{name}" for name in brains)
        if state.get("dtype") != "bfloat16":
            continue
        places = [""]
        if "padding_groups" in state:
            groups = [(f"/padding_groups/{n}", group["chunks"]) for n, group in enumerate(state["padding_groups"])]
            exact = [f"{at}/chunks/{i}" for at, chunks in groups for i, c in enumerate(chunks) if "exact" in c]
            places = [at for at, _ in groups] + exact
        yield from (f"layers/{layer_idx}{place}/{side}" for place in places for side in ("keys", "values"))

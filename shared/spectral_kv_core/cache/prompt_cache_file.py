"""The stored prompt cache: one file from which either backend goes on; see docs/reference/prompt-cache-file.md.

A backend puts its layers in with `PromptFile.of` and takes them out, layer by layer, with `restore` and `exact`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from .. import __version__
from ..arrays.equality import same_fields
from ..codecs.chunk import Adaptation, AdaptedChunk, Chunk, CutChunk, ExactChunk
from ..codecs.entropy_coded import fit_bits
from ..codecs.registry import bits_range, make_plan
from ..codecs.transform import TransformPlan
from ..errors import UsageError
from ..files.checks import Wrong, checking
from ..files.container import FileFormat
from ..hosts.weights import are_other_weights
from ..planning.cache_plan import CachePlan
from ..planning.methods import Method
from ..planning.plan import Plan
from ..profile.file_checks import shape_of
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..profile.store import find_profile
from .file_checks import (
    ADAPTATION,
    FILE_DTYPES,
    check_header,
    check_layers,
    check_numbers,
    check_tokens,
    chunk_fields,
    method_of,
)
from .file_layers import ExactLayer, StateLayer, pack_exact, pack_groups, pack_states
from .layer_cache import LayerCache
from .size import KINDS, CacheSize

log = logging.getLogger("spectralkv")
FORMAT = FileFormat(
    "spectralkv-cache",
    2,
    "prompt cache",
    "spectralkv cache-prompt --model MODEL --prompt-file FILE",
    private=True,  # whoever has it can read the prompt
)
DEFAULT_FILE_METHOD = "spectral-stored"


@dataclass(eq=False)
class PromptFile:
    """What a stored prompt cache says about itself, and its arrays as the file has them.

    method, bits, shape: what the plan called `plan_hash` follows from, with the profile that `profile` describes.
    seen: slots, padding included. layers: per layer of the model its dtype and its padding groups, or its `size` [H, n, D]
    or its `states` where it passes through, or nothing where the plan codes it together with an earlier one: padding groups
    then hold the heads of all of these layers. metadata: what the writer wanted to add.
    """

    method: Method
    bits: float
    shape: ModelShape
    plan_hash: str
    profile: str
    model: str
    weights_digest: str
    sinks: int
    window: int
    seen: int
    layers: list[dict]
    arrays: dict[str, np.ndarray]
    metadata: dict = field(default_factory=dict)
    library_version: str = __version__
    path: str | None = field(default=None, compare=False)

    PLAIN_FIELDS = (
        "bits", "plan_hash", "profile", "model", "weights_digest", "sinks", "window", "seen", "layers", "metadata",
        "library_version",
    )  # fmt: skip

    def __eq__(self, other) -> bool:
        return same_fields(self, other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.method, self.plan_hash, self.seen))

    @classmethod
    def of(
        cls,
        xp,
        plan: Plan | CachePlan,
        layers: Sequence[LayerCache | ExactLayer | StateLayer],
        *,
        tokens: Sequence | None = None,
        model: str = "",
        weights_digest: str = "",
        metadata: dict | None = None,
    ) -> PromptFile:
        """The file of a cache with these `layers`, whose prompt has ended (`LayerCache.finalize`).

        Layers that the plan codes together have one `LayerCache`.
        tokens: ids [seen] or [B, seen] of the prompt, padding included. Raises UsageError for other `tokens` and for an
        empty cache.
        """
        first = layers[plan.shape.layers[0]]
        assert isinstance(first, LayerCache), "a layer of the plan is compressed"
        if not first.seen:
            raise UsageError("Expected a cache that has read a prompt, received an empty one.")
        if plan.method.scorer is not None:
            raise UsageError(
                f"Expected a cache that keeps every token with as many bits, {plan.method.name} does not, which cannot be "
                "stored yet. Keep the prompt itself."
            )
        arrays: dict[str, np.ndarray] = {}
        states: list[dict] = []
        followers = {i for layers in plan.layer_groups for i in layers[1:]}
        for layer_idx, layer in enumerate(layers):
            assert getattr(layer, "seen", first.seen) == first.seen, "all layers have seen the same tokens"
            if layer_idx in followers:
                states.append({})
                continue
            name = f"layers/{layer_idx}"
            if isinstance(layer, LayerCache):
                states.append(pack_groups(xp, name, layer, arrays))
            elif isinstance(layer, StateLayer):
                states.append(pack_states(xp, name, layer, arrays))
            else:
                states.append(pack_exact(xp, name, layer, arrays))
        if tokens is not None:
            ids = np.array(tokens.tolist() if hasattr(tokens, "tolist") else tokens, np.int32)
            if ids.shape not in (
                (first.seen,),
                (first.batch, first.seen),
            ):
                raise UsageError(
                    f"Expected the ids of the {first.seen:,} tokens that the cache has seen, received an array of shape "
                    f"{ids.shape}. Give what was fed, padding included, or tokens=None."
                )
            arrays["tokens"] = ids
        return cls(
            plan.method, plan.bits, plan.shape, plan.hash, _describe(plan.profile), model, weights_digest, first.sinks,
            first.window, first.seen, states, arrays, metadata or {},
        )  # fmt: skip

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file to `path` (temporary name, then rename); returns the path. Raises UsageError for NaN and infinity."""
        try:
            check_numbers(self.arrays, self.layers)
        except Wrong as error:
            raise UsageError(f"Expected {error}. Nothing was saved: check the weights and the dtype.") from None
        header = {name: getattr(self, name) for name in self.PLAIN_FIELDS}
        return FORMAT.save(path, self.arrays, header | {"method": _recipe(self.method), "shape": self.shape.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> PromptFile:
        """Read a prompt cache file; `plan` checks that its arrays fit the plan.

        Raises FileNotFoundError, or UsageError for a file that is truncated, altered, of another kind or too new, or whose
        contents cannot be.
        """
        arrays, header = FORMAT.load(path)
        with checking(path, FORMAT.making(path)):
            check_header(header)
            fields = {name: header[name] for name in cls.PLAIN_FIELDS}
            method, shape = method_of(header["method"]), shape_of(header["shape"])
            check_layers(fields["layers"], shape, method, fields["sinks"], fields["seen"])
            check_tokens(arrays, fields["seen"])
            check_numbers(arrays, fields["layers"])
        return cls(method=method, shape=shape, arrays=arrays, path=str(path), **fields)

    @property
    def tokens(self) -> list | None:
        """Token ids of the prompt: a list, of lists for a batch; None when the writer did not tell them."""
        return self.arrays["tokens"].tolist() if "tokens" in self.arrays else None

    @property
    def padding(self) -> list[int]:
        """Left padding of every sequence of the batch, in slots."""
        padding_groups = self.layers[self.shape.layers[0]]["padding_groups"]
        return [pad for _, pad in sorted((i, group["pad"]) for group in padding_groups for i in group["sequences"])]

    def check(self, shape: ModelShape, weights_digest: str = "", model: str = "") -> None:
        """Raise UsageError unless the cache is of a model of this `shape`; warn when it is of other weights.

        Where the weights are not known, warn when it is of a model of another name than `model`.
        """
        of = f" (of {self.model})" if self.model else ""
        difference = self.shape.mismatch(shape, "the file")
        if difference:
            raise UsageError(
                f"Expected a prompt cache of this model, {self._name}{of} is another's: the model has {difference}. Make one "
                f"for this model: {FORMAT.making()}"
            )
        known = self.weights_digest and weights_digest
        if not known and self.model and model and PurePath(self.model).name != PurePath(model).name:
            log.warning(
                "The prompt cache %s is of %s, the model is %s: are they the same?", self._name, self.model, model
            )
        if are_other_weights(self.weights_digest, weights_digest):
            log.warning(
                "The prompt cache %s%s was made with other weights of this architecture: what follows may make no sense. "
                "Make it with these: %s",
                self._name,
                of,
                FORMAT.making(),
            )

    def plan(self, profile: Profile | None = None) -> Plan:
        """The plan that the codes were made by, from `profile`, or from one that is found by itself.

        Raises UsageError for another profile than the cache was made with, and for arrays that do not fit the plan.
        """
        basis_set = self.method.basis_set
        profile = (profile or find_profile(self.shape, basis_set)) if basis_set else None
        if basis_set and profile is None:
            raise UsageError(
                f"Expected the profile that {self._name} was made with ({self.profile}), found none. Give that profile."
            )
        plan = make_plan(self.shape, profile, self.method, self.bits)
        if plan.hash != self.plan_hash:
            raise UsageError(
                f"Expected the profile that {self._name} was made with ({self.profile}), received another "
                f"({_describe(profile)}). Give that profile, or make the cache again: {FORMAT.making()}"
            )
        self._check_arrays(plan)
        return plan

    def restore(self, layer_idx: int, store: LayerCache, dtype, like=None) -> None:
        """Fill the empty `store` of a compressed layer, the first of its group; exact keys and values become `dtype`."""
        xp, state = store.xp, self.layers[layer_idx]
        for number, fields in enumerate(state["padding_groups"]):
            name = f"layers/{layer_idx}/padding_groups/{number}"
            group = store.open_group(list(fields["sequences"]), fields["pad"])
            if f"{name}/keys" in self.arrays:
                group.exact_keys, group.exact_values = self._exact(xp, name, state["dtype"], dtype, like)
            for place, entry in enumerate(fields["chunks"]):
                exact = state["dtype"], dtype, like
                group.chunks.append(self._chunk(xp, f"{name}/chunks/{place}", entry, len(group.sequences), exact))
        store.seen = self.seen

    def _chunk(self, xp, name: str, entry: list, batch: int, exact: tuple) -> Chunk:
        """The chunk that a header's `entry` speaks of; `exact`: what `_exact` needs for keys and values as they came."""
        start, tokens, kind, coded = chunk_fields(entry)
        if kind == "exact":
            return ExactChunk(batch, start, tokens, self._exact(xp, name, *exact))

        def held(names) -> tuple:
            return tuple(xp.from_file(x, x.dtype.name, exact[2]) for x in (self.arrays[f"{name}/{n}"] for n in names))

        codes = held(takewhile(lambda i: f"{name}/{i}" in self.arrays, count()))
        chunk = Chunk(batch, start, coded, codes)
        if kind == "adapted":
            chunk = AdaptedChunk(batch, start, coded, codes, Adaptation(*held(ADAPTATION)))
        return chunk if coded == tokens else CutChunk.of(chunk, tokens)

    def exact(self, xp, layer_idx: int, dtype, like=None) -> ExactLayer | StateLayer:
        """A layer that passes through, as `dtype`; states of another dtype than keys have stay as they are."""
        layer = self.layers[layer_idx]
        if "states" in layer:
            of_keys, states = self.layers[self.shape.layers[0]]["dtype"], {}
            for name, (stored, _) in layer["states"].items():
                x = xp.from_file(self.arrays[f"layers/{layer_idx}/{name}"], stored, like)
                states[name] = xp.astype(x, dtype) if stored == of_keys else x
            return StateLayer(layer["host"], states)
        stored = layer["dtype"]
        keys, values = self._exact(xp, f"layers/{layer_idx}", stored, dtype, like)
        return ExactLayer(keys, values, self.seen)

    def size(self) -> CacheSize:
        """Bytes of the arrays of all layers, with what they stand for."""
        tokens = sum(max(self.seen - pad, 0) for pad in self.padding)
        dense = 2 * tokens * len(self.shape.layers) * self.shape.kv_heads * sum(self.shape.side_widths)
        dense += sum(4 * len(self.padding) * int(np.prod(state["size"])) for state in self.layers if "size" in state)
        sizes = [size for state in self.layers for _, size in state.get("states", {}).values()]
        dense += sum(2 * len(self.padding) * int(np.prod(size)) for size in sizes)
        return CacheSize(self.bytes_by_kind(), self._exact_tokens(), dense, 0)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the arrays of all layers, by `KINDS`."""
        kinds = dict.fromkeys(KINDS, 0)
        for name, array in self.arrays.items():
            if name == "tokens":
                continue
            kind = "exact" if name.endswith(("/keys", "/values")) else "codes"
            if "/padding_groups/" not in name:
                kind = self._passed_kind(self.layers[int(name.split("/")[1])])
            kinds[kind] += array.nbytes
        return kinds

    def _passed_kind(self, state: dict) -> str:
        """What a layer that passes through holds: a sliding window has forgotten tokens, or is as good as exact."""
        if "states" in state:
            return "state"
        return "sliding window" if state["size"][1] < self.seen else "exact"

    def _exact_tokens(self) -> float:
        held = []
        for state in (state for state in self.layers if "padding_groups" in state):
            held.append(0)
            for group in state["padding_groups"]:
                chunks = [chunk_fields(entry) for entry in group["chunks"]]
                coded = sum(tokens for _, tokens, kind, _ in chunks if kind != "exact")
                held[-1] += (max(self.seen - group["pad"], 0) - coded) * len(group["sequences"])
        return sum(held) / len(held) if held else 0.0

    @property
    def _name(self) -> str:
        return self.path or "the one given"

    def _exact(self, xp, name: str, stored: str, dtype, like) -> tuple:
        sides = (xp.from_file(self.arrays[f"{name}/{side}"], stored, like) for side in ("keys", "values"))
        return tuple(xp.astype(x, dtype) for x in sides)

    def _check_arrays(self, plan: Plan) -> None:
        """Raise UsageError unless there are the arrays that header and plan speak of, and no others."""
        expected = dict(self._expected(plan))
        for name in sorted({*expected, *self.arrays}):
            array = self.arrays.get(name)
            found = None if array is None else (array.shape, array.dtype.name)
            if found != expected.get(name):
                raise UsageError(
                    f"Expected {expected.get(name) or 'nothing'} under {name}, {self._name} has {found or 'nothing'}. Make it "
                    "again."
                )

    def _expected(self, plan: Plan) -> Iterator[tuple[str, tuple]]:
        """Name, and (shape, dtype), of every array."""
        shape, batch = self.shape, len(self.padding)
        if "tokens" in self.arrays:
            yield "tokens", ((self.seen,) if self.arrays["tokens"].ndim == 1 else (batch, self.seen), "int32")
        for layer_idx in sorted({*range(shape.num_layers)} - {*shape.layers}):
            state, name = self.layers[layer_idx], f"layers/{layer_idx}"
            if "states" in state:
                yield from (
                    (f"{name}/{of}", ((batch, *size), FILE_DTYPES[dtype]))
                    for of, (dtype, size) in state["states"].items()
                )
                continue
            size = (batch, *state["size"]), FILE_DTYPES[state["dtype"]]
            yield from ((f"{name}/{side}", size) for side in ("keys", "values"))
        for layer_group, layers in enumerate(plan.layer_groups):
            state, name = self.layers[layers[0]], f"layers/{layers[0]}"
            heads, dtype = len(layers) * shape.kv_heads, FILE_DTYPES[state["dtype"]]
            for number, group in enumerate(state["padding_groups"]):
                batch, sealed = len(group["sequences"]), 0
                for place, entry in enumerate(group["chunks"]):
                    start, tokens, kind, coded = chunk_fields(entry)
                    if start != self.sinks + sealed:
                        raise UsageError(f"Expected chunks without gaps, {self._name} has one. Make it again.")
                    sealed += tokens
                    at = f"{name}/padding_groups/{number}/chunks/{place}"
                    if kind == "exact":
                        exact = batch, heads, tokens, shape.head_dim
                        yield from ((f"{at}/{side}", (exact, dtype)) for side in ("keys", "values"))
                        continue
                    for i, (size, of) in enumerate(plan.chunk_arrays(layer_group, batch, coded)):
                        yield f"{at}/{i}", (size or self.arrays[f"{at}/{i}"].shape, of)
                    if kind == "adapted":
                        if not isinstance(plan, TransformPlan):
                            raise UsageError(
                                f"Expected plain chunks of {plan.method.name}, {self._name} has others. Make it again."
                            )
                        offsets = (batch, heads, 1, shape.head_dim), "float32"
                        gain = (batch, *plan.stored_rank(layer_group)), "float16"
                        yield from zip((f"{at}/{part}" for part in ADAPTATION), (offsets, offsets, gain))
                if self.seen > group["pad"]:
                    exact = batch, heads, self.seen - group["pad"] - sealed, shape.head_dim
                    yield from (
                        (f"{name}/padding_groups/{number}/{side}", (exact, dtype)) for side in ("keys", "values")
                    )


def sealed_bits(stores: Sequence[LayerCache]) -> float:
    """Stored bits per key or value element of the sealed tokens, 0 where nothing is sealed."""
    stored = elements = 0
    for group in (group for store in stores for group in store.padding_groups if group.chunks):
        stored += 8 * sum(array.nbytes for chunk in group.chunks for array in chunk.held)
        elements += 2 * group.sealed * len(group.sequences) * group.exact_keys.shape[1] * group.exact_keys.shape[3]
    return stored / elements if elements else 0.0


def encode_within(encode: Callable[[Plan], Any], stores: Callable[[Any], Sequence[LayerCache]], plan: Plan):
    """The cache `encode(plan)`; of a method for files the largest whose real bits stay within those of `plan`.

    `stores` gives the compressed layers of a cache. How long entropy codes get depends on the text.
    """
    if plan.method.live:
        return encode(plan)

    def encode_at(bits: float) -> tuple[Any, float]:
        cache = encode(make_plan(plan.shape, plan.profile, plan.method, bits))
        return cache, sealed_bits(stores(cache)) or bits  # a prompt so short that nothing is sealed fits

    return fit_bits(encode_at, plan.bits, bits_range(plan.method, plan.shape))


def _recipe(method: Method) -> dict:
    """Fields of a method that a file has."""
    return {key: value for key, value in vars(method).items() if key not in ("summary", "source", "scorer")}


def _describe(profile: Profile | None) -> str:
    """What tells a profile from others, in words."""
    if profile is None:
        return "none"
    file = Path(profile.path).name if profile.path else "not saved"
    return f"{file}, of {profile.model}, {profile.calibration.get('tokens', 0):,} tokens"

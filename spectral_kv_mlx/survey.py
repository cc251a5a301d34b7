"""A trial run of a model: how every layer uses its cache, seen instead of read from its arguments.

Once per model. Some tokens go through the host's own caches, and what the model does is looked at. Some sixty more go
through caches that seal them at once without a loss, and through the host's own: the logits must be the same. The model is
afterwards as it was.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import mlx.core as mx
import numpy as np

from spectral_kv_core.codecs.exact import ExactPlan
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.profile.model_shape import ModelShape
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED, LayerSurvey, surveyed_shape, surveyed_windows

from . import places
from .arguments import argued_layers, hidden_size, max_context, model_name, q_heads, why_kept
from .cache import SpectralKVCache
from .host_cache import host_layers
from .rotation import ropes_of, rotations
from .trace import Trace

LOOKED_AT = 9  # tokens of the call that is looked at
PIECES = (33, 20, 1, 1, 9)  # tokens of the calls that are compared: all but the first attend to sealed ones
SAME = {mx.float32: 1e-3, mx.float16: 0.02, mx.bfloat16: 0.08}  # share of the logits' spread by which they may differ
RUNS = 16  # of the model, at most, for layers that are alike, to find those that differ from the host's
OWN = "attention code of its own"


@dataclass(frozen=True)
class Survey:
    """What is known of a model: of every layer, and by entry of its cache what attention asks of a compressed one.

    own: entries that are decoded for attention that a dispatcher of ours does not take the place of. unseen: those of
    them whose attention never comes to a dispatcher, so that nobody sees its queries. shared: entries that other layers
    attend to too. layer_of: the decoder layer of an entry where that has another number.
    """

    layers: tuple[LayerSurvey, ...]
    own: frozenset[int] = frozenset()
    unseen: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()
    layer_of: Mapping[int, int] = field(default_factory=dict)

    def decoder_layers(self, entries: Iterable[int]) -> set[int]:
        """The decoder layers of `entries` of the cache."""
        return {self.layer_of.get(entry, entry) for entry in entries}


_surveys: dict[tuple, Survey] = {}
_untried: dict[int, tuple[weakref.ref, Survey]] = {}  # by id, models that could not be tried


def survey(model) -> list[LayerSurvey]:
    """How every layer of `model` uses its cache: attended as codes, decoded, or passed through with a reason.

    Where only some decoder layers have an entry of the cache, in order, these are the layers. The model is tried once per
    class, arguments, sizes and attention code.
    """
    return list(known(model).layers)


def model_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """Architecture numbers of `model`, and the layers that are passed through with the reason.

    Raises UsageError for a model without attention.
    """
    layers = known(model).layers
    if not any(layer.kv_heads for layer in layers):
        raise UsageError(
            f"Expected a model with attention, received a {model_name(model)}, which has none: it keeps states of one size "
            "and no cache that grows. Use it as it is."
        )
    return surveyed_shape(hidden_size(model), layers, widens=True)


def window_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """`model_shape` with the layers that have a sliding window, and no others."""
    return surveyed_windows(hidden_size(model), known(model).layers)


def install(model) -> None:
    """`places.install`, for the layers of `model` as they were seen."""
    found = known(model)
    places.install(model, found.decoder_layers(found.own))


def known(model) -> Survey:
    """The survey of `model`, made now where no model like it was seen yet."""
    key = _key(model)
    if key in _surveys:
        return _surveys[key]
    of, found = _untried.get(id(model), (None, None))
    if of is not None and of() is model:
        return found
    try:
        _surveys[key] = _Trial(model).result()
    except Exception as error:  # whatever a model raises that needs other inputs than tokens
        reason = (first_line(error) or type(error).__name__).rstrip(".")
        warnings.warn(
            f"No trial run of this model was possible: {reason}. What its layers do is taken from their shapes, or from its "
            "arguments.",
            stacklevel=2,
        )
        found = _uncompared(model)
        number = id(model)
        _untried[number] = weakref.ref(model, lambda _: _untried.pop(number, None)), found
        return found
    return _surveys[key]


def sketched_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """`model_shape` of a model without weights, of which nothing is computed."""
    return surveyed_shape(hidden_size(model), _uncompared(model).layers, widens=True)


def _uncompared(model) -> Survey:
    """What is told of `model` without computing anything; by its arguments alone where it asks for other inputs."""
    try:
        return _Trial(model, computes=False).sketch()
    except Exception:  # whatever a model raises that needs other inputs than tokens
        layers = argued_layers(model)
        own = frozenset(i for i, layer in enumerate(layers) if layer.reason == OWN)
        return Survey(tuple(layers), own, own)


def _key(model) -> tuple:
    """What a survey depends on: weights are no part of it."""
    parts = hash(tuple(_told(part) for layer in model.layers for part in places.parts_of(layer)))
    modules, caches = frozenset(places.attention_modules(model)), tuple(map(type, host_layers(model)))
    return type(model), repr(getattr(model, "args", None)), parts, modules, caches


def _told(part) -> tuple:
    """The code of a part of a model, its numbers and functions, and the sizes of its arrays."""
    call = type(part).__call__
    held = [(name, getattr(x, "__code__", x)) for name, x in vars(part).items()]
    simple = (int, float, str, type(_told.__code__))
    told = frozenset(item for item in held if isinstance(item[1], simple))
    sizes = tuple((name, x.shape, x.dtype.size) for name, x in part.items() if isinstance(x, mx.array))
    return type(part), getattr(getattr(call, "host", call), "__code__", None), told, sizes


class _Trial:
    """One model while it is tried."""

    def __init__(self, model, computes: bool = True):
        """computes: the model has weights; else MLX tells shapes alone, as long as nobody asks for a number."""
        self.model, self.caches = model, host_layers(model)
        self.trace = Trace()
        with self.trace.watching(model, self.caches):
            logits = model(mx.array([list(range(3, 3 + LOOKED_AT))]), cache=self.caches)
            if computes:
                mx.eval(logits)
        self.vocabulary = logits.shape[-1]
        self.tolerance = SAME.get(logits.dtype, SAME[mx.bfloat16])
        seen = {entry: updates[0].layer for entry, updates in self.trace.updates.items()}
        self.layer_of = {entry: layer for entry, layer in seen.items() if layer not in (None, entry)}
        self.ropes = self._ropes() if computes else self._read_ropes("its rotation was not seen")
        self.own: set[int] = set()  # entries
        self.unseen: set[int] = set()

    def sketch(self) -> Survey:
        """What shapes and calls alone tell of every layer."""
        return self._survey([self._seen(entry) for entry in range(len(self.caches))])

    def _survey(self, layers: list[LayerSurvey]) -> Survey:
        """The survey of which `layers` are the entries of the cache."""
        shared = frozenset(entry for entry in range(len(self.caches)) if self._is_shared(entry))
        known = (*layers, *self._others(len(layers)))
        return Survey(known, frozenset(self.own), frozenset(self.unseen), shared, self.layer_of)

    def _others(self, known: int) -> list[LayerSurvey]:
        """The layers behind the `known` ones, which have no cache; none where entries have numbers of their own."""
        return [] if self.layer_of else [self._without_cache(i) for i in range(known, len(self.model.layers))]

    def result(self) -> Survey:
        """The survey."""
        layers = [self._seen(entry) for entry in range(len(self.caches))]
        shape, passed = surveyed_shape(0, layers, widens=True)
        layers = [replace(x, way=PASSED, reason=passed[i]) if i in passed else x for i, x in enumerate(layers)]
        self.shape = shape
        if shape.layers:
            self._try(layers)
        return self._survey(layers)

    def _ropes(self) -> list:
        """How the keys of every entry are rotated, and what changes at large positions."""
        layers = [self.model.layers[self._decoder_layer(entry)] for entry in range(len(self.caches))]
        try:
            return rotations(self.model, layers, max_context(self.model))
        except Exception:  # whatever a model's code makes of a cache that stands at a position without tokens before
            return self._read_ropes("its rotation was not seen")

    def _read_ropes(self, limit: str) -> list:
        """How the modules of every entry's layer rotate keys; `limit`: what is not known of it."""
        found: list = [(None, "")] * len(self.caches)
        for entry, updates in self.trace.updates.items():
            ropes = ropes_of(self.model.layers[self._decoder_layer(entry)], updates[0].keys.shape[-1])
            found[entry] = (ropes[0] if ropes else None), limit
        return found

    def _decoder_layer(self, entry: int) -> int:
        return self.layer_of.get(entry, entry)

    def _seen(self, entry: int) -> LayerSurvey:
        """What the trace tells of an entry of the cache."""
        updates = self.trace.updates.get(entry, [])
        calls = [call for call in self.trace.attended if call.source == entry]
        sizes = {}
        if updates:
            keys, values = updates[0].keys, updates[0].values
            mine = [call for call in self.trace.attended if call.layer == updates[0].layer]
            heads = (calls or mine)[0].q_heads if calls or mine else q_heads(self.model)
            heads = heads if heads and not heads % keys.shape[1] else keys.shape[1]
            sizes = {
                "q_heads": heads,
                "kv_heads": keys.shape[1],
                "key_dim": keys.shape[3],
                "value_dim": values.shape[3],
            }
            sizes["rope"], sizes["limit"] = self.ropes[entry]
        if reason := why_kept(self.caches[entry]) or _odd(updates):
            return LayerSurvey(PASSED, reason, **sizes)
        if not any(call.routable for call in calls):
            self.own.add(entry)
            self.unseen.add(entry)
            is_latent = sizes["key_dim"] != sizes["value_dim"]
            return LayerSurvey(DECODED, "latent attention" if is_latent else OWN, **sizes)
        return LayerSurvey(CODES, "", **sizes)

    def _without_cache(self, layer: int) -> LayerSurvey:
        """What is known of a decoder layer that the cache has no entry for."""
        sources = {call.source for call in self.trace.attended if call.layer == layer and call.source is not None}
        sources |= {entry for entry, readers in self.trace.reads.items() if layer in readers}
        if sources:
            return LayerSurvey(PASSED, f"the keys and values of layer {self._decoder_layer(min(sources))}")
        return LayerSurvey(PASSED, "no cache")

    def _try(self, layers: list[LayerSurvey]) -> None:
        """Compare compressed caches with the host's own; write into `layers` and `own` what comes of it."""
        self.expected = self._logits(host_layers(self.model))
        if not np.isfinite(self.expected).all():
            raise UsageError("its logits are not finite")
        if self._is_same(self.shape.layers, layers):
            return
        kinds: dict[tuple, list[int]] = {}
        for entry in self.shape.layers:
            parts = places.parts_of(self.model.layers[self._decoder_layer(entry)])
            kinds.setdefault((layers[entry].way, *map(type, parts)), []).append(entry)
        for entries in kinds.values():
            wrong = self._wrong(entries, layers)
            if wrong and layers[wrong[0]].way == CODES:
                self.own.update(wrong)
                for entry in wrong:
                    reason = "keys that other layers attend to" if self._is_shared(entry) else OWN
                    layers[entry] = replace(layers[entry], way=DECODED, reason=reason)
                wrong = self._wrong(wrong, layers)
            self.own.difference_update(wrong)
            for entry in wrong:
                layers[entry] = replace(layers[entry], way=PASSED, reason="attention that a compressed cache changes")

    def _wrong(self, entries: list[int], layers: list[LayerSurvey], runs: int = RUNS) -> list[int]:
        """Those of `entries`, which are alike, that change the logits; all of them where it takes too many runs to tell."""
        if self._is_same(entries, layers):
            return []
        if len(entries) == 1 or runs < 2:
            return entries
        half = len(entries) // 2
        return [x for part in (entries[:half], entries[half:]) for x in self._wrong(part, layers, runs // 2)]

    def _is_shared(self, entry: int) -> bool:
        """Whether other layers attend to what the layer of `entry` keeps."""
        mine = self._decoder_layer(entry)
        others = {call.layer for call in self.trace.attended if call.source == entry} | self.trace.reads.get(
            entry, set()
        )
        return bool(others - {mine})

    def _is_same(self, entries: Iterable[int], layers: list[LayerSurvey]) -> bool:
        """Whether logits are the host's with these entries compressed; notes which of them the dispatcher has decoded."""
        cache = host_layers(self.model)
        plan = ExactPlan.of(replace(self.shape, layers=tuple(entries)))
        for number, entry in enumerate(plan.shape.layers):
            cache[entry] = SpectralKVCache(plan, number, 0, 0)
        try:
            with places.routed(self.model, {self._decoder_layer(entry) for entry in self.own}):
                found = self._logits(cache)
        except Exception:  # whatever a model's code makes of a cache that it does not know
            return False
        spread = self.expected.std()
        same = np.isfinite(found).all() and np.sqrt(np.square(found - self.expected).mean()) <= self.tolerance * spread
        if same:
            for entry in plan.shape.layers:
                if cache[entry].decoded and layers[entry].way == CODES:
                    layers[entry] = replace(layers[entry], way=DECODED, reason=cache[entry].decoded)
        return bool(same)

    def _logits(self, cache: list) -> np.ndarray:
        """Logits [T, vocabulary] float32 of the tokens of `PIECES`, which enter `cache`."""
        ids = np.random.default_rng(0).integers(3, min(self.vocabulary, 32000), sum(PIECES))
        edges = np.cumsum((0, *PIECES))
        parts = [self.model(mx.array(ids[None, a:b]), cache=cache)[0] for a, b in pairwise(edges)]
        return np.array(mx.concatenate(parts).astype(mx.float32))


def _odd(updates: list) -> str:
    """Why a layer that gave its cache these `updates` in one call cannot be compressed; "" where it can."""
    if not updates:
        return "no keys and values"
    if len(updates) > 1:
        return f"its cache is filled {len(updates)} times in a call"
    keys, values = updates[0].keys, updates[0].values
    if keys.ndim != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != LOOKED_AT:
        return f"keys of shape {keys.shape} and values of {values.shape}"
    return ""

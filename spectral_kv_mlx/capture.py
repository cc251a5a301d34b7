"""Capture of the true queries, keys and values of a forward pass, and of score gradients, on any decoder of the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import create_attention_mask

from spectral_kv_core.errors import UsageError

from .handles import RoutedCache, routing
from .host_cache import host_layers
from .ops import all_finite, to_numpy
from .places import dispatcher, replaced_attention, routed
from .survey import known, model_shape

scaled_dot_product_attention = dispatcher(base.scaled_dot_product_attention)


class CaptureCache(RoutedCache):
    """Keeps keys and values exactly and remembers the queries; `leaves` lets gradients reach what it keeps.

    unseen: attention never comes to a dispatcher of ours, so that the queries stay None. sliding_window: of the host's mask.
    """

    def __init__(self, unseen: bool = False, sliding_window: int | None = None):
        self.queries = self.keys = self.values = None
        self.scale = 1.0
        self.leaves = False
        self.unseen, self.sliding_window = unseen, sliding_window
        self._fetched: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.leaves:
            joined = zip((self.keys, self.values), (keys, values))
            self._fetched = tuple(mx.concatenate([old, new], axis=2) for old, new in joined)
            return self._fetched
        if self.unseen:
            self.keys, self.values = keys, values
            return keys, values
        if not self.find_route():
            raise UsageError("Expected a model whose attention is routed through ours, received another caller.")
        self.pending = keys, values
        return self.pending

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What the last call has left, for layers that attend to it too."""
        return self._fetched or (self.keys, self.values)

    def attend(self, queries, scale, fused, sinks=None):
        """Keep the queries [B, Hq, L, D], keys and values [B, H, L, D] of one forward pass and attend as usual."""
        self.scale = scale
        return self.attend_decoded(queries, lambda q, k, v: fused(q, k, v, scale))

    def attend_decoded(self, queries, attention):
        """As `attend`, by `attention(queries, keys, values)`, which has a scale of its own."""
        self.queries = queries
        return attention(queries, *self.fetch())

    def fetch(self) -> tuple[mx.array, mx.array]:
        """Keys and values, which are no longer pending."""
        (self.keys, self.values), self.pending = self.pending, None
        return self.keys, self.values

    @property
    def offset(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def size(self) -> int:
        """Tokens, the pending ones included."""
        return self.offset if self.pending is None else self.pending[0].shape[2]

    slots = size

    def empty(self) -> bool:
        return self.keys is None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        window = window_size or self.sliding_window
        return create_attention_mask(N, offset=self.offset, return_array=return_array, window_size=window)

    @property
    def state(self) -> tuple:
        return self.queries, self.keys, self.values

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.state if x is not None)


def capture(model, tokens: list[int], layers: Sequence[int] | None = None) -> list:
    """Run `tokens` through `model` and keep what its layers attend with.

    Args:
        model: A model of mlx-lm.
        tokens: Token ids of one sequence, T of them.
        layers: Indices of the layers to look into. Default: those that can be compressed.

    Returns:
        A list of the host with one entry per layer. Those of `layers` hold `queries` [1, q_heads, T, head_dim],
        `keys` and `values` [1, kv_heads, T, head_dim], all after RoPE; the others are the host's own. Queries are None
        where a model has attention code of its own.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import capture, load_model
        >>> model, tokenizer = load_model(demo_model_path())
        >>> layer = capture(model, tokenizer.encode("The sea is a place of endless wonder."))[8]
        >>> tuple(layer.queries.shape), tuple(layer.keys.shape)
        ((1, 9, 9, 64), (1, 3, 9, 64))
    """
    cache, survey = host_layers(model), known(model)
    for i in model_shape(model)[0].layers if layers is None else layers:
        cache[i] = CaptureCache(i in survey.unseen, getattr(cache[i], "max_size", None))
    with routed(model, survey.decoder_layers(survey.unseen)):
        model(mx.array([tokens]), cache=cache)
    mx.eval([c.state for c in cache])  # the logits are not asked for, so they are never computed
    return cache


@dataclass(frozen=True)
class Attended:
    """One call of a layer's attention: post-RoPE `queries` [1, Hq, L, D], `keys`, `values` [1, H, L, D] of its L new tokens.

    outputs: [Hq, L, D] float32, before the output projection. mask, scale, sinks: the rest of the call.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    outputs: np.ndarray
    mask: mx.array | str | None
    scale: float
    sinks: mx.array | None = None


@contextmanager
def recorded(model, cache: list, layers: Sequence[int]) -> Iterator[dict[int, list[Attended]]]:
    """By layer, what the attention of `layers` is given and gives back while `model` runs with the plain `cache`."""
    calls = {i: [] for i in layers}
    indices = {id(cache[i]): i for i in layers}

    def around(attention):
        def recording(queries, keys, values, cache, scale, mask, sinks=None):
            out = attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
            if id(cache) in indices:
                new = [mx.contiguous(x[:, :, -queries.shape[2] :]) for x in (keys, values)]
                mx.eval(
                    queries, *new, out
                )  # else they keep the whole cache alive, which is then copied to be written to
                calls[indices[id(cache)]].append(Attended(queries, *new, to_numpy(out[0]), mask, scale, sinks))
            return out

        return recording

    with routed(model), replaced_attention(model, around):  # a plain cache needs no other way
        yield calls


def attend(cache: list, layer_idx: int, call: Attended) -> np.ndarray:
    """What layer `layer_idx` of `cache`, plain or compressed, gives for `call` [Hq, L, D]; its tokens enter the cache."""
    layer = cache[layer_idx]
    with routing():
        keys, values = layer.update_and_fetch(call.keys, call.values)
        out = scaled_dot_product_attention(call.queries, keys, values, layer, call.scale, call.mask, call.sinks)
    mx.eval(out, layer.arrays() if isinstance(layer, RoutedCache) else (layer.keys, layer.values))
    return to_numpy(out[0])


def captured(cache: list, layer_idx: int) -> CaptureCache:
    """Layer `layer_idx` of what `capture` gives."""
    return cache[layer_idx]


def score_gradients(model, cache: list, tokens: list[int], samples: int, seed: int) -> list[dict]:
    """Gradients of log p(label) with respect to what `cache` holds, for labels drawn from the model itself.

    `tokens` follow the captured ones; one dict per sample of layer index -> (key, value) gradients [H, T, D]. Their
    second moment is the Fisher information of the cached vectors.
    """
    log_p = log_probabilities(model, cache, tokens)
    if not all_finite(log_p):
        raise UsageError("Expected finite logits, received NaN or infinity: check the weights and the dtype.")
    draws = [mx.random.categorical(log_p, key=k) for k in mx.random.split(mx.random.key(seed), samples)]
    return [label_gradients(model, cache, tokens, labels) for labels in draws]


def label_gradients(model, cache: list, tokens: list[int], labels: mx.array) -> dict:
    """Gradients of sum log p(`labels` [len(tokens)]) by layer index: (key, value) gradients [H, T, D]."""
    layers = [i for i, c in enumerate(cache) if isinstance(c, CaptureCache)]
    leaves = [(cache[i].keys, cache[i].values) for i in layers]

    def total(leaves):
        held = list(cache)
        for i, (keys, values) in zip(layers, leaves):
            held[i] = CaptureCache()
            held[i].keys, held[i].values = keys, values
        return mx.take_along_axis(
            log_probabilities(model, held, tokens), labels[:, None].astype(mx.int32), axis=-1
        ).sum()

    gradients = mx.grad(total)(leaves)
    mx.eval(gradients)
    return {i: (keys[0], values[0]) for i, (keys, values) in zip(layers, gradients)}


def probed_log_probabilities(
    model, cache: list, tokens: list[int], changed: dict[int, tuple], outputs: dict[int, object]
) -> mx.array:
    """As `log_probabilities`, with other keys and values in some layers.

    changed: by layer index the keys and values [1, H, T, D], NumPy, that take the place of the captured ones; outputs: of
    decoder layers without a change, left here by a call without, so that others need not run what lies below one.
    """
    held = list(cache)
    for i, sides in changed.items():
        held[i] = copy.copy(cache[i])
        held[i].keys, held[i].values = (mx.array(x, cache[i].keys.dtype) for x in sides)
    with _replayed(model, changed, outputs):
        log_p = log_probabilities(model, held, tokens)
        mx.eval(log_p, list(outputs.values()))
    return log_p


def log_probabilities(model, cache: list, tokens: list[int]) -> mx.array:
    """Log probabilities [len(tokens), vocabulary] float32 after what a captured `cache` holds, which stays as it is."""
    layers = [copy.copy(c) if isinstance(c, CaptureCache) else copy.deepcopy(c) for c in cache]
    for c in layers:
        if isinstance(c, CaptureCache):
            c.leaves = True
    logits = model(mx.array([tokens]), cache=layers)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@contextmanager
def _replayed(model, changed: dict[int, tuple], outputs: dict[int, object]) -> Iterator[None]:
    """Decoder layers below the first of `changed` give what `outputs` has of them; without any, all leave theirs there."""
    layers, survey = _decoder_layers(model), known(model)
    kept, shared = list(layers), survey.decoder_layers(survey.shared)  # of which others need more than the output

    def noted(i):
        def run(*args, **options):
            outputs[i] = kept[i](*args, **options)
            return outputs[i]

        return run

    for i, layer in enumerate(kept):
        if not changed:
            layers[i] = _Layer(layer, noted(i))
        elif i < min(changed) and i in outputs and i not in shared:
            layers[i] = _Layer(layer, lambda *args, i=i, **options: outputs[i])
    try:
        yield
    finally:
        layers[:] = kept


class _Layer:
    """`layer` in all but what a call of it does."""

    def __init__(self, layer, run):
        self._layer, self._run = layer, run

    def __call__(self, *args, **options):
        return self._run(*args, **options)

    def __getattr__(self, name: str):
        return getattr(self._layer, name)


def _decoder_layers(model) -> list:
    """The list of decoder layers that `model` runs through: `model.layers`, of which some models give a copy."""
    named = model.layers
    lists = (held for module in model.modules() for held in module.values() if isinstance(held, list))
    return next((held for held in lists if len(held) == len(named) and held[0] is named[0]), [])

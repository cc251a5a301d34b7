"""Capture of the true queries, keys and values of a forward pass, and of score gradients, on any decoder of the host."""

from __future__ import annotations

import copy

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from .handles import RoutedCache, caller_is_routed
from .integration import host_layers, model_shape, routed
from .ops import all_finite


class CaptureCache(RoutedCache):
    """Keeps keys and values exactly and remembers the queries; `leaves` lets gradients reach what it keeps."""

    def __init__(self):
        self.queries = self.keys = self.values = None
        self.scale = 1.0
        self.leaves = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.leaves:
            return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)
        if not caller_is_routed():
            raise ValueError("Expected a model whose attention is routed through ours, received another caller.")
        self.pending = keys, values
        return self.pending

    def attend(self, queries, scale, fused):
        """Keep the queries [B, Hq, L, D], keys and values [B, H, L, D] of one forward pass and attend as usual."""
        (self.keys, self.values), self.pending = self.pending, None
        self.queries, self.scale = queries, scale
        return fused(queries, self.keys, self.values, scale)

    @property
    def offset(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.keys is None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        return create_attention_mask(N, offset=self.offset, return_array=return_array, window_size=window_size)

    @property
    def state(self) -> tuple:
        return self.queries, self.keys, self.values

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.state if x is not None)


def capture(model, tokens: list[int]) -> list:
    """Run `tokens` through `model`; the layers that can be compressed hold `queries`, `keys` and `values`, post-RoPE."""
    cache = host_layers(model)
    for i in model_shape(model)[0].layers:
        cache[i] = CaptureCache()
    with routed(model):
        model(mx.array([tokens]), cache=cache)
    mx.eval([c.state for c in cache])  # the logits are not asked for, so they are never computed
    return cache


def score_gradients(model, cache: list, tokens: list[int], samples: int, key: mx.array) -> list[dict]:
    """Gradients of log p(label) with respect to what `cache` holds, for labels drawn from the model itself.

    `tokens` follow the captured ones; one dict per sample of layer index -> (key, value) gradients [H, T, D]. Their
    second moment is the Fisher information of the cached vectors.
    """
    log_p = _log_p(model, cache, tokens)
    if not all_finite(log_p):
        raise ValueError("Expected finite logits, received NaN or infinity: check the weights and the dtype.")
    draws = [mx.random.categorical(log_p, key=k) for k in mx.random.split(key, samples)]
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
        return mx.take_along_axis(_log_p(model, held, tokens), labels[:, None].astype(mx.int32), axis=-1).sum()

    gradients = mx.grad(total)(leaves)
    mx.eval(gradients)
    return {i: (keys[0], values[0]) for i, (keys, values) in zip(layers, gradients)}


def _log_p(model, cache: list, tokens: list[int]) -> mx.array:
    """Log probabilities [len(tokens), vocabulary] float32 after what `cache` holds, which stays as it is."""
    layers = [copy.copy(c) if isinstance(c, CaptureCache) else copy.deepcopy(c) for c in cache]
    for c in layers:
        if isinstance(c, CaptureCache):
            c.leaves = True
    logits = model(mx.array([tokens]), cache=layers)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

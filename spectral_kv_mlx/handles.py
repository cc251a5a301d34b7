"""Between `update_and_fetch` and attention: tokens that a cache took in and that nobody has attended to yet.

mlx-lm's attention modules call `update_and_fetch` and then `scaled_dot_product_attention`. While one runs whose attention
goes through our dispatcher, there is a `Route`: a cache that takes tokens in gives back the new ones only and leaves a note
there, and the dispatcher finds it by that note. Any other caller gets the decoded cache. New tokens that come to another
function than the dispatcher, or to none, raise an error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from spectral_kv_core.errors import UsageError


class Route:
    """From a cache that took tokens in to the dispatcher, within one call of a `module`."""

    def __init__(self, module=None):
        self.cache: RoutedCache | None = None
        self.module = module


_route: ContextVar[Route | None] = ContextVar("spectralkv_route", default=None)
_handed_out: WeakValueDictionary[int, mx.array] = WeakValueDictionary()


@contextmanager
def routing(module=None) -> Iterator[None]:
    """What runs here, in a call of `module`, attends through a dispatcher of ours; raises UsageError where it did not."""
    outer, route = _route.get(), Route(module)
    token = _route.set(route)
    try:
        yield
    finally:
        _route.reset(token)
    if route.cache is None:
        return
    if outer is None or outer.cache is not None:
        raise UsageError(
            "Expected attention to the keys that a compressed cache gave back, but the model has attended elsewhere. "
            "Call restore(model) first: the cache is then decoded for it."
        )
    outer.cache = route.cache  # a part of the model has taken the tokens in, and what it is part of attends


class RoutedCache(_BaseCache):
    """A cache that attends for itself where our dispatcher is installed.

    decoded: why the dispatcher has last decoded the cache for the host's own attention; "" where it never had to.
    """

    pending: tuple[mx.array, mx.array] | None = None
    decoded: str = ""
    owner: Any = None

    @abstractmethod
    def attend(self, queries: mx.array, scale: float, fused: Callable, sinks: mx.array | None = None) -> mx.array:
        """Attention [B, Hq, L, D] of the pending tokens, which enter the cache; sinks: logits [Hq], known to `fused`."""

    @abstractmethod
    def fetch(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all tokens, decoded; the pending ones are the last, and enter."""

    def attend_decoded(self, queries: mx.array, attention: Callable) -> mx.array:
        """What `attention(queries, keys, values)` gives for all tokens."""
        return attention(queries, *self.fetch())

    def find_route(self) -> bool:
        """Whether our dispatcher will be called with the tokens that come in now, and will then come to this cache."""
        route = _route.get()
        if route is not None:
            route.cache = self
            if self.owner is not None and route.module is not None:
                self.owner.meet(route.module)
        return route is not None


def hand_out(keys: mx.array) -> None:
    """Remember that `keys` stand for all that a cache has, though they are those of new tokens alone."""
    _handed_out[id(keys)] = keys


def make_dispatcher(host: Callable, fused: Callable, why_decode: Callable) -> Callable:
    """Attention function in place of `host`: pending tokens of our caches are attended by them, all else by `host`.

    why_decode(mask, cache, length): why a mask asks for `host` itself, "" where `fused` has it. Arguments that are not known
    go there too, with the decoded cache.
    """

    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None, **others):
        def attend(q, k, v):
            return host(q, k, v, cache=cache, scale=scale, mask=mask, sinks=sinks, **others)

        route = _route.get()
        if route is not None and route.cache is not None:
            cache, route.cache = route.cache, None  # what a model is given may be a wrapper around ours
            _check_same(cache, keys, values)
        elif not (isinstance(cache, RoutedCache) and cache.pending is not None and cache.pending[0] is keys):
            if _handed_out.get(id(keys)) is keys:
                raise UsageError(
                    "Expected attention to the keys of a compressed cache once, received them again. Call restore(model) "
                    "first: the cache is then decoded for it."
                )
            return attend(queries, keys, values)
        reason = " and ".join(f"the argument {name}" for name, value in others.items() if value is not None)
        reason = reason or why_decode(mask, cache, queries.shape[2])
        if reason:
            cache.decoded = reason
            return cache.attend_decoded(queries, attend)
        if sinks is None:
            return cache.attend(queries, scale, fused)
        return cache.attend(queries, scale, partial(fused, sinks=sinks), sinks)

    return replacing(host, scaled_dot_product_attention)


def _check_same(cache: RoutedCache, keys: mx.array, values: mx.array) -> None:
    """Raise UsageError unless `keys` and `values` are those that `cache` gave back."""
    if cache.pending is None or cache.pending[0] is not keys or cache.pending[1] is not values:
        raise UsageError(
            "Expected the keys and values that update_and_fetch gave back, received others. Give the model caches that hand "
            "on what ours return."
        )


def replacing(host: Callable, function: Callable, users: dict | None = None) -> Callable:
    """`function`, marked as ours in the place of `host`; `users`: by id the models that it is there for."""
    function.host, function.users = host, {} if users is None else users
    return function


def is_ours(function: Callable | None) -> bool:
    """Whether `function` stands where one of the host's own was."""
    return hasattr(function, "host")

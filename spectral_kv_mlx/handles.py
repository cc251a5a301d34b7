"""Between `update_and_fetch` and attention: tokens that a cache took in and that nobody has attended to yet.

mlx-lm's attention modules call `update_and_fetch` and then `scaled_dot_product_attention`. While one runs whose attention
goes through our dispatcher, there is a `Route`: a cache that takes tokens in gives back the new ones only and leaves a note
there, and the dispatcher finds it by that note. Any other caller gets the decoded cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from spectral_kv_core.errors import UsageError


class Route:
    """From a cache that took tokens in to the dispatcher, within one call of a module."""

    def __init__(self):
        self.cache: RoutedCache | None = None


_route: ContextVar[Route | None] = ContextVar("spectralkv_route", default=None)


@contextmanager
def routing() -> Iterator[None]:
    """What runs here attends through a dispatcher of ours."""
    token = _route.set(Route())
    try:
        yield
    finally:
        _route.reset(token)


class RoutedCache(_BaseCache):
    """A cache that attends for itself where our dispatcher is installed."""

    pending: tuple[mx.array, mx.array] | None = None

    @abstractmethod
    def attend(self, queries: mx.array, scale: float, fused: Callable) -> mx.array:
        """Attention [B, Hq, L, D] of the pending tokens, which enter the cache."""

    def find_route(self) -> bool:
        """Whether our dispatcher will be called with the tokens that come in now, and will then come to this cache."""
        route = _route.get()
        if route is not None:
            route.cache = self
        return route is not None


def make_dispatcher(host: Callable, fused: Callable, check_mask: Callable) -> Callable:
    """Attention function in place of `host`: pending tokens of our caches are attended by them, all else by `host`."""

    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
        route = _route.get()
        if route is not None and route.cache is not None:
            cache, route.cache = route.cache, None  # what a model is given may be a wrapper around ours
            if cache.pending is None or cache.pending[0] is not keys:
                raise UsageError(
                    "Expected the keys that update_and_fetch gave back, received others. Give the model caches that hand on "
                    "what ours return."
                )
        elif not (isinstance(cache, RoutedCache) and cache.pending is not None and cache.pending[0] is keys):
            return host(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        if sinks is not None:
            raise UsageError(
                "Expected attention without sink logits, received some: such layers cannot be compressed. Pass them through."
            )
        check_mask(mask, cache, queries.shape[2])
        return cache.attend(queries, scale, fused)

    return replacing(host, scaled_dot_product_attention)


def replacing(host: Callable, function: Callable, users: dict | None = None) -> Callable:
    """`function`, marked as ours in the place of `host`; `users`: by id the models that it is there for."""
    function.host, function.users = host, {} if users is None else users
    return function


def is_ours(function: Callable | None) -> bool:
    """Whether `function` stands where one of the host's own was."""
    return hasattr(function, "host")

"""Between `update_and_fetch` and attention: tokens that a cache took in and that nobody has attended to yet.

mlx-lm's models call `update_and_fetch` and then, in the same function, `scaled_dot_product_attention` with the cache.
Where that name leads to our dispatcher only the new tokens go back; any other caller gets the decoded cache.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from spectral_kv_core.errors import UsageError

ATTENTION = "scaled_dot_product_attention"


class RoutedCache(_BaseCache):
    """A cache that attends for itself where our dispatcher is installed."""

    pending: tuple[mx.array, mx.array] | None = None

    @abstractmethod
    def attend(self, queries: mx.array, scale: float, fused: Callable) -> mx.array:
        """Attention [B, Hq, L, D] of the pending tokens, which enter the cache."""


def make_dispatcher(host: Callable, fused: Callable, check_mask: Callable) -> Callable:
    """Attention function in place of `host`: pending tokens of our caches are attended by them, all else by `host`."""

    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None):
        if not (isinstance(cache, RoutedCache) and cache.pending is not None and cache.pending[0] is keys):
            return host(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        if sinks is not None:
            raise UsageError(
                "Expected attention without sink logits, received some: such layers cannot be compressed. Pass them through."
            )
        check_mask(mask, cache, queries.shape[2])
        return cache.attend(queries, scale, fused)

    scaled_dot_product_attention.host = host
    return scaled_dot_product_attention


def is_dispatcher(function: Callable | None) -> bool:
    return hasattr(function, "host")


def caller_is_routed(depth: int = 2) -> bool:
    """Whether the function `depth` frames up will find our dispatcher under mlx-lm's name for attention."""
    return is_dispatcher(sys._getframe(depth).f_globals.get(ATTENTION))

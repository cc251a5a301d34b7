"""Attention masks: which ones compressed caches attend by, and which ones the host's own attention must have."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from weakref import WeakValueDictionary

import mlx.core as mx
from mlx_lm.models.cache import create_causal_mask

from spectral_kv_core.errors import UsageError

HIDDEN = -1e4  # what a mask that is added has at most where nothing may be seen

_causal: WeakValueDictionary[int, mx.array] = WeakValueDictionary()


def made_causal(mask):
    """`mask`, which a cache of ours has just made and which is causal."""
    if isinstance(mask, mx.array):
        _causal[id(mask)] = mask
    return mask


class MaskCheck:
    """Tells causal masks from others; looks at each once, as all layers of a forward pass share it."""

    def __init__(self):
        self._last: Callable = lambda: None
        self._found = ""

    def __call__(self, mask, cache, length: int) -> str:
        """Why `mask` is none that `cache` attends by, for its last `length` tokens; "" for a causal one.

        Causal is one with the left padding of `cache` too. Raises UsageError for one without a column for every token, and
        for another than a causal one where `cache` has dropped tokens.
        """
        if mask is None or isinstance(mask, str):
            return "" if length == 1 or mask == "causal" else "attention in both directions"
        if mask is self._last():
            return self._found
        if mask.shape[-1] not in (cache.size(), cache.slots()):
            raise UsageError(
                f"Expected a mask for {cache.size()} tokens, received one for {mask.shape[-1]}. Call restore(model) first: "
                "the cache is then decoded for it."
            )
        causal = _causal.get(id(mask)) is mask or _is_causal(mask, cache, length)
        if not causal and cache.slots() < cache.size():
            raise UsageError(
                "Expected a causal mask with padding on the left only for a cache that has dropped tokens, received "
                "another mask. Pad on the left and give left_padding to make_prompt_cache."
            )
        self._last, self._found = weakref.ref(mask), "" if causal else "a mask that is not causal"
        return self._found


def _is_causal(mask: mx.array, cache, length: int) -> bool:
    padding = getattr(cache, "left_padding", None)
    seen = cache.size() - length
    expected = create_causal_mask(length, seen, left_padding=mx.array(padding) if padding is not None else None)
    expected = expected[..., -mask.shape[-1] :]
    if mask.dtype != mx.bool_:
        visible, hidden = mask == 0, mask <= HIDDEN
        if not mx.array_equal(*mx.broadcast_arrays(~visible, hidden)).item():
            return False
        mask = visible
    return bool(mx.array_equal(*mx.broadcast_arrays(mask, expected)).item())

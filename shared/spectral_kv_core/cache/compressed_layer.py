"""The compressed layers of a model's cache, as far as they are the same in every host."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..arrays.widths import widened
from ..errors import UsageError
from ..planning.cache_plan import CachePlan, cache_plan
from ..planning.plan import Plan
from .eviction import Eviction
from .key_means import KeyMeans
from .layer_cache import LayerCache
from .owner import Owner


class CompressedLayer:
    """A layer group: one layer, or the first of several that are coded together, whose tokens it keeps.

    A host's own cache layer inherits it, and gives `xp`. `taken`: by layer of the group, keys and values [B, H, L, D] that
    came in and that nobody has attended to yet. `store`: None until the device is known. `owner`, `context`: what the first
    of all knows of its model, see `belong_to`.
    """

    xp: Any = None
    store: Any  # LayerCache | None
    taken: dict[int, Any]
    owner: Owner | None = None
    context: int | None = None

    def __init__(
        self,
        plan: Plan | CachePlan,
        layer_group: int,
        sinks: int,
        window: int,
        eviction: Eviction | None = None,
        working_set: int = 0,
    ):
        super().__init__()
        self.plan, self.layer_group, self.sinks, self.window = cache_plan(plan), layer_group, sinks, window
        self.eviction, self.working_set = eviction, working_set
        self.store, self.taken = None, {}

    def __deepcopy__(self, memo):
        """An independent layer that shares the plan and the arrays: a prefix can be read once and copied."""
        self.commit()
        new = copy.copy(self)
        new.taken = {}
        new.store = copy.deepcopy(self.store, memo)
        new.eviction = copy.deepcopy(self.eviction, memo)
        return new

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers of the group."""
        return self.plan.layer_groups[self.layer_group]

    @property
    def kv_heads(self) -> int:
        """KV heads of all of these layers."""
        return self.plan.shape.kv_heads * len(self.layers)

    @property
    def waiting(self) -> int:
        """Slots of the tokens that wait to enter."""
        return next((keys.shape[2] for keys, _ in self.taken.values()), 0)

    def open(self, device=None) -> LayerCache:
        """Put the codec's tables on `device`; returns the store, empty."""
        staging, at_more_bits = None, self.plan.staging if self.eviction is None else None
        if at_more_bits is not None:
            staging = partial(at_more_bits.make_codec, self.xp, self.layer_group, device)  # without `self`: no circle
        codec = self.plan.codecs(self.xp, device)[self.layer_group]  # last: the plan may go with it
        means = KeyMeans(self.plan) if self.plan.method.suffers_from_key_means else None
        made = self.sinks, self.window, staging, self.eviction, self.layer_group, self.working_set, means
        self.store = LayerCache(self.xp, codec, *made)
        self.store.context = self.context
        return self.store

    def belong_to(self, owner: Owner, context: int | None) -> None:
        """Know the model that the cache was made for, and how many tokens that was made for."""
        self.owner, self.context = owner, context
        if self.store is not None:
            self.store.context = context

    def check(self, keys, layers: int = 1) -> None:
        """Raise UsageError unless `keys` are those of `layers` layers of the plan's model."""
        expected = layers * self.plan.shape.kv_heads, self.plan.shape.side_widths[0]
        received = keys.shape[1], keys.shape[3]
        if expected != received:
            of = f"for {profile.model}" if (profile := self.plan.profile) else "for other sizes"
            raise UsageError(
                f"Expected keys with (kv_heads, head_dim) {expected}, received {received}: the cache was made {of}. Make one "
                "with the model that is called; where it is that one, its layers are not what its config says."
            )

    def start(self, batch: int, padding: Sequence[int] | None = None) -> None:
        """Open the empty store for `batch` sequences; `padding` [batch] counts left padding in slots."""
        self.store.start(batch, padding)

    def commit(self) -> None:
        """Let tokens that nobody attended to through us enter the cache."""
        taken, self.taken = self.taken, {}
        for number, (keys, values) in taken.items():
            if not self.store.padding_groups:
                self.start(keys.shape[0])
            self.store.append(keys, values, number)

    def append(self, keys, values, padding: Sequence[int] | None = None) -> None:
        """Take in [B, layers * H, L, D] post-RoPE keys and values without attending; `padding` [B] at the first call."""
        self.check(keys, len(self.layers))
        keys, values = self.widen(keys, values)
        if self.store is None:
            self.open(keys.device)
        self.commit()
        if not self.store.padding_groups:
            self.start(keys.shape[0], padding)
        self.store.append(keys, values)

    def keys_and_values(self) -> tuple[Any, Any]:
        """Decoded keys and values [B, layers * H, seen, D]; None twice when empty."""
        self.commit()
        held = self.store.dense() if self.store is not None else None
        return self.narrow(*held) if held else (None, None)

    def widen(self, *sides) -> tuple:
        """Arrays [..., D] with zeros behind their channels up to head_dim, where keys and values have other widths."""
        shape, xp = self.plan.shape, self.xp
        if shape.widths is None:
            return sides
        return tuple(widened(xp, x, shape.head_dim) for x in sides)

    def narrow(self, keys, values) -> tuple[Any, Any]:
        """Inverse of `widen` for keys and values."""
        if self.plan.shape.widths is None:
            return keys, values
        return tuple(x[..., :width] for x, width in zip((keys, values), self.plan.shape.widths))

    def finalize(self) -> None:
        """End the prompt now instead of at the next call with at most 16 tokens: the layer takes its final size."""
        self.commit()
        self.end_prompt()

    def end_prompt(self) -> None:
        """Encode what a prompt staged at more bits at the plan's."""
        if self.store is not None and self.store.is_staged:
            self.store.finalize()
            self.xp.evaluate(*self.store.arrays())  # else the decoded prompt of every layer lives until the last one

    def arrays(self) -> list:
        """Every array held for the sequences."""
        self.commit()
        return self.store.arrays() if self.store is not None else []

    def tables(self) -> list:
        """Every array that all sequences share."""
        return self.store.tables() if self.store is not None else []


class FollowingLayer:
    """Layer number `number` of a layer group: `first` keeps its tokens, and what happens to them happens there."""

    def __init__(self, first: CompressedLayer, number: int):
        super().__init__()
        self.first, self.number = first, number

    def __deepcopy__(self, memo):
        new = copy.copy(self)
        new.first = copy.deepcopy(self.first, memo)
        return new

    @property
    def store(self) -> Any:
        """The `LayerCache` of the whole group, or None."""
        return self.first.store


def is_compressed(layer) -> bool:
    """Whether `layer` is ours, and none of the host's own."""
    return isinstance(layer, (CompressedLayer, FollowingLayer))


def leading_layers(layers: Sequence) -> list[CompressedLayer]:
    """Those of a cache's `layers` that hold tokens of ours: one for every layer group of the plan."""
    return [layer for layer in layers if isinstance(layer, CompressedLayer)]

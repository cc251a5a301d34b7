"""The compressed cache as mlx-lm sees it: one `SpectralKVCache` per full-attention layer, in the host's list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask, create_causal_mask

from spectral_kv_core.cache.compressed_layer import FollowingLayer
from spectral_kv_core.cache.eviction import Eviction
from spectral_kv_core.cache.padding_group import LATENT_QUERIES, PaddingGroup
from spectral_kv_core.codecs.chunk import split_layers
from spectral_kv_core.errors import UsageError
from spectral_kv_core.planning.plan import Plan

from . import ops
from .batch import BatchedLayer
from .handles import RoutedCache, hand_out
from .limits import warn_of_limits
from .masks import made_causal


@dataclass(frozen=True)
class Held:
    """What a cache holds, beside the plan: the first entry of its state.

    mlx-lm's `save_prompt_cache` refuses an entry that is neither an array nor a scalar, and prints it. It could not store
    the plan, and its `load_prompt_cache` could make no cache without.
    """

    plan: str  # its hash
    seen: int
    left_padding: list[int] | None
    padding_groups: list[PaddingGroup]

    def __str__(self) -> str:
        return (
            "a cache of spectralkv. Save it with save_prompt_cache of spectral_kv_mlx and load it with load_prompt_cache "
            "from there"
        )


class SpectralKVCache(BatchedLayer, RoutedCache):
    """A `CompressedLayer` in mlx-lm's list of caches.

    Where our dispatcher is installed, `update_and_fetch` gives back the new tokens only and the dispatcher attends to
    the codes; for anybody else it gives back dense keys and values.
    """

    xp = ops

    def __init__(
        self,
        plan: Plan,
        layer_group: int,
        sinks: int,
        window: int,
        left_padding: list[int] | None = None,
        eviction: Eviction | None = None,
        working_set: int = 0,
    ):
        super().__init__(plan, layer_group, sinks, window, eviction, working_set)
        if left_padding is not None:
            self.left_padding = [int(p) for p in left_padding]
        self.given: dict[int, tuple[mx.array, mx.array]] = {}  # of `taken`, as the model has them
        self.open()

    @property
    def pending(self) -> tuple[mx.array, mx.array] | None:
        return self.given.get(0)

    def commit(self) -> None:
        """As `CompressedLayer.commit`."""
        super().commit()
        self.given = {}

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in [B, H, L, D] post-RoPE keys and values."""
        return self.take(keys, values, 0, self.find_route())

    def take(self, keys: mx.array, values: mx.array, number: int, routed: bool) -> tuple[mx.array, mx.array]:
        """`update_and_fetch` for layer number `number` of the group."""
        self.check(keys)
        if not number:
            self.commit()
            if not self.layer_group and (keys.shape[2] > 1 or self.empty()):
                warn_of_limits()
        self.given = {**self.given, number: (keys, values)}
        self.taken[number] = self.widen(keys, values)
        if routed:
            hand_out(keys)
            return keys, values
        return self.fetch(number)

    def fetch(self, number: int = 0) -> tuple[mx.array, mx.array]:
        """As `RoutedCache.fetch`, of layer number `number` of the group."""
        keys, values = self.taken[number]
        self.store.begin(keys.shape[2])
        held = self.store.dense(keys.dtype)
        self.commit()
        if held is None:
            return self.narrow(keys, values)
        held = split_layers(*held, len(self.layers))[number]
        return self.narrow(mx.concatenate([held[0], keys], axis=2), mx.concatenate([held[1], values], axis=2))

    def attend(self, queries: mx.array, scale: float, fused, sinks=None, number: int = 0) -> mx.array:
        """Attention [B, Hq, L, D] of the pending tokens of layer number `number` of the group; they enter with the last's."""
        keys, values = self.taken.pop(number)
        self.given = {other: held for other, held in self.given.items() if other != number}
        if not self.store.padding_groups:
            self.start(keys.shape[0])
        if self.store.begin(queries.shape[2]):
            mx.eval(self.store.arrays())  # else the decoded prompt of every layer lives until the last one
        (queries,) = self.widen(queries)
        out = self.store.attend(queries, keys, values, scale, fused, number, sinks)[
            ..., : self.plan.shape.side_widths[1]
        ]
        if queries.shape[2] > LATENT_QUERIES:  # else the dense keys and values of every layer live until the last one
            mx.eval(out, self.store.arrays())
        return out

    def size(self) -> int:
        """Slots seen, padding included."""
        return self.store.seen + self.waiting

    def slots(self) -> int:
        """Slots that `fetch` gives back: fewer than `size` once tokens were dropped."""
        return self.store.slots + self.waiting

    @property
    def offset(self) -> int | mx.array:
        """Next RoPE position; an array [B] with left padding, as `BatchKVCache` has it."""
        if self.left_padding is None:
            return self.size()
        return mx.array([self.size() - p for p in self.left_padding])

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        seen = self.size()
        if self.left_padding is None:
            mask = create_attention_mask(N, offset=seen, return_array=return_array, window_size=window_size)
        else:
            mask = create_causal_mask(N, seen, window_size, left_padding=mx.array(self.left_padding))
            mask = mask[..., self.store.seen - self.store.slots :]
        return mask if window_size is not None else made_causal(mask)

    def is_trimmable(self) -> bool:
        """Whether the host may forget any number of tokens: never where some before them may be dropped."""
        return self.store.eviction is None

    def trim(self, n: int) -> int:
        """Forget the last `n` tokens; returns how many there were to forget."""
        self.commit()
        n = min(n, self.store.seen)
        self.store.crop(n)
        return n

    def empty(self) -> bool:
        return not self.size()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays())

    @property
    def state(self) -> tuple:
        """What tells this cache from an empty one of the same plan, and every array of it, which mlx-lm evaluates.

        A prompt that may go on stays staged: mlx-lm reads the state after every piece of a prompt.
        """
        self.commit()
        groups = [group.copy() for group in self.store.padding_groups]
        return Held(self.plan.hash, self.store.seen, self.left_padding, groups), *self.store.state_arrays()

    @state.setter
    def state(self, state: tuple) -> None:
        held = state[0]
        if held.plan != self.plan.hash:
            raise UsageError(
                f"Expected the state of a cache with plan {self.plan.hash}, received {held.plan}. Make the cache with "
                "the same profile, method and bits."
            )
        self.taken, self.given, self.left_padding = {}, {}, held.left_padding
        groups = [replace(group.copy(), storage=self.store.storage, decoded={}) for group in held.padding_groups]
        self.store.seen, self.store.padding_groups = held.seen, groups

    @classmethod
    def from_state(cls, state):
        raise UsageError(
            "Expected a cache to restore into, received a state alone, which has no plan. Make the cache with "
            "make_prompt_cache, then set its `state`."
        )


class FollowingKVCache(FollowingLayer, RoutedCache):
    """A `FollowingLayer` in mlx-lm's list of caches."""

    @property
    def left_padding(self) -> list[int] | None:
        return self.first.left_padding

    @property
    def pending(self) -> tuple[mx.array, mx.array] | None:
        return self.first.given.get(self.number)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `SpectralKVCache.update_and_fetch`."""
        return self.first.take(keys, values, self.number, self.find_route())

    def attend(self, queries: mx.array, scale: float, fused, sinks=None) -> mx.array:
        """As `SpectralKVCache.attend`."""
        return self.first.attend(queries, scale, fused, sinks, self.number)

    def fetch(self) -> tuple[mx.array, mx.array]:
        """As `RoutedCache.fetch`."""
        return self.first.fetch(self.number)

    @classmethod
    def merge(cls, caches: Sequence[FollowingKVCache]) -> FollowingKVCache:
        """As `SpectralKVCache.merge`, which has merged the first layers of the groups."""
        return caches[0]._behind_successor()

    def extract(self, idx: int) -> FollowingKVCache:
        """As `SpectralKVCache.extract`, which has extracted from the first layer of the group."""
        return self._behind_successor()

    def _behind_successor(self) -> FollowingKVCache:
        first = self.first.successor()
        if first is None:
            raise UsageError(
                "Expected the first of the layers that are coded together to be merged or extracted before the others, "
                f"received number {self.number}. Go through all layers in their order."
            )
        return FollowingKVCache(first, self.number)

    def extend(self, other: FollowingKVCache) -> None:
        """The first layer of the group extends, filters, prepares and finalizes for all."""

    def filter(self, batch_indices: Sequence[int]) -> None:
        """See `extend`."""

    def prepare(self, **padding) -> None:
        """See `extend`."""

    def finalize(self) -> None:
        """See `extend`."""

    def size(self) -> int:
        return self.first.size()

    def slots(self) -> int:
        """As `SpectralKVCache.slots`."""
        return self.first.slots()

    @property
    def offset(self) -> int | mx.array:
        return self.first.offset

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        return self.first.make_mask(N, return_array, window_size)

    def is_trimmable(self) -> bool:
        return self.first.is_trimmable()

    def trim(self, n: int) -> int:
        """The first layer of the group forgets for all."""
        return n

    def empty(self) -> bool:
        return self.first.empty()

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def state(self) -> tuple:
        return ()

    @state.setter
    def state(self, state: tuple) -> None:
        pass


def put_layer_group(cache: list, first: SpectralKVCache) -> None:
    """Let all layers of the group that `first` keeps be compressed in `cache`."""
    for number, layer_idx in enumerate(first.layers):
        cache[layer_idx] = FollowingKVCache(first, number) if number else first

"""The compressed cache as mlx-lm sees it: one `SpectralKVCache` per full-attention layer, in the host's list."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask, create_causal_mask

from spectral_kv_core.cache.compressed_layer import CompressedLayer, FollowingLayer
from spectral_kv_core.cache.eviction import Eviction
from spectral_kv_core.cache.padding_group import LATENT_QUERIES
from spectral_kv_core.codecs.chunk import Chunk, split_layers
from spectral_kv_core.errors import UsageError
from spectral_kv_core.planning.plan import Plan

from . import ops
from .handles import RoutedCache


class SpectralKVCache(CompressedLayer, RoutedCache):
    """A `CompressedLayer` in mlx-lm's list of caches.

    `left_padding` counts slots, sequence by sequence of the batch.
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
        self.left_padding = [int(p) for p in left_padding] if left_padding is not None else None
        self.successor: Callable[[], SpectralKVCache | None] = lambda: None  # what was last made of this one
        self.open()

    @property
    def pending(self) -> tuple[mx.array, mx.array] | None:
        return self.taken.get(0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in [B, H, L, D] post-RoPE keys and values."""
        return self.take(keys, values, 0, self.find_route())

    def take(self, keys: mx.array, values: mx.array, number: int, routed: bool) -> tuple[mx.array, mx.array]:
        """`update_and_fetch` for layer number `number` of the group."""
        self.check(keys)
        if not number:
            self.commit()
        self.taken[number] = keys, values
        if routed:
            return keys, values
        self.store.begin(keys.shape[2])
        held = self.store.dense(keys.dtype)
        self.commit()
        if held is None:
            return keys, values
        held = split_layers(*held, len(self.layers))[number]
        return mx.concatenate([held[0], keys], axis=2), mx.concatenate([held[1], values], axis=2)

    def attend(self, queries: mx.array, scale: float, fused, number: int = 0) -> mx.array:
        """Attention [B, Hq, L, D] of the pending tokens of layer number `number` of the group; they enter with the last's."""
        keys, values = self.taken.pop(number)
        if not self.store.padding_groups:
            self.start(keys.shape[0])
        if self.store.begin(queries.shape[2]):
            mx.eval(self.store.arrays())  # else the decoded prompt of every layer lives until the last one
        out = self.store.attend(queries, keys, values, scale, fused, number)
        if queries.shape[2] > LATENT_QUERIES:  # else the dense keys and values of every layer live until the last one
            mx.eval(out, self.store.arrays())
        return out

    def start(self, batch: int, padding: Sequence[int] | None = None) -> None:
        """`CompressedLayer.start`; `padding` counts where nobody told it when the cache was made."""
        if self.left_padding is None and padding and any(padding):
            self.left_padding = list(padding)
        super().start(batch, self.left_padding)

    @classmethod
    def merge(cls, caches: Sequence[SpectralKVCache]) -> SpectralKVCache:
        """The sequences of `caches`, which stay as they are, in one batch that shares their arrays.

        Raises UsageError where their tokens are not coded and kept alike.
        """
        first, *others = (cache.begun() for cache in caches)
        for other in others:
            first.extend(other)
        caches[0].successor = weakref.ref(first)
        return first

    def begun(self) -> SpectralKVCache:
        """A cache of the same sequences that goes on by itself: of one where none has a token, or as many as were told."""
        self.commit()
        new = copy.copy(self)
        new.store, new.taken = self.store.share(), {}
        if not new.store.padding_groups:
            new.start(len(self.left_padding or [0]))
        return new

    def extend(self, other: SpectralKVCache) -> None:
        """Put the sequences of `other` behind those of this batch."""
        if self.kept_alike() != other.kept_alike():
            raise UsageError(
                f"Expected caches of one batch to have one plan, sinks, window and budget, received {self.kept_alike()} and "
                f"{other.kept_alike()}. Make them with equal arguments."
            )
        self.commit()
        other.commit()
        self.store.extend(other.store)
        self.read_padding()

    def kept_alike(self) -> tuple:
        """What caches of one batch have in common."""
        dropping = self.eviction and (self.eviction.budget, self.eviction.mode, self.eviction.every, self.eviction.protect)
        return self.plan.hash, self.sinks, self.window, self.working_set, dropping

    def extract(self, idx: int) -> SpectralKVCache:
        """Sequence `idx` of the batch alone, without padding."""
        self.commit()
        new = copy.copy(self)
        new.store, new.taken, new.left_padding = self.store.extract(idx), {}, None
        mx.eval(new.store.arrays())  # else a copy of one sequence keeps all others alive
        self.successor = weakref.ref(new)
        return new

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep the sequences `batch_indices` of the batch, in this order."""
        self.commit()
        self.store.select(batch_indices)
        self.store.strip()
        self.read_padding()
        mx.eval(self.store.arrays())

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Tell the padding of the calls to come, until `finalize`: sequence i brings `lengths[i]` slots, then padding."""
        self.commit()
        if left_padding is not None:
            if self.store.seen:
                raise UsageError("Expected left padding for an empty cache, received some for one that holds tokens.")
            told = self.left_padding or [0] * len(left_padding)
            self.left_padding = [before + int(more) for before, more in zip(told, left_padding)]
            self.start(len(left_padding))
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise UsageError("Expected the lengths of sequences that are padded on the right, received none.")
            if not self.store.padding_groups:
                self.start(len(lengths))
            self.store.expect([int(length) for length in lengths])

    def finalize(self) -> None:
        """End calls with padding on the right, which moves to the left; where there were none, end the prompt."""
        self.commit()
        if not self.store.expects_padding:
            super().finalize()
            return
        self.store.settle()
        self.read_padding()

    def read_padding(self) -> None:
        """Know the padding of the batch as it is now; none at all where no sequence has any."""
        padding = self.store.padding
        self.left_padding = padding if any(padding) else None

    def size(self) -> int:
        """Slots seen, padding included."""
        return self.store.seen + self.waiting

    @property
    def offset(self) -> int | mx.array:
        """Next RoPE position; an array [B] with left padding, as `BatchKVCache` has it."""
        if self.left_padding is None:
            return self.size()
        return mx.array([self.size() - p for p in self.left_padding])

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        seen = self.size()
        if self.left_padding is None:
            return create_attention_mask(N, offset=seen, return_array=return_array, window_size=window_size)
        mask = create_causal_mask(N, seen, window_size, left_padding=mx.array(self.left_padding))
        return mask[..., self.store.seen - self.store.slots :]

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
        """What tells this cache from an empty one of the same plan: the layout as JSON, then every array.

        A prompt that may go on stays staged: mlx-lm evaluates the state after every piece of a prompt.
        """
        self.commit()
        arrays = self.store.state_arrays()
        padding_groups = [
            {
                "sequences": group.sequences,
                "pad": group.pad,
                "exact": group.exact_keys is not None,
                "dropped": group.dropped,
                "end": group.end,
                "chunks": [_fields(chunk) for chunk in group.chunks],
                "staged": [_fields(chunk) for chunk in group.staged],
            }
            for group in self.store.padding_groups
        ]
        layout = {
            "seen": self.store.seen,
            "left_padding": self.left_padding,
            "plan": self.plan.hash,
            "padding_groups": padding_groups,
        }
        return json.dumps(layout), *arrays

    @state.setter
    def state(self, state: tuple) -> None:
        layout, arrays = json.loads(state[0]), iter(state[1:])
        if layout["plan"] != self.plan.hash:
            raise UsageError(
                f"Expected the state of a cache with plan {self.plan.hash}, received {layout['plan']}. Make the cache with "
                "the same profile, method and bits."
            )
        self.taken, self.left_padding = {}, layout["left_padding"]
        self.store.seen, self.store.padding_groups = layout["seen"], []
        for fields in layout["padding_groups"]:
            group = self.store.open_group(fields["sequences"], fields["pad"], dropped=fields["dropped"], end=fields["end"])
            if fields["exact"]:
                group.exact_keys, group.exact_values = next(arrays), next(arrays)
            if group.dropped:
                group.positions = next(arrays)
            for chunks, held in ((group.chunks, fields["chunks"]), (group.staged, fields["staged"])):
                for batch, start, tokens, count in held:
                    codes = tuple(next(arrays) for _ in range(count))
                    chunks.append(Chunk(batch, next(arrays) if start is None else start, tokens, codes))

    @classmethod
    def from_state(cls, state):
        raise UsageError(
            "Expected a cache to restore into, received a state alone, which has no plan. Make the cache with "
            "make_prompt_cache, then set its `state`."
        )


def _fields(chunk: Chunk) -> list:
    """What a chunk is beside its arrays; no start where an array has the positions."""
    return [chunk.batch, chunk.start if isinstance(chunk.start, int) else None, chunk.tokens, len(chunk.arrays)]


class FollowingKVCache(FollowingLayer, RoutedCache):
    """A `FollowingLayer` in mlx-lm's list of caches."""

    @property
    def left_padding(self) -> list[int] | None:
        return self.first.left_padding

    @property
    def pending(self) -> tuple[mx.array, mx.array] | None:
        return self.first.taken.get(self.number)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `SpectralKVCache.update_and_fetch`."""
        return self.first.take(keys, values, self.number, self.find_route())

    def attend(self, queries: mx.array, scale: float, fused) -> mx.array:
        """As `SpectralKVCache.attend`."""
        return self.first.attend(queries, scale, fused, self.number)

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

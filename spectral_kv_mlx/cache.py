"""The compressed cache as mlx-lm sees it: one `SpectralKVCache` per full-attention layer, in the host's list."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from itertools import islice

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    create_attention_mask,
    create_causal_mask,
)

from spectral_kv_core.cache.eviction import Eviction
from spectral_kv_core.cache.layer_cache import LATENT_QUERIES, CacheSize, LayerCache
from spectral_kv_core.cache.padding_group import Lane
from spectral_kv_core.codecs.chunk import Chunk, join_layers, split_layers
from spectral_kv_core.planning.plan import Plan

from . import ops
from .handles import RoutedCache, caller_is_routed
from .integration import exact_layer


class SpectralKVCache(RoutedCache):
    """The compressed layers of row `row` of the plan's tables: one, or the first of several that are coded together, which
    keeps the tokens of all.

    `left_padding` counts slots, row by row of the batch.
    Where our dispatcher is installed, `update_and_fetch` gives back the new tokens only and the dispatcher attends to
    the codes; for anybody else it gives back dense keys and values.
    """

    def __init__(
        self,
        plan: Plan,
        row: int,
        sinks: int,
        window: int,
        left_padding: list[int] | None = None,
        eviction: Eviction | None = None,
        working_set: int = 0,
    ):
        self.plan, self.row = plan, row
        self.taken: dict[int, tuple] = {}  # by layer of the row: tokens that nobody has attended to yet
        self.left_padding = [int(p) for p in left_padding] if left_padding is not None else None
        staging = (lambda: plan.staging.codecs(ops)[row]) if plan.staging and eviction is None else None
        self.store = LayerCache(ops, plan.codecs(ops)[row], sinks, window, staging, eviction, row, working_set)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers of the row."""
        return self.plan.layer_groups[self.row]

    @property
    def kv_heads(self) -> int:
        """KV heads of all of these layers."""
        return self.plan.shape.kv_heads * len(self.layers)

    @property
    def pending(self) -> tuple[mx.array, mx.array] | None:
        return self.taken.get(0)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in [B, H, L, D] post-RoPE keys and values."""
        return self.take(keys, values, 0, caller_is_routed())

    def take(self, keys: mx.array, values: mx.array, number: int, routed: bool) -> tuple[mx.array, mx.array]:
        """`update_and_fetch` for layer number `number` of the row."""
        self._check(keys, self.plan.shape.kv_heads)
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
        """Attention [B, Hq, L, D] of the pending tokens of layer number `number` of the row; they enter with the last's."""
        keys, values = self.taken.pop(number)
        self._start(keys)
        if queries.shape[2] <= LATENT_QUERIES:
            self._end_prompt()
        out = self.store.attend(queries, keys, values, scale, fused, number)
        if queries.shape[2] > LATENT_QUERIES:  # else the dense keys and values of every layer live until the last one
            mx.eval(out, self.store.arrays())
        return out

    def commit(self) -> None:
        """Let tokens that nobody attended to through us enter the cache."""
        taken, self.taken = self.taken, {}
        for number, (keys, values) in taken.items():
            self._start(keys)
            self.store.append(keys, values, number)

    def finalize(self) -> None:
        """End the prompt now instead of at the next call with at most 16 tokens: the cache takes its final size."""
        self.commit()
        self._end_prompt()

    def _end_prompt(self) -> None:
        if self.store.is_staged:
            self.store.finalize()
            mx.eval(self.store.arrays())  # else the decoded prompt of every layer lives until the last one

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Take in [B, layers * H, L, D] post-RoPE keys and values without attending."""
        self._check(keys, self.kv_heads)
        self.commit()
        self._start(keys)
        self.store.append(keys, values)

    def keys_and_values(self):
        """Decoded keys and values [B, layers * H, seen, D]; None twice when empty."""
        self.commit()
        return self.store.dense() or (None, None)

    def size(self) -> int:
        """Slots seen, padding included."""
        return self.store.seen + next((keys.shape[2] for keys, _ in self.taken.values()), 0)

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

    def arrays(self) -> list[mx.array]:
        """Every array held for the sequences."""
        self.commit()
        return self.store.arrays()

    def tables(self) -> list[mx.array]:
        """Every array that all sequences share."""
        return self.store.tables()

    @property
    def state(self) -> tuple:
        """What tells this cache from an empty one of the same plan: the layout as JSON, then every array.

        A prompt that may go on stays staged: mlx-lm evaluates the state after every piece of a prompt.
        """
        self.commit()
        arrays = self.store.state_arrays()
        lanes = [
            {
                "rows": lane.rows,
                "pad": lane.pad,
                "exact": lane.exact_keys is not None,
                "dropped": lane.dropped,
                "chunks": [_fields(chunk) for chunk in lane.chunks],
                "staged": [_fields(chunk) for chunk in lane.staged],
            }
            for lane in self.store.lanes
        ]
        layout = {"seen": self.store.seen, "left_padding": self.left_padding, "plan": self.plan.hash, "lanes": lanes}
        return json.dumps(layout), *arrays

    @state.setter
    def state(self, state: tuple) -> None:
        layout, arrays = json.loads(state[0]), iter(state[1:])
        if layout["plan"] != self.plan.hash:
            raise ValueError(
                f"Expected the state of a cache with plan {self.plan.hash}, received {layout['plan']}. Make the cache with "
                "the same profile, method and bits."
            )
        self.taken, self.left_padding = {}, layout["left_padding"]
        self.store.seen, self.store.lanes = layout["seen"], []
        for fields in layout["lanes"]:
            lane = Lane(fields["rows"], fields["pad"], dropped=fields["dropped"])
            if fields["exact"]:
                lane.exact_keys, lane.exact_values = next(arrays), next(arrays)
            if lane.dropped:
                lane.positions = next(arrays)
            for chunks, held in ((lane.chunks, fields["chunks"]), (lane.staged, fields["staged"])):
                for batch, start, tokens, count in held:
                    codes = tuple(next(arrays) for _ in range(count))
                    chunks.append(Chunk(batch, next(arrays) if start is None else start, tokens, codes))
            self.store.lanes.append(lane)

    @classmethod
    def from_state(cls, state):
        raise ValueError(
            "Expected a cache to restore into, received a state alone, which has no plan. Make the cache with "
            "make_prompt_cache, then set its `state`."
        )

    def __deepcopy__(self, memo) -> SpectralKVCache:
        """An independent cache that shares the plan and the arrays."""
        self.commit()
        new = copy.copy(self)
        new.taken = {}
        new.store = copy.deepcopy(self.store, memo)
        return new

    def _start(self, keys: mx.array) -> None:
        if not self.store.lanes:
            self.store.start(keys.shape[0], self.left_padding)

    def _check(self, keys: mx.array, kv_heads: int) -> None:
        expected, received = (kv_heads, self.plan.shape.head_dim), (keys.shape[1], keys.shape[3])
        if expected != received:
            raise ValueError(
                f"Expected keys with (kv_heads, head_dim) {expected}, received {received}: the profile is of another model."
            )


def _fields(chunk: Chunk) -> list:
    """What a chunk is beside its arrays; no start where an array has the positions."""
    return [chunk.batch, chunk.start if isinstance(chunk.start, int) else None, chunk.tokens, len(chunk.arrays)]


class FollowingKVCache(RoutedCache):
    """Layer number `number` of a row of several: `first` keeps its tokens, and what happens to them happens there."""

    def __init__(self, first: SpectralKVCache, number: int):
        self.first, self.number = first, number

    @property
    def store(self) -> LayerCache:
        """The cache of the whole row."""
        return self.first.store

    @property
    def left_padding(self) -> list[int] | None:
        return self.first.left_padding

    @property
    def pending(self) -> tuple[mx.array, mx.array] | None:
        return self.first.taken.get(self.number)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `SpectralKVCache.update_and_fetch`."""
        return self.first.take(keys, values, self.number, caller_is_routed())

    def attend(self, queries: mx.array, scale: float, fused) -> mx.array:
        """As `SpectralKVCache.attend`."""
        return self.first.attend(queries, scale, fused, self.number)

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
        """The first layer of the row forgets for all."""
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

    def __deepcopy__(self, memo) -> FollowingKVCache:
        new = copy.copy(self)
        new.first = copy.deepcopy(self.first, memo)
        return new


COMPRESSED = SpectralKVCache, FollowingKVCache


def put_row(cache: list, first: SpectralKVCache) -> None:
    """Let all layers of the row that `first` keeps be compressed in `cache`."""
    for number, layer_idx in enumerate(first.layers):
        cache[layer_idx] = FollowingKVCache(first, number) if number else first


def rows_of(cache: list) -> list[SpectralKVCache]:
    """The compressed layers that hold tokens: one for every row of the plan."""
    return [layer for layer in cache if isinstance(layer, SpectralKVCache)]


def layer_contents(cache: list, layers: Sequence[int]) -> Iterator[tuple]:
    """(keys, values) [B, H, seen, D] of every one of `layers`, ascending; what is coded is decoded.

    Rows of several layers, which are in `layers` whole, are decoded once.
    """
    for layer in (cache[layer_idx] for layer_idx in layers):
        if isinstance(layer, FollowingKVCache):
            continue
        if isinstance(layer, SpectralKVCache):
            layer.store.check_complete()
            yield from split_layers(*layer.keys_and_values(), len(layer.layers))
        else:
            held = exact_layer(layer)
            yield held.keys, held.values


def held_vectors(cache: list, layers: Sequence[int]) -> Iterator[tuple]:
    """Of every one of `layers`, ascending: keys and values [H, N, D] float32 of row 0, decoded as they are after the prompt,
    and the positions [H or 1, N] that they stand at, None where every token is held.
    """
    same = {}  # what layers share stays shared
    for layer in (cache[layer_idx] for layer_idx in layers):
        if isinstance(layer, FollowingKVCache):
            continue
        if isinstance(layer, SpectralKVCache):
            layer = copy.deepcopy(layer, same)
            layer.finalize()
            for held in split_layers(*layer.keys_and_values(), len(layer.layers)):
                yield *(ops.to_numpy(x[0]) for x in held), layer.store.positions()
        else:
            held = exact_layer(layer)
            yield ops.to_numpy(held.keys[0]), ops.to_numpy(held.values[0]), None


def fill(cache: list, plain: list) -> None:
    """Let the empty `cache` take over the tokens of another, as one call with all of them would have left it.

    A single call to an empty cache attends exactly, so only what is stored can differ. `plain`, which may be compressed
    itself, stays as it is.
    """
    for layer_idx, (layer, host) in enumerate(zip(cache, plain)):
        if not isinstance(layer, COMPRESSED):
            cache[layer_idx] = copy.deepcopy(host)
    layers = [layer_idx for layer_idx, layer in enumerate(cache) if isinstance(layer, COMPRESSED)]
    contents = layer_contents(plain, layers)
    for layer in rows_of(cache):
        layer.append(*join_layers(ops, tuple(islice(contents, len(layer.layers)))))
        mx.eval(layer.arrays())  # else the keys and values of every layer live until the last one


def cache_nbytes(cache: list) -> CacheSize:
    """Count the bytes of every array that `cache` holds for its sequences.

    The window, the sinks and the layers that pass through count too. Tables that all sequences share stand apart.

    Args:
        cache: A cache of this backend or of the host.

    Returns:
        The bytes, an int with `dense_nbytes`, what the plain cache needs for the same tokens at 16 bits, with
        `compression`, their ratio, with `bits_per_element`, and with `table_nbytes`.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import cache_nbytes, load_model, make_prompt_cache
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import mlx.core as mx
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> _ = model(mx.array([tokens]), cache=cache)
        >>> size = cache_nbytes(cache)
        >>> size.dense_nbytes == len(tokens) * 2 * 30 * 3 * 64 * 2  # layers, KV heads, head_dim, bytes
        True
    """
    stored = dense = 0
    tables = {}
    for layer in rows_of(cache):  # heads may keep the same tokens in all layers
        layer.commit()
    for layer in cache:
        if isinstance(layer, FollowingKVCache):
            continue
        if isinstance(layer, SpectralKVCache):
            stored += layer.nbytes
            tables |= {id(x): x.nbytes for x in layer.tables()}  # some are shared by all layers
            dense += layer.store.tokens() * 2 * 2 * layer.kv_heads * layer.plan.shape.head_dim
        elif not layer.empty():
            exact = isinstance(layer, (KVCache, RotatingKVCache, BatchRotatingKVCache))
            state = (layer.keys, layer.values) if exact else layer.state
            held = [x for _, x in tree_flatten(state) if isinstance(x, mx.array)]
            stored += sum(x.nbytes for x in held)
            if exact:  # these allocate ahead, in steps of 256 tokens
                held = [x[:, :, : layer.size()] for x in held]
            dense += sum(2 * x.size for x in held)
    return CacheSize(stored, dense, sum(tables.values()))

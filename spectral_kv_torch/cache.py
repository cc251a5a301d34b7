"""The compressed cache as transformers sees it: a `Cache` whose full-attention layers are ours."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from spectral_kv_core.cache.decoded_chunks import bytes_per_layer
from spectral_kv_core.cache.eviction import Eviction
from spectral_kv_core.cache.layer_cache import CacheSize, LayerCache
from spectral_kv_core.cache.padding_group import Lane
from spectral_kv_core.codecs.chunk import join_layers, split_layers
from spectral_kv_core.codecs.registry import plan_for
from spectral_kv_core.planning.methods import get_live_method
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.profile import Profile

from . import ops
from .handles import Pending
from .integration import exact_layer


class SpectralKVLayer(CacheLayerMixin):
    """The compressed layers of row `row` of the plan's tables: one, or the first of several that are coded together, which
    keeps the tokens of all.

    `update` gives handles back: our attention function attends to the codes through them, for anybody else they turn
    into dense keys and values.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        plan: Plan,
        row: int,
        sinks: int,
        window: int,
        eviction: Eviction | None = None,
        working_set: int = 0,
    ):
        super().__init__()
        self.plan, self.row, self.sinks, self.window, self.eviction = plan, row, sinks, window, eviction
        self.working_set = working_set
        self.store: LayerCache | None = None
        self.pending: list[Pending] = []  # of layers of the row that nobody has attended to yet, in their order

    def __deepcopy__(self, memo) -> SpectralKVLayer:
        """An independent layer that shares the plan and the tensors: a prefix can be read once and copied."""
        self.commit()
        new = copy.copy(self)
        new.pending = []
        new.store = copy.deepcopy(self.store, memo)
        new.eviction = copy.deepcopy(self.eviction, memo)
        return new

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Open the store on the device of the first keys."""
        expected = (self.plan.shape.kv_heads, self.plan.shape.head_dim)
        received = (key_states.shape[1], key_states.shape[3])
        if expected != received:
            raise ValueError(
                f"Expected keys with (kv_heads, head_dim) {expected}, received {received}: the profile is of another model."
            )
        self.open(key_states.device)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers of the row."""
        return self.plan.layer_groups[self.row]

    @property
    def kv_heads(self) -> int:
        """KV heads of all of these layers."""
        return self.plan.shape.kv_heads * len(self.layers)

    def open(self, device: torch.device) -> LayerCache:
        """Put the codec's tables on `device`; returns the store, empty."""
        codec = self.plan.codecs(ops, device)[self.row]
        staging = None
        if self.plan.staging and self.eviction is None:
            staging = lambda: self.plan.staging.codecs(ops, device)[self.row]  # noqa: E731
        self.store = LayerCache(ops, codec, self.sinks, self.window, staging, self.eviction, self.row, self.working_set)
        self.is_initialized = True
        return self.store

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take in [B, H, L, D] post-RoPE keys and values; returns handles of shape [B, H, slots, D]."""
        return self.take(key_states, value_states, 0)

    def take(self, key_states: torch.Tensor, value_states: torch.Tensor, number: int):
        """`update` for layer number `number` of the row."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        if not number:
            self.commit()
        self.pending.append(Pending(self, key_states, value_states, number))
        return self.pending[-1].handles(self.slots)

    def attend(self, pending: Pending, queries, scale: float, fused, padding=None):
        """Attention [B, Hq, L, D] of the tokens of `pending`, which enter the cache; `padding` [B] at the first call."""
        if not self.store.lanes:
            self.store.start(queries.shape[0], padding)
        elif padding is not None:
            self.store.repad([p + self.store.seen - self.store.slots for p in padding])
        self.pending.remove(pending)
        return self.store.attend(queries, pending.keys, pending.values, scale, fused, pending.number)

    def dense(self, pending: Pending):
        """Keys and values [B, H, seen, D] including the tokens of `pending`, which enter the cache."""
        self.store.begin(pending.keys.shape[2])
        held = self.store.dense(pending.keys.dtype)
        if pending in self.pending:
            self.commit()
        if held is None:
            return pending.keys, pending.values
        held = split_layers(*held, len(self.layers))[pending.number]
        return torch.cat([held[0], pending.keys], dim=2), torch.cat([held[1], pending.values], dim=2)

    def is_empty(self) -> bool:
        """Whether some row has no token yet, so that its left padding is still to be told."""
        return not all(lane.exact for lane in self.store.lanes or [Lane([], 0)])

    def commit(self) -> None:
        """Let tokens that nobody attended to through us enter the cache."""
        pending, self.pending = self.pending, []
        for taken in pending:
            self.store.append(taken.keys, taken.values, taken.number)

    def append(self, keys: torch.Tensor, values: torch.Tensor, padding: list[int] | None = None) -> None:
        """Take in [B, layers * H, L, D] post-RoPE keys and values without attending; `padding` [B] at the first call."""
        if self.store is None:
            self.lazy_initialization(*split_layers(keys, values, len(self.layers))[0])
        self.commit()
        if not self.store.lanes:
            self.store.start(keys.shape[0], padding)
        self.store.append(keys, values)

    def keys_and_values(self) -> tuple:
        """Decoded keys and values [B, layers * H, seen, D]; None twice when empty."""
        self.commit()
        return (self.store.dense() if self.store is not None else None) or (None, None)

    def finalize(self) -> None:
        """End the prompt: what it staged at more bits is encoded at the plan's."""
        self.commit()
        if self.store is not None:
            self.store.finalize()

    def get_seq_length(self) -> int:
        """Slots seen, padding included."""
        if self.store is None:
            return 0
        return self.store.seen + self._taken

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots of keys, and how many slots before them are no longer there: the host reads its mask by slot."""
        dropped = self.get_seq_length() - self.slots
        return self.slots + query_length, dropped

    @property
    def slots(self) -> int:
        """Slots that the dense keys and values have."""
        if self.store is None or not self.store.lanes:
            return self.get_seq_length()
        return self.store.slots + self._taken

    @property
    def _taken(self) -> int:
        """Slots of the tokens that wait to enter."""
        return self.pending[-1].keys.shape[2] if self.pending else 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a negative number or 0, as transformers 5 has it)."""
        if tokens_to_remove > 0:
            raise ValueError(f"Expected a negative number of tokens to remove, received {tokens_to_remove}.")
        if self.store is not None:
            self.commit()
            self.store.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.store, self.pending = None, []
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            self.commit()
            rows = sum(len(lane.rows) for lane in self.store.lanes)
            self.store.select([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length():
            self.commit()
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.store.select(indices.tolist())

    def arrays(self) -> list[torch.Tensor]:
        """Every tensor held for the sequences."""
        return self.store.arrays() if self.store is not None else []

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return self.store.tables() if self.store is not None else []


class FollowingLayer(CacheLayerMixin):
    """Layer number `number` of a row of several: `first` keeps its tokens, and what happens to them happens there."""

    is_sliding = False
    is_croppable = True

    def __init__(self, first: SpectralKVLayer, number: int):
        super().__init__()
        self.first, self.number = first, number

    def __deepcopy__(self, memo) -> FollowingLayer:
        new = copy.copy(self)
        new.first = copy.deepcopy(self.first, memo)
        return new

    @property
    def store(self) -> LayerCache | None:
        """The cache of the whole row."""
        return self.first.store

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.store is None:
            self.first.lazy_initialization(key_states, value_states)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As `SpectralKVLayer.update`."""
        self.is_initialized = True
        return self.first.take(key_states, value_states, self.number)

    def get_seq_length(self) -> int:
        return self.first.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.first.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        pass


class SpectralCache(Cache):
    """A transformers `Cache` that holds codes, made of a profile and a budget or of a plan.

    `make_prompt_cache` makes one for a model, and lets the model attend to its codes.

    Args:
        profile: A profile of the model.
        bits: Average stored bits per sealed key or value element. Default: the method's own.
        method: Name of a method with a live cache.
        window: The last tokens, kept exactly.
        sinks: The first tokens, kept exactly.
        plan: What is stored, in place of `profile`, `bits` and `method`.
        layers: What the host would use for every layer of the model; those that can be compressed are replaced.
        eviction: How tokens are dropped, for a method that drops some.
        working_set: Bytes that decoded chunks may take in all, as in `make_prompt_cache`.

    Raises:
        UsageError: The bits are out of range, or the method drops tokens and has no `eviction`.

    Examples:
        >>> from spectral_kv_core.profile.store import packaged_profiles
        >>> from spectral_kv_torch import SpectralCache, SpectralProfile
        >>> cache = SpectralCache(SpectralProfile.load(packaged_profiles()[0]), bits=2)
        >>> len(cache.layers), cache.get_seq_length()
        (30, 0)
    """

    def __init__(
        self,
        profile: Profile | None = None,
        bits: float | None = None,
        method: str = "spectral",
        window: int = 64,
        sinks: int = 4,
        *,
        plan: Plan | None = None,
        layers: list | None = None,
        eviction: Eviction | None = None,
        working_set: int = 0,
    ):
        plan = plan or plan_for(profile.shape, profile, get_live_method(method), bits)
        if plan.drops and eviction is None:
            raise ValueError(
                f"Expected a budget for {plan.method.name}, which drops tokens, received none: "
                "make_prompt_cache(model, method=..., budget_tokens=...)."
            )
        layers = list(layers) if layers is not None else [DynamicLayer() for _ in range(plan.shape.num_layers)]
        for row, layer_group in enumerate(plan.layer_groups):
            layer = SpectralKVLayer(plan, row, sinks, window, eviction, bytes_per_layer(plan, working_set))
            for number, layer_idx in enumerate(layer_group):
                layers[layer_idx] = FollowingLayer(layer, number) if number else layer
        super().__init__(layers=layers)
        self.plan = plan

    def __deepcopy__(self, memo) -> SpectralCache:
        """An independent cache that shares the plan and the tensors."""
        _commit(self.layers)
        new = copy.copy(self)
        new.layers = copy.deepcopy(self.layers, memo)
        return new

    def finalize(self) -> None:
        """End the prompt now instead of at the next call with at most 16 tokens: the cache takes its final size."""
        for layer in rows_of(self):
            layer.finalize()


COMPRESSED = SpectralKVLayer, FollowingLayer


def rows_of(cache: Cache) -> list[SpectralKVLayer]:
    """The compressed layers that hold tokens: one for every row of the plan."""
    return [layer for layer in cache.layers if isinstance(layer, SpectralKVLayer)]


def layer_contents(cache: Cache, layers: Sequence[int]) -> Iterator[tuple]:
    """(keys, values) [B, H, seen, D] of every one of `layers`, ascending, and its left padding; what is coded is decoded.

    Rows of several layers, which are in `layers` whole, are decoded once.
    """
    for layer in (cache.layers[layer_idx] for layer_idx in layers):
        if isinstance(layer, FollowingLayer):
            continue
        if isinstance(layer, SpectralKVLayer):
            if layer.store is not None:
                layer.store.check_complete()
            for held in split_layers(*layer.keys_and_values(), len(layer.layers)):
                yield held, layer.store.padding
        else:
            held = exact_layer(layer)
            yield (held.keys, held.values), None


def held_vectors(cache: Cache, layers: Sequence[int]) -> Iterator[tuple]:
    """Of every one of `layers`, ascending: keys and values [H, N, D] float32 of row 0, decoded as they are after the prompt,
    and the positions [H or 1, N] that they stand at, None where every token is held.
    """
    ended = copy.deepcopy(cache) if isinstance(cache, SpectralCache) else cache
    for layer in (ended.layers[layer_idx] for layer_idx in layers):
        if isinstance(layer, FollowingLayer):
            continue
        if isinstance(layer, SpectralKVLayer):
            layer.finalize()
            for held in split_layers(*layer.keys_and_values(), len(layer.layers)):
                yield *(ops.to_numpy(x[0]) for x in held), layer.store.positions()
        else:
            held = exact_layer(layer)
            yield ops.to_numpy(held.keys[0]), ops.to_numpy(held.values[0]), None


@torch.no_grad()
def fill(cache: Cache, plain: Cache) -> None:
    """Let the empty `cache` take over the tokens of another, as one call with all of them would have left it.

    A single call to an empty cache attends exactly, so only what is stored can differ. `plain`, which may be compressed
    itself, stays as it is; rows of a batch must be of equal length in a plain one, which does not know its padding.
    """
    for layer_idx, (layer, host) in enumerate(zip(cache.layers, plain.layers)):
        if not isinstance(layer, COMPRESSED):
            held = [x for x in (getattr(host, "keys", None), getattr(host, "values", None)) if x is not None]
            # a sliding window is a view of all that came in, and deepcopy copies what a view keeps alive
            cache.layers[layer_idx] = copy.deepcopy(host, {id(x): ops.copy(x) for x in held})
    layers = [layer_idx for layer_idx, layer in enumerate(cache.layers) if isinstance(layer, COMPRESSED)]
    contents = layer_contents(plain, layers)
    for layer in rows_of(cache):
        held, paddings = zip(*islice(contents, len(layer.layers)))
        layer.append(*join_layers(ops, held), paddings[0])


def cache_nbytes(cache: Cache) -> CacheSize:
    """Count the bytes of every array that `cache` holds for its sequences.

    The window, the sinks and the layers that pass through count too. Tables that all sequences share stand apart.

    Args:
        cache: A cache of this backend or of the host.

    Returns:
        The bytes, an int with `dense_nbytes`, what the plain cache needs for the same tokens at 16 bits, with
        `compression`, their ratio, with `bits_per_element`, and with `table_nbytes`.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import cache_nbytes, load_model, make_prompt_cache
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import torch
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([tokens]), past_key_values=cache)
        >>> size = cache_nbytes(cache)
        >>> size.dense_nbytes == len(tokens) * 2 * 30 * 3 * 64 * 2  # layers, KV heads, head_dim, bytes
        True
    """
    stored = dense = 0
    tables = {}
    _commit(cache.layers)
    for layer in cache.layers:
        if isinstance(layer, FollowingLayer):
            continue
        if isinstance(layer, SpectralKVLayer):
            stored += sum(storages(layer.arrays()).values())
            tables |= storages(layer.tables())  # some are shared by all layers
            if layer.store is not None:
                dense += layer.store.tokens() * 2 * 2 * layer.kv_heads * layer.plan.shape.head_dim
        elif getattr(layer, "is_initialized", False):
            held = [x for x in (layer.keys, layer.values) if x is not None]
            stored += sum(storages(held).values())
            dense += sum(2 * x.numel() for x in held)
    return CacheSize(stored, dense, sum(tables.values()))


def _commit(layers: list) -> None:
    """Let what nobody attended to enter all of `layers`: heads may keep the same tokens in all of them."""
    for layer in layers:
        if isinstance(layer, SpectralKVLayer):
            layer.commit()


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes that `tensors` keep alive, by address: several may be views of one storage."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

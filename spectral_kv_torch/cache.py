"""The compressed cache as transformers sees it: a `Cache` whose full-attention layers are ours."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from spectral_kv_core.cache.compressed_layer import CompressedLayer, FollowingLayer, is_compressed, leading_layers
from spectral_kv_core.cache.decoded_chunks import bytes_per_layer
from spectral_kv_core.cache.eviction import Eviction
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.codecs.chunk import split_layers
from spectral_kv_core.codecs.registry import plan_for
from spectral_kv_core.errors import UsageError
from spectral_kv_core.planning.budget import SINKS, WINDOW
from spectral_kv_core.planning.cache_plan import cache_plan
from spectral_kv_core.planning.methods import DEFAULT_METHOD, get_live_method
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.profile import Profile

from . import ops
from .handles import Pending


class NotPickled:
    """What holds codes, which stand on tables and on code that no pickle can hold."""

    def __reduce_ex__(self, protocol):
        raise UsageError(
            "Expected save_prompt_cache(path, cache), whose file both backends read, received pickle or torch.save, which "
            "cannot store a compressed cache."
        )

    def __copy__(self):
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new


class CodedLayer(NotPickled):
    """What transformers asks of a layer and ours refuses."""

    def offload(self) -> None:
        """Refused: a compressed cache is small enough to stay on its device."""
        raise UsageError(
            "Expected a compressed cache to stay on its device, received a request to move it. Take fewer bits, or store it: "
            "save_prompt_cache(path, cache)."
        )

    prefetch = offload


class SpectralKVLayer(CodedLayer, CompressedLayer, CacheLayerMixin):
    """A `CompressedLayer` in a transformers `Cache`.

    `update` gives handles back: our attention function attends to the codes through them, for anybody else they turn
    into dense keys and values.
    """

    is_sliding = False
    is_croppable = True
    xp = ops

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Open the store on the device of the first keys."""
        self.check(key_states)
        self.open(key_states.device)

    def open(self, device: torch.device) -> LayerCache:
        """`CompressedLayer.open`."""
        self.is_initialized = True
        with torch.inference_mode(False):  # tables are shared with caches that gradients may go through
            return super().open(device)

    @torch.compiler.disable  # what is in a cache is not for a compiler to trace
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take in [B, H, L, D] post-RoPE keys and values; returns handles of shape [B, H, slots, D]."""
        return self.take(key_states, value_states, 0)

    def take(self, key_states: torch.Tensor, value_states: torch.Tensor, number: int):
        """`update` for layer number `number` of the group."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        if not number:
            self.commit()
        sides, widths = self.widen(key_states, value_states), self.plan.shape.widths
        self.taken[number] = Pending(self, *sides, number, self.slots - self.waiting, widths)
        return self.taken[number].handles()

    def can_attend(self, pending: Pending, padding: list[int] | None) -> bool:
        """Whether codes can be attended to for `pending`: nobody has yet, and `padding` of the mask is that of the store."""
        if self.taken.get(pending.number) is not pending:
            return False
        if padding is None or not self.store.padding_groups:
            return True
        lost = self.store.seen - self.store.slots
        return all(
            padding[row] == max(group.pad - lost, 0)
            for group in self.store.padding_groups
            if group.exact
            for row in group.sequences
        )

    def attend(self, pending: Pending, queries, scale: float, fused, padding=None):
        """Attention [B, Hq, L, D] of the tokens of `pending`, which enter the cache; `padding` [B] as the mask has it."""
        self._start(pending, padding)
        del self.taken[pending.number]
        (queries,) = self.widen(queries)
        out = self.store.attend(queries, pending.keys, pending.values, scale, fused, pending.number)
        return out[..., : pending.widths[1]]

    def decoded(self, pending: Pending, queries, scale: float, padding: list[int] | None = None):
        """Keys and values [B, H, seen, D] for attention that is not ours; raises UsageError where tokens were dropped."""
        self.store.check_complete()
        if self.can_attend(pending, padding):
            self._start(pending, padding)
        return pending.dense()

    def _start(self, pending: Pending, padding: list[int] | None) -> None:
        """Tell the store the left padding of rows that have no token yet."""
        if not self.store.padding_groups:
            self.store.start(pending.keys.shape[0], padding)
        elif padding is not None:
            self.store.repad([p + self.store.seen - self.store.slots for p in padding])

    def dense(self, pending: Pending):
        """Keys and values [B, H, seen, D] including the tokens of `pending`, which enter the cache.

        Raises UsageError for handles of an earlier call.
        """
        length = pending.keys.shape[2]
        if self.taken.get(pending.number) is pending:
            self.store.begin(length)
            held = self.store.dense(pending.keys.dtype)
            self.commit()
        else:  # somebody has attended to them, as a layer does that shares them with another
            self.store.check_complete()
            held = self.store.dense(pending.keys.dtype)
            slots = 0 if held is None else held[0].shape[2]
            if slots not in (pending.slots, pending.slots + length):
                raise UsageError(
                    "Expected the keys and values that the last update gave back, received older ones. Take those of every "
                    "update."
                )
            held = tuple(x[:, :, : pending.slots] for x in held) if held is not None else None
        if held is None:
            return pending.keys, pending.values
        held = split_layers(*held, len(self.layers))[pending.number]
        return torch.cat([held[0], pending.keys], dim=2), torch.cat([held[1], pending.values], dim=2)

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        """Slots seen, padding included."""
        if self.store is None:
            return 0
        return self.store.seen + self.waiting

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots of keys, and how many slots before them are no longer there: the host reads its mask by slot."""
        dropped = self.get_seq_length() - self.slots
        return self.slots + query_length, dropped

    @property
    def slots(self) -> int:
        """Slots that the dense keys and values have."""
        if self.store is None or not self.store.padding_groups:
            return self.get_seq_length()
        return self.store.slots + self.waiting

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a negative number or 0, as transformers 5 has it)."""
        if tokens_to_remove > 0:
            raise UsageError(f"Expected a negative number of tokens to remove, received {tokens_to_remove}.")
        if self.store is not None:
            self.commit()
            self.store.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.store, self.taken = None, {}
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            self.commit()
            self.store.select([sequence for sequence in range(self.store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length():
            self.commit()
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.store.select(indices.tolist())


class SpectralKVFollower(CodedLayer, FollowingLayer, CacheLayerMixin):
    """A `FollowingLayer` in a transformers `Cache`."""

    is_sliding = False
    is_croppable = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.store is None:
            self.first.lazy_initialization(key_states, value_states)

    @torch.compiler.disable  # what is in a cache is not for a compiler to trace
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As `SpectralKVLayer.update`."""
        self.is_initialized = True
        return self.first.take(key_states, value_states, self.number)

    @torch.compiler.disable
    def get_seq_length(self) -> int:
        return self.first.get_seq_length()

    @torch.compiler.disable
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


class SpectralCache(NotPickled, Cache):
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
        method: str = DEFAULT_METHOD,
        window: int = WINDOW,
        sinks: int = SINKS,
        *,
        plan: Plan | None = None,
        layers: list | None = None,
        eviction: Eviction | None = None,
        working_set: int = 0,
    ):
        plan = cache_plan(
            plan or plan_for(profile.shape, profile, get_live_method(method), bits, window=window, sinks=sinks)
        )
        if plan.drops and eviction is None:
            raise UsageError(
                f"Expected a budget for {plan.method.name}, which drops tokens, received none: "
                "make_prompt_cache(model, method=..., budget_tokens=...)."
            )
        layers = list(layers) if layers is not None else [DynamicLayer() for _ in range(plan.shape.num_layers)]
        share = bytes_per_layer(plan, working_set)
        for layer_group, members in enumerate(plan.layer_groups):
            layer = SpectralKVLayer(plan, layer_group, sinks, window, eviction, share)
            for number, layer_idx in enumerate(members):
                layers[layer_idx] = SpectralKVFollower(layer, number) if number else layer
        super().__init__(layers=layers)
        self.plan = plan

    def __deepcopy__(self, memo) -> SpectralCache:
        """An independent cache that shares the plan and the tensors."""
        for layer in leading_layers(self.layers):
            layer.commit()
        new = super().__copy__()
        new.layers = copy.deepcopy(self.layers, memo)
        return new

    def __copy__(self) -> SpectralCache:
        return copy.deepcopy(self)

    def __iter__(self) -> Iterator[tuple]:
        """Decoded keys, values [B, H, seen, D] and window of every layer, as transformers' own cache gives them."""
        for layer in self.layers:
            if is_compressed(layer):
                first, number = (layer, 0) if isinstance(layer, SpectralKVLayer) else (layer.first, layer.number)
                keys, values = first.keys_and_values()
                held = (None, None) if keys is None else split_layers(keys, values, len(first.layers))[number]
                yield *held, None
            elif isinstance(layer, WindowLayer):
                yield *layer.exact(), None
            else:
                yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def finalize(self) -> None:
        """End the prompt now instead of at the next call with at most 16 tokens: the cache takes its final size."""
        for layer in leading_layers(self.layers):
            layer.finalize()
        for layer in self.layers:
            if isinstance(layer, WindowLayer):
                layer.finalize()


def storages(arrays: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes that `arrays` keep alive, by address: several may be views of one storage."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in arrays}

"""What a model is seen to do in one call: which layers give their cache tokens, and what attention is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from .handles import is_ours, replacing
from .places import replaced_attention, routed


@dataclass(frozen=True)
class Update:
    """Keys and values [B, H, L, D] that decoder layer `layer` gave its cache; layer None: no decoder layer ran."""

    layer: int | None
    keys: mx.array
    values: mx.array


@dataclass(frozen=True)
class Attended:
    """One call of attention by `layer`, to what entry `source` of the cache gave back, or to other keys (None).

    routable: it went through the function that a dispatcher of ours can take the place of.
    """

    layer: int | None
    source: int | None
    q_heads: int
    routable: bool


@dataclass
class Trace:
    """By entry of a cache what came in (`updates`), the layers that read it without giving any (`reads`), and attention."""

    updates: dict[int, list[Update]] = field(default_factory=lambda: defaultdict(list))
    reads: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    attended: list[Attended] = field(default_factory=list)
    _given: list[tuple[int, mx.array, mx.array]] = field(default_factory=list)
    _layer: int | None = None

    @contextmanager
    def watching(self, model, cache: list) -> Iterator[None]:
        """Note what `model` does with `cache`, of the host's own kinds, and with its attention."""
        for entry, layer in enumerate(cache):
            for leaf in layer.caches if isinstance(layer, CacheList) else [layer]:
                if hasattr(leaf, "update_and_fetch"):
                    self._watch(entry, leaf)
        with routed(model), self._layers(model.layers), self._fused(), replaced_attention(model, self._attention):
            yield

    def _watch(self, entry: int, leaf) -> None:
        """Shadow the methods of one cache by others that take notes; nothing else asks what class it is of."""
        update, read, inside = leaf.update_and_fetch, leaf.keys_and_values, False

        def update_and_fetch(keys, values):
            nonlocal inside
            inside = True
            try:
                back = update(keys, values)
            finally:
                inside = False
            self.updates[entry].append(Update(self._layer, keys, values))
            self._given.append((entry, *back))
            return back

        def keys_and_values():
            back = read()
            if not inside:
                self.reads[entry].add(-1 if self._layer is None else self._layer)
                self._given.append((entry, *back))
            return back

        leaf.update_and_fetch, leaf.keys_and_values = update_and_fetch, keys_and_values

    @contextmanager
    def _layers(self, layers: Sequence) -> Iterator[None]:
        """Know which of `layers` runs."""
        numbers = {id(layer): i for i, layer in enumerate(layers)}
        owners = {next(base for base in type(layer).__mro__ if "__call__" in vars(base)) for layer in layers}
        before = {owner: owner.__call__ for owner in owners}

        def noting(call):
            def __call__(part, *args, **options):
                outer, self._layer = self._layer, numbers.get(id(part), self._layer)
                try:
                    return call(part, *args, **options)
                finally:
                    self._layer = outer

            return replacing(call.host, __call__, call.users) if is_ours(call) else __call__

        try:
            for owner, call in before.items():
                owner.__call__ = noting(call)
            yield
        finally:
            for owner, call in before.items():
                owner.__call__ = call

    def _attention(self, attention: Callable) -> Callable:
        """`attention`, the function that can be replaced, with notes."""

        def scaled_dot_product_attention(queries, keys, values, *args, **options):
            self._note(queries, keys, values, True)
            return attention(queries, keys, values, *args, **options)

        return scaled_dot_product_attention

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """Note calls of MLX's own kernel too, which models of other code call themselves."""
        kernel = mx.fast.scaled_dot_product_attention

        def scaled_dot_product_attention(queries, keys, values, *args, **options):
            self._note(queries, keys, values, False)
            return kernel(queries, keys, values, *args, **options)

        mx.fast.scaled_dot_product_attention = scaled_dot_product_attention
        try:
            yield
        finally:
            mx.fast.scaled_dot_product_attention = kernel

    def _note(self, queries, keys, values, routable: bool) -> None:
        last = self.attended[-1] if self.attended else None
        source = next((entry for entry, k, v in reversed(self._given) if k is keys and v is values), None)
        note = Attended(self._layer, source, queries.shape[1], routable)
        if routable or last is None or not last.routable or (last.layer, last.source) != (note.layer, note.source):
            self.attended.append(note)  # else the kernel below a function that has been noted

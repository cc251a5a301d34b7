"""Compressed layers in mlx-lm's batches: they join, leave, and are padded on either side."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence

import mlx.core as mx

from spectral_kv_core.cache.compressed_layer import CompressedLayer
from spectral_kv_core.errors import UsageError


class BatchedLayer(CompressedLayer):
    """A `CompressedLayer` with what mlx-lm's `BatchGenerator` asks of caches.

    left_padding: in slots, sequence by sequence of the batch; None where there is none. successor: what was last made of
    this cache by `merge` or `extract`, for the other layers of its group.
    """

    left_padding: list[int] | None = None
    successor: Callable[[], BatchedLayer | None] = staticmethod(lambda: None)

    def start(self, batch: int, padding: Sequence[int] | None = None) -> None:
        """`CompressedLayer.start`; `padding` counts where nobody told it when the cache was made."""
        if self.left_padding is None and padding and any(padding):
            self.left_padding = list(padding)
        super().start(batch, self.left_padding)

    @classmethod
    def merge(cls, caches: Sequence[BatchedLayer]) -> BatchedLayer:
        """The sequences of `caches`, which stay as they are, in one batch that shares their arrays.

        Raises UsageError where their tokens are not coded and kept alike.
        """
        first, *others = (cache.begun() for cache in caches)
        for other in others:
            first.extend(other)
        caches[0].successor = weakref.ref(first)
        return first

    def begun(self) -> BatchedLayer:
        """A cache of the same sequences that goes on by itself: of one where none has a token, or as many as were told."""
        self.commit()
        new = copy.copy(self)
        new.store, new.taken = self.store.share(), {}
        if not new.store.padding_groups:
            new.start(len(self.left_padding or [0]))
        return new

    def extend(self, other: BatchedLayer) -> None:
        """Put the sequences of `other` behind those of this batch."""
        mine, others = self.kept_alike(), other.kept_alike()
        different = ", ".join(f"{name} {mine[name]} and {others[name]}" for name in mine if mine[name] != others[name])
        if different:
            raise UsageError(
                f"Expected caches of one batch to be made with equal arguments, received {different}. Make them alike, or "
                "generate in two batches."
            )
        self.commit()
        other.commit()
        self.store.extend(other.store)
        self.read_padding()

    def kept_alike(self) -> dict:
        """What caches of one batch have in common."""
        dropping = ("budget", "protect", "mode", "every", "wavelet")
        return {
            "plan": self.plan.hash,
            "scorer": self.plan.method.scorer,
            **{name: getattr(self, name) for name in ("sinks", "window", "working_set")},
            **{name: getattr(self.eviction, name, None) for name in dropping},
        }

    def extract(self, idx: int) -> BatchedLayer:
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

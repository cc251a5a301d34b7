"""Dropping tokens: how many a cache may hold, whom it asks which ones matter, and when.

A token budget counts every stored token, sinks and window included, and is never exceeded once a call has ended. A
prompt is cut to the budget as it comes in. Afterwards tokens go in batches, so that they are scored once in `every`
steps and not at each one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..codecs.chunk import Chunk
from ..errors import UsageError
from ..planning.budget import CHUNK_TOKENS, WAITING
from ..planning.cache_plan import CachePlan
from ..planning.plan import Plan, needed
from ..scorers import Scorer, Tokens, get_scorer
from ..scorers.selection import MODES, select
from .padding_group import PaddingGroup

EVERY = 64


def fixed_tokens(coded: bool, sinks: int, window: int, protect: Sequence[tuple[int, int]]) -> int:
    """Tokens that cannot be dropped once all of them are there; `coded`: whether the others are."""
    last, covered = sinks, 0  # of protected tokens those that are no sinks, each once
    for start, end in sorted(protect):
        covered += max(end - max(start, last), 0)
        last = max(last, end)
    blocks = (
        2 * WAITING * len(protect) if coded else 0
    )  # a block is kept for the sake of one token, at both ends of a span
    waits = WAITING if coded else 0
    return sinks + window + waits + blocks + covered


def check_budget(budget: int, coded: bool, sinks: int, window: int, protect: Sequence[tuple[int, int]]) -> None:
    """Raise UsageError unless a `budget` in tokens leaves some to choose among."""
    fixed = fixed_tokens(coded, sinks, window, protect)
    if budget <= fixed:
        raise UsageError(
            f"Expected budget_tokens above {fixed}, which {sinks} sinks, a window of {window} and what is protected take, "
            f"received {budget}. Raise it, or lower the sinks or the window."
        )


@dataclass
class Eviction:
    """What all layers of one cache share: the budget in tokens, and what is never dropped.

    protect: spans (start, end) of positions, padding not counted, that stay. mode: `per_layer_per_head`, every KV head of
    every layer keeps its own tokens; `per_head`, a head keeps the same ones in all layers, by the mean of their scores,
    which holds the whole prompt until the last layer has read it. every: generated tokens between two evictions, where the
    budget leaves that much room; fewer of them are kept in between. wavelet: the filters of a wavelet scorer, None for
    its own.
    """

    plan: Plan | CachePlan
    budget: int
    sinks: int
    window: int
    protect: tuple[tuple[int, int], ...] = ()
    mode: str = MODES[0]
    every: int = EVERY
    wavelet: str | None = None
    agreed: dict = field(default_factory=dict, repr=False)  # blocks that stay in all layers, by sequences
    waiting: list = field(default_factory=list, repr=False)  # per_head: layers that the others of a call will follow

    def __post_init__(self):
        if self.mode not in MODES:
            raise UsageError(f"Expected a selection among {', '.join(MODES)}, received {self.mode!r}.")
        check_budget(self.budget, self.coded, self.sinks, self.window, self.protect)

    def __deepcopy__(self, memo) -> Eviction:
        """One for all layers of a copied cache, as the original has."""
        made = Eviction(
            self.plan, self.budget, self.sinks, self.window, self.protect, self.mode, self.every, self.wavelet
        )
        return memo.setdefault(id(self), made)

    @cached_property
    def fixed(self) -> int:
        """Tokens that cannot be dropped once all of them are there."""
        return fixed_tokens(self.coded, self.sinks, self.window, self.protect)

    @property
    def coded(self) -> bool:
        return self.plan.method.compresses

    @property
    def target(self) -> int:
        """Tokens left when generated ones exceed the budget."""
        return self.budget - min(self.every, (self.budget - self.fixed) // 2)

    @property
    def scorer(self) -> Scorer:
        return get_scorer(needed(self.plan.method.scorer))

    @property
    def shares_tokens(self) -> bool:
        """Whether the heads of a layer keep the same tokens, because they are coded together."""
        return self.plan.method.shares_tokens

    def spans(self, seen: int) -> list[tuple[int, int]]:
        """The protected spans in a text of `seen` tokens."""
        return [(start, min(end, seen)) for start, end in self.protect if start < seen]

    def scores(self, xp, layer_group: int, keys, values, positions, now: int, recent=None):
        """How much every stored token of `layer_group` matters: [B, H, T] float32, H 1 where heads share.

        `keys`, `values` [B, H, T, D] after RoPE; `positions` NumPy [B, H, T] or [T]; `now`: of the last token; `recent`
        [B, Hq, L, D]: queries of the last L tokens times the attention scale, where there are any.
        """
        statistics = self.plan.query_statistics(layer_group)
        tokens = Tokens(
            xp,
            keys,
            values,
            positions,
            now,
            self.plan.shape.common_rope(self.plan.layer_groups[layer_group]),
            recent=recent,
            **statistics,
        )
        options: dict[str, int | str] = {"seed": layer_group} if self.scorer.name == "random" else {}
        if self.wavelet is not None:
            options["wavelet"] = self.wavelet
        scores = self.scorer(tokens, **options)
        return xp.mean(scores, axis=1, keepdims=True) if self.shares_tokens else scores

    def cut(self, layer_group: int, group: PaddingGroup, prompt: bool, recent) -> None:
        """Bring `group` of `layer_group` within the budget; after generated tokens with room for those that come.

        `recent`: see `scores`; None where nothing attended.
        """
        if group.stored <= self.budget:
            return
        target = self.budget if prompt else self.target
        scores, places = self._scored(layer_group, group, recent)
        if self.mode == "per_layer_per_head":
            self._drop(layer_group, group, scores, places, target)
            return
        self.waiting = [
            entry for entry in self.waiting if (entry[0], entry[1].sequences) != (layer_group, group.sequences)
        ]
        self.waiting.append((layer_group, group, scores, places))
        layers = [entry for entry in self.waiting if entry[1].sequences == group.sequences]
        if len(layers) < len(self.plan.layer_groups):
            return
        xp = group.storage.xp
        mean = xp.mean(xp.stack([entry[2] for entry in layers]), axis=0)
        self.waiting = [entry for entry in self.waiting if entry[1].sequences != group.sequences]
        for its_layer_group, its_group, _, its_places in layers:
            self._drop(its_layer_group, its_group, mean, its_places, target)

    def _scored(self, layer_group: int, group: PaddingGroup, recent):
        """Scores [b, H or 1, stored] of all tokens of `group`, and their positions, NumPy: sinks, sealed ones, the rest."""
        xp = group.storage.xp
        keys, values = group.dense(xp.float32)
        places = group.all_places()
        everywhere = np.broadcast_to(places, keys.shape[:3])
        scores = self.scores(xp, layer_group, keys, values, everywhere, group.seen - 1, recent)
        return scores, np.broadcast_to(places, scores.shape)

    def _drop(self, layer_group: int, group: PaddingGroup, scores, places: np.ndarray, target: int) -> None:
        """Keep the `target` best tokens of every head; of sealed ones whole blocks, as many in every head."""
        xp, before = group.storage.xp, group.stored
        spans, fixed = self.spans(group.seen), (self.sinks, self.window)
        start, sealed = group.sinks, group.sealed
        now = group.places()
        if sealed:
            best = xp.to_numpy(select(xp, scores, target, *fixed, spans, places))
            inside = float(((best >= start) & (best < start + sealed)).sum(-1).mean())
            block = group.storage.codec.block
            sequences, blocks = tuple(group.sequences), max(int(inside // block), (target - group.exact) // block)
            if self.agreed.get(sequences, (None,))[0] != (group.seen, group.stored) or layer_group == 0:
                self.agreed[sequences] = (group.seen, group.stored), blocks
            blocks = self.agreed[sequences][1]
            group.decoded = {}
            group.chunks = self._best_blocks(
                group, scores[:, :, start : start + sealed], places[:, :, start : start + sealed], spans, blocks
            )
            target = min(target - group.sealed, group.exact)
            scores = xp.concat([scores[:, :, :start], scores[:, :, start + sealed :]], axis=2)
            places = np.concatenate([places[:, :, :start], places[:, :, start + sealed :]], axis=2)
        group.positions = now + xp.zeros((*scores.shape[:2], 1), dtype=xp.int32, like=scores)
        if target < group.exact:
            index = select(xp, scores, target, *fixed, spans, places)
            group.positions = xp.take_along_axis(group.positions, index, axis=2)
            group.exact_keys = xp.take_along_axis(group.exact_keys, index[..., None], axis=2)
            group.exact_values = xp.take_along_axis(group.exact_values, index[..., None], axis=2)
        group.dropped += before - group.stored

    def _best_blocks(self, group: PaddingGroup, scores, places: np.ndarray, spans, count: int) -> list[Chunk]:
        """The chunks of `group` with the `count` best blocks of every head, and at least those with protected tokens."""
        xp, codec = group.storage.xp, group.storage.codec
        block = codec.block
        scores = xp.mean(scores.reshape(*scores.shape[:2], -1, block), axis=-1)
        if spans:
            inside = np.zeros(places.shape, bool)
            for start, end in spans:
                inside |= (places >= start) & (places < end)
            protected = inside.reshape(*places.shape[:2], -1, block).any(axis=-1)
            count = max(count, int(protected.sum(-1).max()))
            scores = xp.where(xp.asarray(protected, like=scores), 3e38, scores)
        if not count:
            return []
        return codec.keep(group.chunks, select(xp, scores, count, 0, 0), CHUNK_TOKENS)

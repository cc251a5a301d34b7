"""The live cache of one attention layer, or of layers coded together: a batch of padding groups.

Left padding is never stored, so every sequence of a batch has its own sinks and block alignment and comes out as if it
were alone. A cache with an `Eviction` holds no more tokens than its budget and knows the positions of those that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace

import numpy as np

from ..codecs.chunk import join_layers
from ..errors import UsageError
from ..profile.store import warn_once
from .eviction import Eviction
from .key_means import KeyMeans
from .padding_group import LATENT_QUERIES, PaddingGroup, Storage

RECENT = 64  # queries of a call that scorers may look at


class LayerCache:
    """Keys and values of one layer, or of all layers of a layer group that are coded together: heads are then
    those of the first layer, then of the next. Such layers attend one after the other, each to its own heads, and their
    tokens enter together, with those of the last. `codec` None keeps everything exact.

    sinks, window: first and last tokens kept exactly. Further ones, up to 15 or one less than the codec's block, wait
    until their block is full.
    staging: makes a codec of the same layer, at more bits, that holds what further calls of more than `LATENT_QUERIES`
    tokens bring until the prompt ends: `finalize`, or the first call with fewer; None: the plan's own holds it.
    eviction: which tokens of `layer_group` are dropped; a prompt then stays exact, cut to the budget, until it ends.
    working_set: bytes of decoded chunks that may stay, so that a step does not decode them again.
    key_means: looks at the first keys, for a method that suffers from large means.
    context: tokens that the model was made for, where this layer is the one to say that there are more.
    """

    context: int | None = None

    def __init__(
        self,
        xp,
        codec,
        sinks: int,
        window: int,
        staging=None,
        eviction: Eviction | None = None,
        layer_group: int = 0,
        working_set: int = 0,
        key_means: KeyMeans | None = None,
    ):
        self.storage = Storage(
            xp, codec, sinks, window, staging, adapts=eviction is None
        )  # blocks that are dropped are plain
        self.xp, self.codec, self.sinks, self.window = xp, codec, sinks, window
        self.eviction, self.layer_group, self.working_set = eviction, layer_group, working_set
        self.layers, self.key_means = self.storage.layers, key_means
        self._arrived: list[tuple] = []  # of the group's first layers, until its last is there
        self.padding_groups: list[PaddingGroup] = []
        self.seen = 0  # slots seen, padding included

    def __deepcopy__(self, memo) -> LayerCache:
        """An independent cache of the same codec; arrays are never changed in place, so both share them."""
        new = self.share()
        new.eviction = deepcopy(self.eviction, memo)
        return new

    def share(self) -> LayerCache:
        """`__deepcopy__` with the same eviction, which all layers of a cache share: for caches that run in turn."""
        new = copy(self)
        new._arrived = list(self._arrived)
        new.padding_groups = [group.copy() for group in self.padding_groups]
        return new

    def start(self, batch: int, padding=None) -> None:
        """Open the padding groups of an empty cache for `batch` sequences; `padding` [batch] counts left padding in slots."""
        pads = [0] * batch if padding is None else [int(p) for p in padding]
        if len(pads) != batch:
            raise UsageError(f"Expected left padding for {batch} rows, received {len(pads)} numbers.")
        self.padding_groups = []
        self._open_groups(range(batch), pads)

    def repad(self, padding: list[int]) -> None:
        """Left padding [batch] in slots, of which a call that ended inside it has told only a part."""
        empty = [i for group in self.padding_groups if not group.seen for i in group.sequences]
        self.padding_groups = [group for group in self.padding_groups if group.seen]
        self._open_groups(empty, padding)

    def open_group(self, sequences: list[int], pad: int, **held) -> PaddingGroup:
        """One more padding group, of the `sequences` of the batch; `held`: what it holds already."""
        self.padding_groups.append(PaddingGroup(self.storage, sequences, pad, **held))
        return self.padding_groups[-1]

    def _open_groups(self, sequences: Sequence[int], padding: list[int]) -> None:
        for pad in sorted({padding[i] for i in sequences}):
            self.open_group([i for i in sequences if padding[i] == pad], pad)

    @property
    def batch(self) -> int:
        """Sequences of the batch."""
        return sum(len(group.sequences) for group in self.padding_groups)

    @property
    def padding(self) -> list[int]:
        """Left padding of every sequence of the batch, in slots."""
        return [pad for _, pad in sorted((row, group.pad) for group in self.padding_groups for row in group.sequences)]

    @property
    def awaits_tokens(self) -> bool:
        """Whether some sequence has no token yet, so that its left padding is still to be told."""
        return not self.padding_groups or any(not group.exact for group in self.padding_groups)

    def attend(self, queries, keys, values, scale: float, fused, layer: int = 0, sinks=None):
        """Append L tokens and attend to everything up to each of them.

        `queries` [B, Hq, L, D], `keys`, `values` [B, H, L, D] of layer number `layer` of the group; `fused(q, k, v, scale)`
        is the host's dense attention for L queries at the end of k, causal, in any dtype. Returns [B, Hq, L, D] in the
        dtype of `queries`. `sinks` [Hq]: logits that take a share of the softmax and have no value; `fused` must know them
        too. Raises UsageError for layers out of order.
        """
        if not self.padding_groups:
            self.start(keys.shape[0])
        self.begin(keys.shape[2])
        entering, alone = self._arrive(keys, values, layer), self.layers == 1
        outputs = []
        for group in self.padding_groups:
            q, k, v = (self._sliced(group, x) for x in (queries, keys, values))
            if not q.shape[2]:
                outputs.append(self.xp.zeros(self._take(group, queries).shape, dtype=queries.dtype, like=queries))
                continue
            out, joined = group.attend(q, k, v, scale, fused, layer, self._working_set_of(group, layer), sinks)
            if entering:
                recent = q[:, :, -RECENT:] * scale if self.eviction else None
                if not alone:
                    k, v = (self._sliced(group, x) for x in entering)
                self._enter(group, k, v, recent, joined if alone else None)
            slots = queries.shape[2]
            outputs.append(self._padded(out, slots, slots - group.slots(self.seen, slots)[1]))
        if entering:
            self.seen += keys.shape[2]
        return self._join(outputs)

    def append(self, keys, values, layer: int | None = None) -> None:
        """Append L tokens without attending: [B, layers * H, L, D] of all layers, or [B, H, L, D] of one as in `attend`."""
        if not self.padding_groups:
            self.start(keys.shape[0])
        self.begin(keys.shape[2])
        entering = (keys, values) if layer is None else self._arrive(keys, values, layer)
        if not entering:
            return
        for group in self.padding_groups:
            k, v = (self._sliced(group, x) for x in entering)
            if k.shape[2]:
                self._enter(group, k, v)
        self.seen += keys.shape[2]

    def _arrive(self, keys, values, layer: int) -> tuple | None:
        """Keys and values of all layers of the group once those of its last are here, else None."""
        if layer == 0:
            self._arrived = []  # of a call that was broken off
        if layer != len(self._arrived):
            raise UsageError(
                f"Expected layer number {len(self._arrived)} of those that are coded together, received number {layer}: the "
                "model must call its layers in their order. Choose a method that codes every layer alone."
            )
        self._arrived.append((keys, values))
        if len(self._arrived) < self.layers:
            return None
        arrived, self._arrived = self._arrived, []
        return join_layers(self.xp, arrived)

    def _enter(self, group: PaddingGroup, k, v, recent=None, joined: tuple | None = None) -> None:
        """Let `k` and `v` enter `group`, which may have `joined` them already, seal what is ready, drop what is too much."""
        if self.key_means and self.key_means.saw(self.xp, k, group.seen):
            self.key_means = None
        prompt = self._is_prompt(k.shape[2])
        # the first call is encoded for good: most prompts come in one, and nothing was attended to with an error yet
        staged = prompt and group.exact > 0
        group.append(k, v, joined)
        if self.eviction is None:
            group.seal(staged)
        else:
            if not prompt:
                group.seal()
            self.eviction.cut(self.layer_group, group, prompt, recent)
        group.own(k, v)

    def begin(self, slots: int) -> bool:
        """End the prompts that a call of so many `slots` cannot go on with; returns whether one was staged.

        A sequence without a token in the call is left as it is.
        """
        if self.context is not None and self.seen + slots > self.context:
            warn_once(
                f"The cache holds more tokens than the {self.context:,} that its model was made for: expect answers that get "
                "worse. Take a model with a longer context, or start a new cache.",
                str(self.context),
            )
            self.context = None
        ended = False
        for group in self.padding_groups:
            start, stop = group.slots(self.seen, slots)
            if start < stop and not self._is_prompt(stop - start):
                ended = ended or self._is_staged(group)
                self._end_prompt(group)
        return ended

    def _is_prompt(self, tokens: int) -> bool:
        """Whether a call with so many `tokens` of a sequence may go on with a prompt that is staged."""
        return bool(self.storage.make_staging or self.eviction) and tokens > LATENT_QUERIES

    def finalize(self) -> None:
        """End the prompt: what was staged is encoded at the plan's bits, chunk by chunk."""
        for group in self.padding_groups:
            self._end_prompt(group)

    def _end_prompt(self, group: PaddingGroup) -> None:
        if self.eviction:
            group.seal()
        else:
            group.finalize()

    @property
    def staging(self):
        """The codec that holds a prompt."""
        return self.storage.staging

    @property
    def is_staged(self) -> bool:
        """Whether a prompt is held at more bits than the plan has, until it ends."""
        return any(self._is_staged(group) for group in self.padding_groups)

    def _is_staged(self, group: PaddingGroup) -> bool:
        return bool(group.staged or (self.eviction and group.ready))

    @property
    def has_dropped(self) -> bool:
        """Whether any token is no longer there."""
        return any(group.dropped for group in self.padding_groups)

    def check_complete(self) -> None:
        """Raise UsageError when some tokens are no longer there: what is left is not a prompt."""
        if self.has_dropped:
            raise UsageError(
                "Expected a cache that holds every token, received one that has dropped some. Read the prompt again."
            )

    @property
    def slots(self) -> int:
        """Slots that `dense` gives back: all that were seen, or as many as the fullest rows hold once some were dropped."""
        return max(group.stored for group in self.padding_groups) if self.has_dropped else self.seen

    def positions(self, row: int = 0) -> np.ndarray | None:
        """Positions [H or 1, stored] of the tokens that row `row` of the batch holds, in the order of `dense`, padding not
        counted; None where nothing was dropped."""
        (group,) = (group for group in self.padding_groups if row in group.sequences)
        return group.all_places()[group.sequences.index(row)] if group.dropped else None

    def dense(self, dtype=None):
        """Keys and values [B, layers * H, slots, D] of everything held, decoded; padded slots are zero. None when empty.

        Raises UsageError where dropped tokens have left rows of a batch with more tokens than others.
        """
        if self.has_dropped and len({group.stored for group in self.padding_groups}) > 1:
            raise UsageError(
                "Expected rows of a batch that hold equally many tokens, received others after tokens were dropped: only "
                "spectralkv's own attention can attend to them. Give the model no other attention, or no left padding."
            )
        like = next((group.exact_keys for group in self.padding_groups if group.exact_keys is not None), None)
        if like is None:
            return None
        sides: tuple[list, list] = ([], [])
        dtype = dtype or like.dtype
        for group in self.padding_groups:
            if group.exact_keys is not None:
                held = group.dense(dtype)
            else:  # only padding so far
                size = len(group.sequences), like.shape[1], 0, like.shape[3]
                held = 2 * (self.xp.zeros(size, dtype=dtype, like=like),)
            behind = 0 if group.end is None or self.has_dropped else max(self.seen - group.end, 0)
            for side, x in zip(sides, held):
                side.append(self._padded(x, self.slots, behind))
        return self._join(sides[0]), self._join(sides[1])

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; a sealed block that the cut splits is decoded back into the window.

        Raises UsageError for more than the recent window once tokens before it were dropped.
        """
        self.finalize()
        tokens = min(int(tokens), self.seen)
        recent = min((group.recent() for group in self.padding_groups), default=0)
        if self.has_dropped and recent < tokens < self.seen:
            raise UsageError(
                f"Expected at most {recent} tokens to forget, as tokens before the recent window were dropped, received "
                f"{tokens}. Start again with an empty cache."
            )
        self.seen -= tokens
        if not self.seen:
            self.padding_groups = []
        for group in self.padding_groups:
            group.crop(tokens)

    def select(self, rows) -> None:
        """Make the batch out of the old rows `rows` (ints, in the new order, repeats allowed)."""
        rows, batch = [int(r) for r in rows], self.batch
        if not all(0 <= r < batch for r in rows):
            raise UsageError(f"Expected rows between 0 and {batch - 1}, received {rows}.")
        selected = []
        for group in self.padding_groups:
            new = [i for i, old in enumerate(rows) if old in group.sequences]
            if new:
                selected.append(group.select([group.sequences.index(rows[i]) for i in new], new))
        self.padding_groups = selected

    def strip(self) -> None:
        """Forget the left padding that all rows have."""
        surplus = min(self.padding, default=0)
        for group in self.padding_groups:
            group.shift(-surplus)
        self.seen -= surplus

    def extend(self, other: LayerCache) -> None:
        """Put the rows of `other`, a cache of the same plan, behind those of this one; both share their arrays."""
        batch, seen = self.batch, max(self.seen, other.seen)
        for group in self.padding_groups:
            group.shift(seen - self.seen)
        for group in other.padding_groups:
            rows = [batch + row for row in group.sequences]
            moved = replace(group.copy(), storage=self.storage, sequences=rows, decoded={})
            moved.shift(seen - other.seen)
            self.padding_groups.append(moved)
        self.seen = seen
        self.repad(self.padding)  # rows without a token need no groups of their own

    def extract(self, row: int) -> LayerCache:
        """Row `row` alone, without padding, in a cache that goes on by itself."""
        new = self.share()
        new.select([row])
        (group,) = new.padding_groups
        group.pad, group.end, new.seen = 0, None, group.seen
        return new

    def expect(self, lengths: Sequence[int]) -> None:
        """Tell how many slots [batch] of what comes are no padding on the right, until `settle`."""
        split = []
        for group in self.padding_groups:
            for length in sorted({lengths[row] for row in group.sequences}):
                places = [i for i, row in enumerate(group.sequences) if lengths[row] == length]
                split.append(group.select(places, [group.sequences[i] for i in places]))
                split[-1].end = self.seen + length
        self.padding_groups = split

    def settle(self) -> None:
        """Move the padding on the right, which nothing is stored of, to the left."""
        for group in self.padding_groups:
            if group.end is not None:
                group.pad += max(self.seen - group.end, 0)
                group.end = None
        self.repad(self.padding)

    @property
    def expects_padding(self) -> bool:
        """Whether what comes may have padding on the right."""
        return any(group.end is not None for group in self.padding_groups)

    def arrays(self) -> list:
        """Every array held for the sequences."""
        return self.state_arrays() + [x for group in self.padding_groups for x in group.decoded_arrays()]

    def state_arrays(self) -> list:
        """`arrays` without what others of them decode to."""
        return [x for group in self.padding_groups for x in group.state_arrays()]

    def tables(self) -> list:
        """Every array that all sequences share."""
        return self.storage.tables()

    def tokens(self) -> int:
        """Tokens seen, dropped ones included, summed over the rows, padding not counted."""
        return sum(group.seen * len(group.sequences) for group in self.padding_groups)

    def _working_set_of(self, group: PaddingGroup, layer: int) -> int | None:
        """Bytes of decoded chunks of `layer` that may stay in `group`; None for a cache that lets none stay."""
        if not self.working_set:
            return None
        others = [other for other in self.padding_groups if other is not group]
        taken = sum(x.nbytes for other in others for x in other.decoded_arrays(layer))
        return self.working_set // self.layers - taken

    def _take(self, group: PaddingGroup, x):
        if len(group.sequences) == x.shape[0]:
            return x
        return self.xp.take(x, self.xp.asarray(np.array(group.sequences, np.int32), like=x), axis=0)

    def _sliced(self, group: PaddingGroup, x):
        """The sequences of a group, without the slots of `x` that are padding for it."""
        slots = x.shape[2]
        start, stop = group.slots(self.seen, slots)
        x = self._take(group, x)
        return x[:, :, start:stop] if stop - start < slots else x

    def _padded(self, x, slots: int, behind: int = 0):
        """`x` [b, H, T, D] with so many zeros `behind` and others before, so that it has so many `slots`."""
        before = slots - behind - x.shape[2]
        blanks = [self.xp.zeros((*x.shape[:2], n, x.shape[3]), dtype=x.dtype, like=x) for n in (before, behind)]
        return self.xp.concat([blanks[0], x, blanks[1]], axis=2) if before or behind else x

    def _join(self, parts: list):
        """The batch, in its order, of what every group gave."""
        if len(parts) == 1:
            return parts[0]
        order = np.argsort([row for group in self.padding_groups for row in group.sequences]).astype(np.int32)
        joined = self.xp.concat(parts, axis=0)
        return self.xp.take(joined, self.xp.asarray(order, like=joined), axis=0)

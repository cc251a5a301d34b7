"""The live cache of one attention layer, or of layers coded together: exact sinks, sealed chunks of packed codes, an
exact recent window.

Rows of a batch that start at the same slot form a *group* and are stored and attended together; left padding is never
stored, so every row has its own sinks and block alignment and comes out as if it were alone. A cache with an `Eviction`
holds no more tokens than its budget and knows the positions of those that are left.
"""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import replace

import numpy as np

from ..arrays import attention
from ..codecs.base import Codec
from ..codecs.chunk import Chunk, decoded, join_layers, select_sequences, split_by_chunk, split_layers
from ..errors import UsageError
from ..planning.budget import SEAL
from . import decoded_chunks as working_set
from .eviction import Eviction
from .padding_group import PaddingGroup

RECENT = 64  # queries of a call that scorers may look at
LATENT_QUERIES = 16  # up to so many new tokens attend to the codes; more are a prefill and use the host's fused kernel
DENSE_TOKENS = 32768  # sealed tokens that may be decoded at once for such a call, where that saves small operations


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
    """

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
    ):
        self.xp, self.codec, self.sinks, self.window, self._make_staging = xp, codec, sinks, window, staging
        self.eviction, self.layer_group, self.working_set = eviction, layer_group, working_set
        self._staging = None
        self.layers = 1 if codec is None else codec.layers
        self._arrived: list[
            tuple
        ] = []  # keys and values of the group's first layers, until those of its last are there
        self.seal = SEAL if codec is None else max(SEAL, codec.block)  # tokens are sealed in multiples of this
        self.padding_groups: list[PaddingGroup] = []
        self.seen = 0  # slots seen, padding included

    def __deepcopy__(self, memo) -> LayerCache:
        """An independent cache of the same codec; arrays are never changed in place, so both share them."""
        new = copy(self)
        new._arrived = list(self._arrived)
        new.padding_groups = [
            replace(group, sequences=list(group.sequences), chunks=list(group.chunks), staged=list(group.staged))
            for group in self.padding_groups
        ]
        new.eviction = deepcopy(self.eviction, memo)
        return new

    def start(self, batch: int, padding=None) -> None:
        """Open the padding groups of an empty cache for `batch` rows; `padding` [batch] counts left padding in slots."""
        pads = [0] * batch if padding is None else [int(p) for p in padding]
        if len(pads) != batch:
            raise UsageError(f"Expected left padding for {batch} rows, received {len(pads)} numbers.")
        self.padding_groups = [
            PaddingGroup([i for i, p in enumerate(pads) if p == pad], pad) for pad in sorted(set(pads))
        ]

    def repad(self, padding: list[int]) -> None:
        """Left padding [batch] in slots, of which a call that ended inside it has told only a part."""
        empty = [i for group in self.padding_groups if not group.exact for i in group.sequences]
        self.padding_groups = [group for group in self.padding_groups if group.exact]
        self.padding_groups += [
            PaddingGroup([i for i in empty if padding[i] == p], p) for p in sorted({padding[i] for i in empty})
        ]

    @property
    def padding(self) -> list[int]:
        """Left padding of every row of the batch, in slots."""
        return [pad for _, pad in sorted((row, group.pad) for group in self.padding_groups for row in group.sequences)]

    def attend(self, queries, keys, values, scale: float, fused, layer: int = 0):
        """Append L tokens and attend to everything up to each of them.

        `queries` [B, Hq, L, D], `keys`, `values` [B, H, L, D] of layer number `layer` of the group; `fused(q, k, v, scale)`
        is the host's dense attention for L queries at the end of k, causal, in any dtype. Returns [B, Hq, L, D] in the
        dtype of `queries`. Raises UsageError for layers out of order.
        """
        if not self.padding_groups:
            self.start(keys.shape[0])
        prompt = self.begin(keys.shape[2])
        entering, alone = self._arrive(keys, values, layer), self.layers == 1
        outputs = []
        for group in self.padding_groups:
            q, k, v = (self._sliced(group, x) for x in (queries, keys, values))
            missing = queries.shape[2] - q.shape[2]
            if not q.shape[2]:
                outputs.append(self.xp.zeros(self._take(group, queries).shape, dtype=queries.dtype, like=queries))
                continue
            out, joined = self._attend_group(group, q, k, v, scale, fused, layer)
            if entering:
                recent = q[:, :, -RECENT:] * scale if self.eviction else None
                if not alone:
                    k, v = (self._sliced(group, x) for x in entering)
                self._append_group(group, k, v, prompt, recent, joined if alone else None)
            if missing:
                blank = self.xp.zeros((*out.shape[:2], missing, out.shape[3]), dtype=out.dtype, like=out)
                out = self.xp.concat([blank, out], axis=2)
            outputs.append(out)
        if entering:
            self.seen += keys.shape[2]
        return self._join(outputs)

    def append(self, keys, values, layer: int | None = None) -> None:
        """Append L tokens without attending: [B, layers * H, L, D] of all layers, or [B, H, L, D] of one as in `attend`."""
        if not self.padding_groups:
            self.start(keys.shape[0])
        prompt = self.begin(keys.shape[2])
        entering = (keys, values) if layer is None else self._arrive(keys, values, layer)
        if not entering:
            return
        for group in self.padding_groups:
            k, v = (self._sliced(group, x) for x in entering)
            if k.shape[2]:
                self._append_group(group, k, v, prompt)
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

    @property
    def staging(self):
        """The codec that holds a prompt; made when the first prompt goes on after one call."""
        if self._staging is None:
            self._staging = self._make_staging()
        return self._staging

    @property
    def is_staged(self) -> bool:
        """Whether a prompt is held at more bits than the plan has, until it ends."""
        return any(group.staged or (self.eviction and self._ready(group)) for group in self.padding_groups)

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
        return group.all_places(self.xp, self.sinks)[group.sequences.index(row)] if group.dropped else None

    def finalize(self) -> None:
        """End the prompt: what was staged is encoded at the plan's bits, chunk by chunk."""
        for group in self.padding_groups:
            if self.eviction:
                self._seal(group, staged=False)
                continue
            position = self.sinks + sum(chunk.tokens for chunk in group.chunks)
            for k, v in decoded(self.xp, self.staging, group.staged, self.xp.float32) if group.staged else ():
                group.chunks = self._sealed(self.codec, group.chunks, k, v, position)
                position += k.shape[2]
            group.staged = []

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
                held = self.dense_of(group, dtype)
            else:  # only padding so far
                size = len(group.sequences), like.shape[1], 0, like.shape[3]
                held = 2 * (self.xp.zeros(size, dtype=dtype, like=like),)
            for side, x in zip(sides, held):
                missing = self.slots - x.shape[2]
                if missing:
                    blank = self.xp.zeros((*x.shape[:2], missing, x.shape[3]), dtype=x.dtype, like=x)
                    x = self.xp.concat([blank, x], axis=2)
                side.append(x)
        return self._join(sides[0]), self._join(sides[1])

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens; a sealed block that the cut splits is decoded back into the window.

        Raises UsageError for more than the recent window once tokens before it were dropped.
        """
        self.finalize()
        tokens = min(int(tokens), self.seen)
        recent = min((group.recent(self.xp, self.window) for group in self.padding_groups), default=0)
        if self.has_dropped and recent < tokens < self.seen:
            raise UsageError(
                f"Expected at most {recent} tokens to forget, as tokens before the recent window were dropped, received "
                f"{tokens}. Start again with an empty cache."
            )
        self.seen -= tokens
        if not self.seen:
            self.padding_groups = []
            return
        for group in self.padding_groups:
            group.decoded = {}
            self._crop_group(group, tokens)

    def select(self, rows) -> None:
        """Make the batch out of the old rows `rows` (ints, in the new order, repeats allowed)."""
        rows, batch = [int(r) for r in rows], sum(len(group.sequences) for group in self.padding_groups)
        if not all(0 <= r < batch for r in rows):
            raise UsageError(f"Expected rows between 0 and {batch - 1}, received {rows}.")
        padding_groups = []
        for group in self.padding_groups:
            new = [i for i, old in enumerate(rows) if old in group.sequences]
            if not new:
                continue
            local = np.array([group.sequences.index(rows[i]) for i in new], np.int32)
            kept = PaddingGroup(new, group.pad, dropped=group.dropped)
            if group.exact_keys is not None:
                index = self.xp.asarray(local, like=group.exact_keys)
                kept.exact_keys = self.xp.take(group.exact_keys, index, axis=0)
                kept.exact_values = self.xp.take(group.exact_values, index, axis=0)
                kept.chunks = [select_sequences(self.xp, chunk, index) for chunk in group.chunks]
                kept.staged = [select_sequences(self.xp, chunk, index) for chunk in group.staged]
                if group.positions is not None:
                    kept.positions = self.xp.take(group.positions, index, axis=0)
            padding_groups.append(kept)
        self.padding_groups = padding_groups

    def arrays(self) -> list:
        """Every array held for the sequences."""
        return self.state_arrays() + [x for group in self.padding_groups for x in working_set.held(group)]

    def state_arrays(self) -> list:
        """`arrays` without what others of them decode to."""
        held = []
        for group in self.padding_groups:
            held += [x for x in (group.exact_keys, group.exact_values, group.positions) if x is not None]
            held += [a for chunk in (*group.chunks, *group.staged) for a in chunk.held]
        return held

    def tables(self) -> list:
        """Every array that all sequences share."""
        codecs = [codec for codec in (self.codec, self._staging) if codec is not None]
        return list({id(x): x for codec in codecs for x in codec.tables()}.values())

    def tokens(self) -> int:
        """Tokens seen, dropped ones included, summed over the rows, padding not counted."""
        return sum(group.seen * len(group.sequences) for group in self.padding_groups)

    def begin(self, tokens: int) -> bool:
        """Whether a call with so many `tokens` may go on with a prompt that is staged; ends the prompt if not."""
        if (self._make_staging or self.eviction) and tokens > LATENT_QUERIES:
            return True
        self.finalize()
        return False

    def _take(self, group: PaddingGroup, x):
        if len(group.sequences) == x.shape[0]:
            return x
        return self.xp.take(x, self.xp.asarray(np.array(group.sequences, np.int32), like=x), axis=0)

    def _sliced(self, group: PaddingGroup, x):
        """The rows of a group, without the slots of `x` that are padding for it."""
        skip = min(max(group.pad - self.seen, 0), x.shape[2])
        x = self._take(group, x)
        return x[:, :, skip:] if skip else x

    def _join(self, parts: list):
        if len(parts) == 1:
            return parts[0]
        order = np.argsort([row for group in self.padding_groups for row in group.sequences]).astype(np.int32)
        joined = self.xp.concat(parts, axis=0)
        return self.xp.take(joined, self.xp.asarray(order, like=joined), axis=0)

    def _attend_group(self, group: PaddingGroup, q, k, v, scale, fused, layer: int) -> tuple:
        """The output, and keys and values of the exact tokens with `k` and `v` behind them, or None where it took none."""
        xp = self.xp
        if not group.sealed:
            joined = self._joined(group, k, v, layer)
            return fused(q, *joined, scale), joined
        codec = self._of_layer(self.codec, layer)
        if q.shape[2] > LATENT_QUERIES:
            at_once = codec.decoder and group.sealed <= DENSE_TOKENS
            if not at_once and xp.kernels and xp.kernels.supports_partial_attention(q):
                return self._attend_blocks(group, q, k, v, scale, layer), None
            return fused(q, *self.dense_of(group, k.dtype, (k, v), layer), scale), None
        joined = self._joined(group, k, v, layer)
        if self.working_set:
            others = [other for other in self.padding_groups if other is not group]
            taken = sum(x.nbytes for other in others for x in working_set.held(other, layer))
            limit = self.working_set // self.layers - taken
            out = working_set.decode_step(codec, group, layer, limit, q, joined[0], joined[1], scale)
        else:
            out = codec.decode_step(group.chunks, q, joined[0], joined[1], scale)
        return out, joined

    def _of_layer(self, codec, layer: int | None):
        """What decodes for `layer` alone, or for all layers (None)."""
        return codec if layer is None or self.layers == 1 else codec.of_layers[layer]

    def _tiles(self, group: PaddingGroup, dtype, layer: int | None):
        """Keys and values [b, H, T, D] of what is sealed, in its order, of one layer or of all, decoded part by part."""
        if group.chunks:
            yield from decoded(self.xp, self._of_layer(self.codec, layer), group.chunks, dtype)
        if group.staged:
            yield from decoded(self.xp, self._of_layer(self.staging, layer), group.staged, dtype)

    def _exact(self, group: PaddingGroup, layer: int | None = None) -> tuple:
        """Exact keys and values [b, H, exact, D] of one layer, or of all (None)."""
        sides = group.exact_keys, group.exact_values
        return sides if layer is None or self.layers == 1 else split_layers(*sides, self.layers)[layer]

    def _joined(self, group: PaddingGroup, k, v, layer: int | None = None) -> tuple:
        """Keys and values of the exact tokens of `group`, with `k` and `v` behind them."""
        if not group.exact:
            return k, v
        return tuple(self.xp.concat(list(pair), axis=2) for pair in zip(self._exact(group, layer), (k, v)))

    def _attend_blocks(self, group: PaddingGroup, q, k, v, scale, layer: int):
        """Attention of many new tokens, with never more of the history decoded than `decoded` gives at a time."""
        xp, attend = self.xp, self.xp.kernels.partial_attention

        def partials():
            yield attend(q, k, v, scale, causal=True)
            if group.exact:  # no fused kernel takes 0 keys
                yield attend(q, *self._exact(group, layer), scale)
            for tile in self._tiles(group, q.dtype, layer):
                yield attend(q, *tile, scale)

        parts = partials()
        total = next(parts)
        xp.evaluate(*total)
        for part in parts:
            total = attention.add_partials(xp, total, part)
            xp.evaluate(*total)  # else all parts are there until the last one
        o, _, l = total
        return xp.astype((o / l).reshape(q.shape), q.dtype)

    def _append_group(self, group: PaddingGroup, k, v, prompt: bool, recent=None, joined: tuple | None = None) -> None:
        """Put `k` and `v` behind the exact tokens of `group`, which may be `_joined` already, and seal what is ready."""
        xp = self.xp
        # the first call is encoded for good: most prompts come in one, and nothing was attended to with an error yet
        staged = prompt and group.exact > 0
        group.exact_keys, group.exact_values = joined or self._joined(group, k, v)
        if self.eviction is None:
            self._seal(group, staged)
        else:
            if not prompt:
                self._seal(group, staged=False)
            self.eviction.cut(self, group, prompt, recent)
        if group.exact_keys is k:  # what came in may be a view of the projection of all heads
            group.exact_keys, group.exact_values = xp.copy(k), xp.copy(v)

    def _ready(self, group: PaddingGroup) -> int:
        """Exact tokens of `group` that lie before the window and fill blocks."""
        return 0 if self.codec is None else max(group.exact - self.sinks - self.window, 0) // self.seal * self.seal

    def _seal(self, group: PaddingGroup, staged: bool) -> None:
        xp, ready = self.xp, self._ready(group)
        if not ready:
            return
        stop = self.sinks + ready
        k, v = (x[:, :, self.sinks : stop] for x in (group.exact_keys, group.exact_values))
        if group.dropped:
            places = group.places(xp, self.sinks)
            position = places[:, :, self.sinks : stop]
            group.positions = xp.concat([places[:, :, : self.sinks], places[:, :, stop:]], axis=2)
        else:
            position = self.sinks + group.sealed
        if staged:
            group.staged = self._sealed(self.staging, group.staged, k, v, position)
        else:
            group.chunks = self._sealed(self.codec, group.chunks, k, v, position)
        for name in ("exact_keys", "exact_values"):
            x = getattr(group, name)
            setattr(group, name, xp.concat([x[:, :, : self.sinks], x[:, :, stop:]], axis=2))

    @staticmethod
    def _sealed(codec: Codec, chunks: list[Chunk], k, v, position) -> list[Chunk]:
        """`chunks` with the tokens of `k`, `v` [B, H, T, D] at `position` (see `Chunk`) behind them; the old list stays."""
        chunks, tokens, full = list(chunks), k.shape[2], codec.chunk_tokens

        def places(start: int, stop: int):
            return position + start if isinstance(position, int) else codec.xp.copy(position[:, :, start:stop])

        for run in range(0, tokens, codec.at_once or tokens):
            stop = min(run + (codec.at_once or tokens), tokens)
            codes = codec.choose(k[:, :, run:stop], v[:, :, run:stop], places(run, stop)) if codec.at_once else None
            growing = chunks[-1].tokens % full if chunks else 0
            for start, end in split_by_chunk(run, stop, growing, full):
                last = chunks.pop() if chunks and chunks[-1].tokens < full else None
                here = places(start, end)
                if codes is not None:
                    part = codes[:, :, (start - run) // codec.block : (end - run) // codec.block]
                    chunks.append(codec.seal(last, part, here))
                elif last is None:
                    chunks.append(codec.encode(k[:, :, start:end], v[:, :, start:end], here))
                else:
                    told = None if isinstance(here, int) else here
                    chunks.append(codec.append(last, k[:, :, start:end], v[:, :, start:end], told))
        return chunks

    def dense_of(self, group: PaddingGroup, dtype, new=(), layer: int | None = None) -> tuple:
        """Keys and values [b, H, stored, D] of a group, decoded: sinks, what is sealed, the rest, and those of `new` tokens.

        Of `layer` of the row, or of all its layers (None).
        """
        xp, sinks, exact = self.xp, min(self.sinks, group.exact), self._exact(group, layer)
        parts = [[x[:, :, :sinks]] for x in exact]
        for tile in self._tiles(group, dtype, layer):
            for side, x in zip(parts, tile):
                side.append(x)
        for side, x in zip(parts, exact):
            side.append(x[:, :, sinks:])
        for side, x in zip(parts, new):
            side.append(x)
        return tuple(xp.concat([xp.astype(x, dtype) for x in side], axis=2) for side in parts)

    def _crop_group(self, group: PaddingGroup, tokens: int) -> None:
        xp = self.xp
        keep = group.exact + group.sealed - tokens
        if keep <= 0:
            group.exact_keys = group.exact_values = group.positions = None
            group.chunks, group.dropped = [], 0
            return
        if group.dropped:
            group.positions = xp.copy(group.positions[:, :, : group.exact - tokens])
        recent = group.exact - min(self.sinks, group.exact)
        if not group.chunks or tokens <= recent:
            left = group.exact - tokens
            group.exact_keys, group.exact_values = (
                xp.copy(x[:, :, :left]) for x in (group.exact_keys, group.exact_values)
            )
            return
        sinks = [x[:, :, : min(self.sinks, keep)] for x in (group.exact_keys, group.exact_values)]
        left = max(keep - self.sinks, 0)
        chunks, tail = [], None
        for chunk in group.chunks:
            whole = min(left, chunk.tokens) // self.seal * self.seal
            if whole:
                chunks.append(chunk if whole == chunk.tokens else self.codec.cut(chunk, whole))
            if whole < min(left, chunk.tokens):
                tail = [xp.astype(x[:, :, whole:left], group.exact_keys.dtype) for x in self.codec.decode(chunk)]
            left -= min(left, chunk.tokens)
            if not left:
                break
        if tail:
            sinks = [xp.concat([a, b], axis=2) for a, b in zip(sinks, tail)]
        group.exact_keys, group.exact_values = xp.copy(sinks[0]), xp.copy(sinks[1])
        group.chunks = chunks

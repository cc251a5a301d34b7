"""Tiers: of every 64 tokens those that matter most get more bits, and nothing is dropped.

A scorer ranks the tokens of a group of `GROUP` for every KV head; each share of the ranking goes to a codec of its own, in
the order of the text. Which tier a token is in is stored, a bit for two tiers. Attention does not mind the order of tokens:
the tiers are partial softmaxes, merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from ..arrays import attention
from ..arrays.rope import unrotate
from ..errors import UsageError
from ..planning.methods import Method
from ..planning.plan import Plan, needed
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..profile.stored_profile import loaded
from ..quantization.packing import pack, unpack
from ..quantization.time_rounding import BlockScores
from ..scorers import get_scorer
from .base import Codec
from .chunk import Chunk
from .registry import make_plan
from .spectral import STAGING_BITS

GROUP = 64  # tokens that are ranked together


class TieredCodec(Codec):
    """Tokens <-> chunks of all tiers: packed tiers [B, H or 1, T / 8, bits], then the arrays of every tier's chunk."""

    block = GROUP

    def __init__(self, xp, plan: TieredPlan, layer_group: int, like=None):
        self.xp, self.rope, self.bits = xp, plan.rope(layer_group), max(len(plan.tiers) - 1, 1).bit_length()
        self.codecs = [tier.make_codec(xp, layer_group, like) for tier in plan.tiers]
        self.counts = [round(share * GROUP) for share in plan.shares]
        self.scores = BlockScores(xp, plan, layer_group, needed(plan.method.scorer), GROUP)
        self.shares_tokens = plan.method.group != "head"

    def encode(self, keys, values, start: int) -> Chunk:
        """A new chunk from T tokens, T a multiple of `GROUP`; raises UsageError on NaN or infinity."""
        tiers, places = self._ranked(keys, values, start)
        parts = [
            codec.encode(self._taken(keys, index), self._taken(values, index), index + start)
            for codec, index in zip(self.codecs, places)
        ]
        return self._joined(keys.shape[0], start, keys.shape[2], tiers, parts)

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own."""
        start = chunk.start + chunk.tokens
        tiers, places = self._ranked(keys, values, start)
        parts = [
            codec.append(old, self._taken(keys, index), self._taken(values, index), index + start)
            for codec, old, index in zip(self.codecs, self._parts(chunk), places)
        ]
        tiers = self.xp.concat([chunk.arrays[0], tiers], axis=2)
        return self._joined(chunk.batch, chunk.start, chunk.tokens + keys.shape[2], tiers, parts)

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`, a multiple of `GROUP`."""
        parts = [
            codec.cut(part, part.tokens * tokens // chunk.tokens)
            for codec, part in zip(self.codecs, self._parts(chunk))
        ]
        tiers = self.xp.copy(chunk.arrays[0][:, :, : tokens // 8])
        return self._joined(chunk.batch, chunk.start, tokens, tiers, parts)

    def decode(self, chunk: Chunk) -> tuple:
        """Keys and values [B, H, T, D] float32 of a chunk in the order of the text."""
        xp = self.xp
        parts = self._parts(chunk)
        order = xp.argsort(xp.concat([part.start for part in parts], axis=2), axis=-1)
        sides = zip(*(codec.decode(part) for codec, part in zip(self.codecs, parts)))
        return tuple(self._taken(xp.concat(list(side), axis=2), order) for side in sides)

    def attend(self, chunk: Chunk, queries, scale: float) -> tuple:
        """Partial softmax of grouped `queries` [B, H, M, D] float32 over a chunk."""
        partials = [codec.attend(part, queries, scale) for codec, part in zip(self.codecs, self._parts(chunk))]
        total = partials[0]
        for one in partials[1:]:
            total = attention.add_partials(self.xp, total, one)
        return total

    def tables(self) -> list:
        """Every array that all sequences share."""
        return list({id(x): x for codec in self.codecs for x in codec.tables()}.values())

    def _ranked(self, keys, values, start: int) -> tuple:
        """Packed tiers of T tokens, and the indices int32 [B, H or 1, T * share] of every tier's tokens, ascending."""
        xp, rope = self.xp, self.rope
        keys, values = xp.astype(keys, xp.float32), xp.astype(values, xp.float32)
        scores = self.scores(unrotate(xp, keys, rope, start) if rope else keys, values)
        if self.shares_tokens:
            scores = xp.mean(scores, axis=1, keepdims=True)
        scores = scores.reshape(*scores.shape[:2], -1, GROUP)
        rank = xp.argsort(xp.argsort(-scores, axis=-1), axis=-1)
        tiers = sum(xp.astype(rank >= first, xp.uint8) for first in np.cumsum(self.counts[:-1]).tolist())
        tiers = tiers.reshape(*scores.shape[:2], -1)
        return pack(xp, tiers, self.bits), self._places(tiers)

    def _places(self, tiers) -> list:
        """Indices int32 [B, H or 1, T * share] of the tokens in every tier, from tiers [B, H or 1, T]."""
        xp = self.xp
        groups = xp.argsort(tiers.reshape(*tiers.shape[:2], -1, GROUP), axis=-1)
        offsets = np.arange(groups.shape[2], dtype=np.int32)[:, None] * GROUP
        groups = xp.astype(groups, xp.int32) + xp.asarray(offsets, like=tiers)
        stops = np.cumsum(self.counts).tolist()
        return [
            groups[..., stop - count : stop].reshape(*tiers.shape[:2], -1) for stop, count in zip(stops, self.counts)
        ]

    def _taken(self, x, index):
        return self.xp.take_along_axis(x, index[..., None], axis=2)

    def _joined(self, batch: int, start: int, tokens: int, tiers, parts: list[Chunk]) -> Chunk:
        return Chunk(batch, start, tokens, (tiers, *(array for part in parts for array in part.arrays)))

    def _parts(self, chunk: Chunk) -> list[Chunk]:
        """The chunks of the tiers; their positions are made of `tiers`, not stored."""
        places = self._places(unpack(self.xp, chunk.arrays[0], self.bits, chunk.tokens))
        parts, first = [], 1
        for codec, index in zip(self.codecs, places):
            stop = first + 2 * len(codec.bits)
            parts.append(Chunk(chunk.batch, index + chunk.start, index.shape[2], chunk.arrays[first:stop]))
            first = stop
        return parts


@dataclass(frozen=True, eq=False)
class TieredPlan(Plan):
    """Plans of the tiers, best first, and their shares of the tokens."""

    CODEC = TieredCodec
    tiers: tuple[Plan, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def drops(self) -> bool:
        """Never: a scorer says bits."""
        return False

    @property
    def bits_per_element(self) -> float:
        """Average bits per element, which tier a token is in included."""
        heads = 1 if self.method.group != "head" else self.shape.kv_heads
        told = max(len(self.tiers) - 1, 1).bit_length() * heads / (2 * self.shape.kv_heads * self.shape.head_dim)
        return told + sum(share * tier.bits_per_element for share, tier in zip(self.shares, self.tiers))

    @cached_property
    def staging(self) -> Plan | None:
        method = replace(self.method, scorer=None, rounding="nearest")
        return None if self.bits >= STAGING_BITS else make_plan(self.shape, self.profile, method, STAGING_BITS)

    @property
    def remake(self) -> Callable[[Profile | None], Plan]:
        tiers = tuple((share, tier.bits) for share, tier in zip(self.shares, self.tiers))
        return partial(make_tiered_plan, self.shape, method=self.method, tiers=tiers)

    def decides(self) -> dict:
        hashes = "; ".join(f"{share} {tier.hash}" for share, tier in zip(self.shares, self.tiers))
        return {"tiers": np.frombuffer(hashes.encode(), np.uint8)}


def make_tiered_plan(
    shape: ModelShape, profile: Profile | None, method: Method, tiers: Sequence[tuple[float, float]]
) -> TieredPlan:
    """A plan of `tiers`, pairs (share of the tokens, bits), best tokens first, for a method SCORER+spectral or the like.

    Raises UsageError as `check_tiers`, and for bits that the method cannot reach.
    """
    check_tiers(method, tiers)
    shares, bits = tuple(float(share) for share, _ in tiers), [float(b) for _, b in tiers]
    plain, profile = replace(method, scorer=None), loaded(profile)
    plans = tuple(make_plan(shape, profile, plain, b) for b in bits)
    return TieredPlan(method, mean_bits(tuple(zip(shares, bits))), shape, profile=profile, tiers=plans, shares=shares)


def mean_bits(tiers: Sequence[tuple[float, float]]) -> float:
    """Average bits of `tiers`."""
    return sum(share * bits for share, bits in tiers)


def name_tiers(tiers: Sequence[tuple[float, float]]) -> str:
    """`tiers` as the command line takes them: SHARE:BITS, separated by commas."""
    return ",".join(f"{share:g}:{bits:g}" for share, bits in tiers)


def check_tiers(method: Method, tiers: Sequence[tuple[float, float]]) -> None:
    """Raise UsageError for a method without a scorer of keys or without latents, and shares that are no quarters of 1."""
    if method.scorer is None or not method.transforms:
        raise UsageError(
            f"Expected a scorer with spectral or spectral-dense for tiers, such as triattention+spectral, received "
            f"{method.name}."
        )
    if get_scorer(method.scorer).needs_recent:
        raise UsageError(f"Expected a scorer that looks at keys alone for tiers, {method.scorer} looks at queries.")
    try:
        shares = [float(share) for share, _ in tiers]
    except (TypeError, ValueError):
        shares = []
    whole = all(share > 0 and (share * GROUP) % 16 == 0 for share in shares)
    if not (whole and sum(shares) == 1 and len(shares) > 1):
        raise UsageError(
            f"Expected tiers (share, bits) with shares that are quarters and add up to 1, received {tiers!r}."
        )

"""What a caller may ask of a compressed cache: every option, its default, and which of them go together."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

from ..codecs.registry import bits_range, check_bits, make_plan, usable_method, with_zeros
from ..codecs.tiers import check_tiers, make_tiered_plan
from ..errors import UsageError
from ..planning.budget import SEAL, SINKS, WAITING, WINDOW, elements_per_token, whole_number
from ..planning.cache_plan import CachePlan, known_plan, profile_key
from ..planning.methods import DEFAULT_METHOD, Method, get_live_method, rounded_by
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..scorers import check_wavelet, get_scorer
from ..scorers.selection import MODES
from .decoded_chunks import check_working_set
from .eviction import EVERY, Eviction, check_budget

DROPS = ("budget_tokens", "protect", "selection", "evict_every", "wavelet")  # options of methods that drop tokens


@dataclass(frozen=True)
class CacheRequest:
    """The options of a compressed cache. A request that exists has been checked.

    method: name of a recipe, or the recipe itself.
    bits: average stored bits per sealed element, a ceiling; None for the method's own.
    budget_bytes, max_context: in place of bits, the bytes that a cache of so many tokens may take.
    window, sinks: last and first tokens that stay exact.
    budget_tokens: all tokens that stay stored, for a method that drops tokens; or budget_bytes.
    protect: spans (start, end) of positions that are never dropped.
    selection: who keeps the same tokens (`scorers.selection.MODES`).
    evict_every: generated tokens between two evictions.
    wavelet: filters of a wavelet scorer.
    tiers: pairs (share, bits) by rank, in place of dropping.
    rounding_scores: the scorer that weighs tokens when codes are rounded, or `nearest`.
    working_set: bytes that decoded chunks may take in all, for a method that decodes its history.
    windows: name of the method that codes layers with a sliding window; None leaves them to the host.

    None leaves a choice to the method. Raises UsageError, or TypeError for options that are wrong or do not go together:
    all that can be known without a model. What depends on its shape or its profile, `plan` says.
    """

    method: str | Method = DEFAULT_METHOD
    bits: float | None = None
    budget_bytes: int | None = None
    max_context: int | None = None
    window: int = WINDOW
    sinks: int = SINKS
    budget_tokens: int | None = None
    protect: Sequence[tuple[int, int]] = ()
    selection: str | None = None
    evict_every: int | None = None
    wavelet: str | None = None
    tiers: Sequence[tuple[float, float]] | None = None
    rounding_scores: str | None = None
    working_set: int = 0
    windows: str | None = None

    def __post_init__(self):
        for name in ("window", "sinks"):
            whole_number(name, getattr(self, name), 0)
        object.__setattr__(self, "bits", _as_number(self.bits))
        for name in ("bits", "budget_bytes"):
            _check_number(name, getattr(self, name))
        for name in ("max_context", "budget_tokens", "evict_every"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        object.__setattr__(self, "protect", _spans(self.protect))
        check_working_set(self.recipe, self.working_set)
        if self.selection is not None and self.selection not in MODES:
            raise UsageError(f"Expected a selection among {', '.join(MODES)}, received {self.selection!r}.")
        check_bits(self.recipe, self.bits)
        if self.windows is not None:
            self._check_windows()
        if self.tiers is not None:
            self._check_tiers(self.tiers)
            object.__setattr__(self, "tiers", tuple((float(share), float(bits)) for share, bits in self.tiers))
        elif self.recipe.scorer is None:
            self._check_keeping()
        else:
            self._check_dropping(self.recipe.scorer)

    @cached_property
    def recipe(self) -> Method:
        """The method, with the rounding that was asked for."""
        if not isinstance(self.method, (str, Method)):
            raise TypeError(f"Expected the name of a method, received a {type(self.method).__name__}.")
        return rounded_by(get_live_method(self.method), self.rounding_scores)

    @cached_property
    def window_recipe(self) -> Method:
        """The method of `windows`."""
        assert self.windows is not None, "asked for where it is given"
        return get_live_method(self.windows)

    def window_plan(self, shape: ModelShape, profile: Profile | None) -> CachePlan:
        """What the layers of `shape`, which have a sliding window, store."""
        method, bits = usable_method(self.window_recipe), self.bits
        return known_plan((profile_key(profile), method, shape, bits), lambda: make_plan(shape, profile, method, bits))

    def plan(
        self, shape: ModelShape, profile: Profile | None, element_bytes: int = 2, other_bytes: int = 0
    ) -> tuple[CachePlan, Eviction | None]:
        """What a cache of a model of this `shape` stores, and what it drops; None for a method that keeps every token.

        element_bytes: size of an exact element. other_bytes: what the layers that pass through need. Raises UsageError
        for bits out of range, a budget that is too small for what must stay, and a profile that does not fit.
        """
        method, sizes = usable_method(self.recipe), (element_bytes, other_bytes)
        key = profile_key(profile), method, shape
        if (tiers := self.tiers) is not None:
            return known_plan((*key, tiers), lambda: make_tiered_plan(shape, profile, method, tiers)), None
        bits = self.bits
        if method.scorer is not None or self.budget_bytes is None:
            bits = with_zeros(shape, method, bits)
        else:
            bits = self._bits_for_bytes(shape, method, *sizes)
        plan = known_plan((*key, bits), lambda: make_plan(shape, profile, method, bits))
        if method.scorer is None:
            return plan, None
        tokens = self.budget_tokens if self.budget_bytes is None else self._tokens_for_bytes(plan, *sizes)
        mode = self.selection or MODES[0]
        every = EVERY if self.evict_every is None else int(self.evict_every)
        kept = int(tokens or 0), int(self.sinks), int(self.window)
        return plan, Eviction(plan, *kept, tuple(self.protect), mode, every, self.wavelet)

    def _bits_for_bytes(self, shape: ModelShape, method: Method, element_bytes: int, other_bytes: int) -> float:
        """Bits per sealed element that keep a cache of `max_context` tokens within `budget_bytes`.

        Raises UsageError with the possible range.
        """
        assert self.budget_bytes is not None and self.max_context is not None, "__post_init__ sees to it"
        allowed, context, budget = bits_range(method, shape), self.max_context, self.budget_bytes
        waiting = max(SEAL, method.block) - 1  # tokens, at most, until their block is full
        exact = min(context, self.sinks + self.window + waiting)
        per_token = elements_per_token(shape)
        fixed = exact * per_token * element_bytes + other_bytes
        sealed = context - exact
        if sealed <= 0:
            raise UsageError(
                f"Expected a max_context above sinks + window + {waiting} = {exact} tokens for budget_bytes, received "
                f"{context}."
            )
        bits = (budget - fixed) * 8 / (sealed * per_token)
        if not bits >= allowed[0]:
            low = math.ceil(fixed + allowed[0] * sealed * per_token / 8)
            high = int(fixed + allowed[1] * sealed * per_token / 8)
            raise UsageError(
                f"Expected budget_bytes between {low:,} and {high:,} for {context:,} tokens with {self.sinks} sinks and a "
                f"window of {self.window}, received {budget:,}."
            )
        return min(bits, allowed[1])

    def _tokens_for_bytes(self, plan: CachePlan, element_bytes: int, other_bytes: int) -> int:
        """Tokens that a cache of `budget_bytes` may hold under `plan`, positions of kept tokens included."""
        assert self.budget_bytes is not None, "asked for where it is given"
        elements = elements_per_token(plan.shape)
        places = 4 * len(plan.shape.layers) * plan.shape.kv_heads
        exact = elements * element_bytes + places
        if not plan.method.compresses:
            return max(int((self.budget_bytes - other_bytes) // exact), 1)
        whole = self.sinks + self.window + WAITING
        left = self.budget_bytes - other_bytes - whole * exact
        return whole + max(int(left // (elements * plan.bits_per_element / 8 + places)), 0)

    def _given(self, *names: str) -> list[str]:
        """Those of the fields `names` that were given."""
        return [name for name in names if getattr(self, name) is not None and (name != "protect" or self.protect)]

    def _check_windows(self) -> None:
        """Raise UsageError for a method that cannot code a window."""
        if not isinstance(self.windows, str):
            raise TypeError(f"Expected the name of a method for windows, received a {type(self.windows).__name__}.")
        method = self.window_recipe
        if method.scorer is not None or method.group != "head" or not method.compresses:
            raise UsageError(
                f"Expected a method that codes every layer alone and drops no token for windows, received {method.name}. "
                "Take spectral."
            )
        if self.budget_bytes is not None:
            raise UsageError("Expected bits beside windows, received budget_bytes.")
        check_bits(method, self.bits)

    def _check_tiers(self, tiers) -> None:
        for name in self._given("bits", "budget_bytes", "max_context", *DROPS):
            raise UsageError(f"Expected tiers alone, which say bits and drop no token, received {name} too.")
        check_tiers(self.recipe, tiers)
        for _, bits in tiers:
            check_bits(self.recipe, float(bits))

    def _check_keeping(self) -> None:
        method = self.recipe
        for name in self._given(*DROPS):
            codec = f"+{method.name}" if method.can_drop else ""
            raise UsageError(
                f"Expected a method that drops tokens for {name}, {method.name} keeps every token. Take for example "
                f"wavelettriattention{codec}."
            )
        if self.budget_bytes is None:
            return
        if self.bits is not None:
            raise UsageError("Expected bits or budget_bytes, received both.")
        if self.max_context is None:
            raise UsageError("Expected max_context, the tokens that budget_bytes must hold, received none.")

    def _check_dropping(self, scorer: str) -> None:
        method = self.recipe
        if (self.budget_tokens is None) == (self.budget_bytes is None):
            raise UsageError(
                f"Expected either budget_tokens or budget_bytes for {method.name}, which drops tokens, received "
                f"{'none' if self.budget_tokens is None else 'both'}."
            )
        if self.budget_tokens is not None:
            check_budget(self.budget_tokens, method.compresses, self.sinks, self.window, self.protect)
        if self.wavelet is not None:
            check_wavelet(get_scorer(scorer), self.wavelet)


def _as_number(value):
    """`value`, as a number where it is a text that says one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_number(name: str, value) -> None:
    """Raise UsageError unless `value` is None or a number above 0."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
        raise UsageError(f"Expected {name} to be a number above 0, received {value!r}.")


def _spans(protect) -> tuple[tuple[int, int], ...]:
    """`protect` as a tuple of pairs of ints; raises UsageError for spans that are none."""
    try:
        spans = tuple((operator.index(start), operator.index(end)) for start, end in protect or ())
    except (TypeError, ValueError):
        spans = ((0, 0),)
    if not all(0 <= start < end for start, end in spans):
        raise UsageError(f"Expected protected spans (start, end) of positions with start < end, received {protect!r}.")
    return spans

"""What an evaluation measures: its settings, which have been checked, and the suites that preset some."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..codecs.registry import bits_range, check_bits
from ..codecs.tiers import check_tiers
from ..errors import UsageError
from ..planning.budget import SINKS, WAITING, WINDOW
from ..planning.methods import ROUNDINGS, Method, get_method
from ..scorers import check_wavelet, get_scorer
from .text import copy_span

# score what really follows; a span of the prefix, repeated; turns on one cache; a number hidden in the prefix
TASKS = ("text", "copy", "drift", "needle")
METRICS = ("kl", "aop", "reconstruction")
SUITES: dict[str, dict[str, Any]] = {
    "quick": {"prefixes": (1024,), "documents": 2, "scored": 64, "tasks": ("text", "copy"), "greedy": 32},
    "full": {"prefixes": (1024, 2048), "documents": 4, "scored": 128, "tasks": TASKS, "greedy": 128},
}
DEFAULT_BITS = (4.0, 3.0, 2.0)
DEFAULT_KEEP = (0.5, 0.25)

_LEAST = {  # tokens, documents or turns that a field of `Settings` has at least
    "prefixes": 2,  # a tokenizer's own first token, and one of the text
    "scored": 2,  # the first is predicted by the prefix alone
    "documents": 1,
    "step": 1,
    "prefill_chunk": 1,
    "window": 0,
    "sinks": 0,
    "greedy": 0,
    "turns": 1,
    "turn_tokens": 1,
}


@dataclass(frozen=True)
class Settings:
    """What to measure, in tokens: `prefixes` read, then `scored` tokens, `step` per model call.

    prefill_chunk: tokens per call of the prefix, through the compressed cache itself; None reads it in one call. metrics:
    `kl` is always measured. greedy: tokens generated after the prefix, in the task `text`. turns, turn_tokens: how often the
    task `drift` goes on with a piece of prompt, and how long that is. keep: shares of the prefix's tokens that methods
    which drop tokens keep, `DEFAULT_KEEP` unless told. wavelets: filters of wavelet scorers, one cache each; the scorer's
    own unless told. rounding_scores: whose scores weight the codec's rounding, one cache each; the method's own unless told.
    tiers: (share, bits) pairs, as in `make_prompt_cache`, for methods SCORER+METHOD, which then drop nothing.
    """

    methods: tuple[str, ...]
    bits: tuple[float, ...] = DEFAULT_BITS
    tasks: tuple[str, ...] = SUITES["quick"]["tasks"]
    metrics: tuple[str, ...] = METRICS
    prefixes: tuple[int, ...] = (1024,)
    scored: int = 64
    documents: int = 2
    step: int = 1
    prefill_chunk: int | None = None
    window: int = WINDOW
    sinks: int = SINKS
    greedy: int = 0
    turns: int = 5
    turn_tokens: int = 256
    keep: tuple[float, ...] = ()
    wavelets: tuple[str, ...] = ()
    rounding_scores: tuple[str, ...] = ()
    tiers: tuple[tuple[tuple[float, float], ...], ...] = ()

    def __post_init__(self):
        self._check_values()
        self._check_numbers()
        methods = [get_method(name) for name in self.methods]
        self._check_tasks(methods)
        self._check_tiers(methods)
        self._check_rounding(methods)
        self._check_wavelets(methods)
        self._check_bits(methods)
        self._check_keep([method for method in methods if drops_tokens(method)])

    @property
    def shares(self) -> tuple[float, ...]:
        """What methods that drop tokens keep; none where tiers alone are asked for."""
        return self.keep or (() if self.tiers else DEFAULT_KEEP)

    def _check_values(self) -> None:
        """Raise UsageError for an empty list that must not be, and for tasks and metrics that do not exist."""
        for name in ("methods", "tasks", "prefixes"):
            if not getattr(self, name):
                raise UsageError(f"Expected at least one value for `{name}`, received none.")
        for name, known in (("tasks", TASKS), ("metrics", METRICS)):
            for value in getattr(self, name):
                if value not in known:
                    raise UsageError(f"Expected `{name}` among {', '.join(known)}, received {value!r}.")

    def _check_numbers(self) -> None:
        """Raise UsageError for a number that is too small."""
        for bits in self.bits:
            if not (math.isfinite(bits) and bits > 0):
                raise UsageError(f"Expected `bits` above 0, received {bits:g}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if number < least:
                    raise UsageError(f"Expected `{name}` of at least {least}, received {number}.")

    def _check_tasks(self, methods: list[Method]) -> None:
        """Raise UsageError for a prefix that has no span to copy, and for the task `drift` alone without a live cache."""
        if "copy" in self.tasks:
            for prefix in self.prefixes:
                copy_span(prefix, self.scored, self.sinks, self.window)
        if self.tasks == ("drift",) and not any(method.live for method in methods):
            raise UsageError(
                f"Expected a method with a live cache for the task drift, received {', '.join(self.methods)}, for files."
            )

    def _check_tiers(self, methods: list[Method]) -> None:
        """Raise UsageError for `tiers` that a method cannot have, or that none takes."""
        dropping = [method for method in methods if drops_tokens(method)]
        for tiers, method in product(self.tiers, dropping):
            check_tiers(method, tiers)
        if self.tiers and not dropping:
            raise UsageError(
                f"Expected a method SCORER+METHOD for `tiers`, {', '.join(self.methods)} are none. Take for example "
                "triattention+spectral."
            )

    def _check_rounding(self, methods: list[Method]) -> None:
        """Raise UsageError for `rounding_scores` that do not exist, or that no method rounds by."""
        for scorer in self.rounding_scores:
            if scorer not in ROUNDINGS:
                raise UsageError(f"Expected `rounding_scores` among {', '.join(ROUNDINGS)}, received {scorer!r}.")
        if self.rounding_scores and not any(map(rounds, methods)):
            raise UsageError(
                f"Expected a method that rounds by scores for `rounding_scores`, {', '.join(self.methods)} do not."
            )

    def _check_wavelets(self, methods: list[Method]) -> None:
        """Raise UsageError for `wavelets` that do not exist, or that no method scores with."""
        wavy = [named for method in methods if (named := method.scorer) and has_wavelet(method)]
        if self.wavelets and not (wavy and self.shares):
            raise UsageError(
                f"Expected a method that drops tokens by a wavelet scorer for `wavelets`, {', '.join(self.methods)} "
                f"{'drop none with `tiers` alone' if wavy else 'do not'}."
            )
        for wavelet in self.wavelets:
            check_wavelet(get_scorer(wavy[0]), wavelet)

    def _check_bits(self, methods: list[Method]) -> None:
        """Raise UsageError where no method reaches any of the bits with any model: one that does is enough to go on."""
        reasons = []
        for method in methods:
            choices: list[tuple[float, ...]] = []
            if self.shares or not drops_tokens(method):
                low, high = bits_range(method)
                choices += [(bits,) for bits in (self.bits if low < high else (low,))]
            if drops_tokens(method):
                choices += [tuple(bits for _, bits in tiers) for tiers in self.tiers]
            for choice in choices:
                try:
                    for bits in choice:
                        check_bits(method, bits)
                    return
                except UsageError as error:
                    reasons.append(str(error))
        raise unreachable(self, reasons[-1])

    def _check_keep(self, dropping: list[Method]) -> None:
        """Raise UsageError for shares that leave nothing to choose, or that no method takes."""
        if self.keep and not dropping:
            raise UsageError(
                f"Expected a method that drops tokens for `keep`, {', '.join(self.methods)} keep every token."
            )
        for keep in self.shares if dropping else ():
            if not 0 < keep <= 1:
                raise UsageError(f"Expected shares above 0, at most 1, for `keep`, received {keep:g}.")
            waits = WAITING if any(method.compresses for method in dropping) else 0
            for prefix in self.prefixes:
                if round(keep * prefix) <= self.sinks + self.window + waits:
                    raise UsageError(
                        f"Expected `keep` to leave more than the {self.sinks} sinks, the window of {self.window} and {waits} "
                        f"that wait to be coded, received {keep:g}, {round(keep * prefix):,} of {prefix:,} tokens. Raise "
                        "`keep` or `prefixes`."
                    )


def unreachable(settings: Settings, reason: str) -> UsageError:
    """The error for methods that reach none of the bits."""
    return UsageError(
        f"Expected a method and bits that it can reach, received methods {', '.join(settings.methods)} with bits "
        f"{', '.join(f'{b:g}' for b in settings.bits)}: {reason}"
    )


def drops_tokens(method: Method) -> bool:
    """Whether caches of `method` drop tokens, unless tiers are asked for."""
    return method.scorer is not None


def has_wavelet(method: Method) -> bool:
    """Whether `method` drops tokens by a wavelet scorer."""
    return method.scorer is not None and "wavelet" in get_scorer(method.scorer).options


def rounds(method: Method) -> bool:
    """Whether `method` chooses codes by scores of tokens."""
    return method.rounding != "nearest"

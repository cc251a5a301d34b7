"""Token scorers: which of the stored tokens matter. Higher scores mean keep; selection is another matter.

Every file has a pure function `scores(xp, ...) -> [B, Hkv, T]` float32; the table says what each one needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UsageError
from . import (
    expected_attention,
    fourierkv,
    keydiff,
    knorm,
    random,
    snapkv,
    streaming,
    triattention,
    waveletattention,
    waveletfourierkv,
    waveletkv,
    wavelettriattention,
)
from .tokens import Tokens

__all__ = ["SCORERS", "Scorer", "Tokens", "check_wavelet", "get_scorer"]

OPTIONAL = ("rope",)  # None is an answer: a model without rotary embedding


@dataclass(frozen=True)
class Scorer:
    """A scorer of the table: `scores` takes the array namespace, then the fields of `Tokens` named in `needs`.

    blends: whether `scores` takes `Tokens` whole instead, to hand parts of it to other scorers.
    """

    name: str
    scores: Callable
    needs: tuple[str, ...]
    summary: str
    source: str
    blends: bool = False

    @property
    def needs_queries(self) -> bool:
        """Whether it reads the query statistics of a profile."""
        return any(name.startswith("query_") for name in self.needs)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of what may be told it beside the tokens."""
        return tuple(inspect.signature(self.scores).parameters)[1 + (1 if self.blends else len(self.needs)) :]

    @property
    def needs_recent(self) -> bool:
        """Whether it looks at queries of the text, which are there only where a cache attends."""
        return "recent" in self.needs

    def __call__(self, tokens: Tokens, **options):
        """Scores [B, Hkv, T] float32 of `tokens`; `options` are those of the scorer.

        Raises UsageError when `tokens` lacks what the scorer needs.
        """
        if not tokens.count:
            return tokens.xp.zeros(tuple(tokens.post_rope.shape[:3]), like=tokens.post_rope)
        given = {name: getattr(tokens, name) for name in self.needs}
        missing = [name for name, value in given.items() if value is None and name not in OPTIONAL]
        if missing:
            raise UsageError(f"Expected {', '.join(missing)} for the scorer {self.name}, received none.")
        return self.scores(tokens.xp, *((tokens,) if self.blends else given.values()), **options)


_QUERIES = ("query_mean", "query_amplitude", "rope", "now")

SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer(
            "fourierkv",
            fourierkv.scores,
            ("pre_rope",),
            "part of the key in a low or high band over time",
            "rFFT over time with a Tukey mask; derived, no paper",
        ),
        Scorer(
            "waveletkv",
            waveletkv.scores,
            ("pre_rope",),
            "departure from the neighbors at every scale of time",
            "undecimated wavelets over time (Holschneider et al. 1989); derived, no paper",
        ),
        Scorer(
            "waveletfourierkv",
            waveletfourierkv.scores,
            ("pre_rope",),
            "waveletkv, bands cleaned by windowed FFT",
            "as waveletkv and fourierkv; derived, no paper",
        ),
        Scorer(
            "triattention",
            triattention.scores,
            ("post_rope", *_QUERIES),
            "what calibrated queries will look at",
            "TriAttention (2604.04921), trigonometric and norm score",
        ),
        Scorer(
            "wavelettriattention",
            wavelettriattention.scores,
            ("pre_rope", "post_rope", *_QUERIES),
            "waveletkv and triattention in equal parts",
            "as waveletkv and triattention; derived, no paper",
            blends=True,
        ),
        Scorer(
            "waveletattention",
            waveletattention.scores,
            ("pre_rope", "post_rope", "values", "query_mean", "query_root", "rope", "now", "recent"),
            "waveletkv, snapkv and expected-attention in equal parts",
            "as waveletkv, snapkv and expected-attention; derived, no paper",
            blends=True,
        ),
        Scorer(
            "expected-attention",
            expected_attention.scores,
            ("post_rope", "values", "query_mean", "query_root", "rope", "now"),
            "share of attention from Gaussian queries, times the norm of the value",
            "Expected Attention (2510.00636); statistics from calibration",
        ),
        Scorer(
            "snapkv",
            snapkv.scores,
            ("post_rope", "recent"),
            "what the last queries of the prompt looked at",
            "SnapKV (2404.14469), listing 1",
        ),
        Scorer("keydiff", keydiff.scores, ("post_rope",), "keys unlike the mean direction", "KeyDiff (2504.15364)"),
        Scorer("knorm", knorm.scores, ("post_rope",), "keys of low norm", "Devoto et al. 2024 (2406.11430)"),
        Scorer(
            "streaming",
            streaming.scores,
            ("post_rope", "positions"),
            "the latest tokens",
            "StreamingLLM (2309.17453): sinks and window",
        ),
        Scorer("random", random.scores, ("post_rope", "positions"), "seeded random numbers", "reference"),
    )
}


def check_wavelet(scorer: Scorer, wavelet: str) -> None:
    """Raise UsageError for a scorer that has no wavelet, and for a `wavelet` that is none."""
    if "wavelet" not in scorer.options:
        able = ", ".join(name for name, other in SCORERS.items() if "wavelet" in other.options)
        raise UsageError(f"Expected one of the scorers {able} for wavelet, {scorer.name} has none.")
    waveletkv.filter_bank(wavelet)


def get_scorer(name: str) -> Scorer:
    """The scorer called `name`; raises UsageError that lists the names there are."""
    if name not in SCORERS:
        raise UsageError(f"Expected a scorer among {', '.join(SCORERS)}, received {name!r}.")
    return SCORERS[name]

"""What a family of transformers gets of a compressed cache, measured on its tiny model: a row of docs/reference/models.md."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch_families
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput

from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED
from spectral_kv_torch import make_prompt_cache
from spectral_kv_torch.generation import plain_cache
from spectral_kv_torch.integration import cache_argument
from spectral_kv_torch.survey import survey

PIECES = (60, 40, 1, 1, 1, 1)  # tokens of every call
SAME = 1e-4  # most that a logit may differ from the host's own with `identity`
CLOSE = 0.01  # most KL of turboquant at 8 bits, all tokens coded; experts of random weights change with little
HEAD = (
    "| family | as codes | decoded | passed through | largest difference | KL at 8 bits |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """A family: its layers by way, with reasons, the largest difference of a logit, and the KL; None where refused."""

    family: str
    codes: str
    decoded: str
    passed: str
    difference: float | None = None
    kl: float | None = None

    @property
    def words(self) -> list[str]:
        """The columns that are the same on every machine."""
        return [self.family, self.codes, self.decoded, self.passed]

    def __str__(self) -> str:
        numbers = ["" if x is None else f"{x:.0e}" for x in (self.difference, self.kl)]
        return "| " + " | ".join([*self.words, *numbers]) + " |"


def table() -> list[str]:
    """The lines of the page's table."""
    return [*HEAD, *(str(row(name)) for name in torch_families.FAMILIES)]


def row(name: str) -> Row:
    """The row of the family `name`."""
    model = torch_families.tiny(name)
    words = [name, *_words(survey(model))]
    try:
        cache = make_prompt_cache(model, method="identity")
    except UsageError as error:
        assert "only: " in str(error) or "a model with attention" in str(error), error
        return Row(*words)
    got = [logits(model, each) for each in (cache, plain_cache(model))]  # a plain cache beside ours
    coded = logits(model, make_prompt_cache(model, 8, method="turboquant", window=0, sinks=0))
    expected = logits(torch_families.tiny(name), plain_cache(model))
    return Row(*words, max(float((x - expected).abs().max()) for x in got), divergence(expected, coded))


def logits(model, cache: Cache) -> torch.Tensor:
    """Logits [T, V] of a text in `PIECES`; a decoder behind an encoder reads the same states each time."""
    ids = torch.randint(3, 256, (1, sum(PIECES)), generator=torch.Generator().manual_seed(1))
    name, given = "input_ids", {}
    if model.config.is_encoder_decoder:
        name, cache = "decoder_input_ids", EncoderDecoderCache(cache, DynamicCache())
        given["encoder_outputs"] = MoEModelOutput(torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(2)))
    given |= cache_argument(model, cache)
    with torch.no_grad():
        parts = [model(**{name: part}, use_cache=True, **given).logits for part in ids.split(PIECES, dim=1)]
    return torch.cat(parts, dim=1)[0]


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL of the distributions that logits [T, V] stand for."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (expected, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _words(layers) -> list[str]:
    """How many layers are attended as codes, and how many in another way, with the reason."""
    counts = Counter((layer.way, layer.reason) for layer in layers)
    of_way = {
        way: [(reason, n) for (one, reason), n in counts.items() if one == way] for way in (CODES, DECODED, PASSED)
    }
    words = ["; ".join(f"{n} with {reason}" for reason, n in of_way[way]) for way in (DECODED, PASSED)]
    return [str(sum(n for _, n in of_way[CODES]) or ""), *words]

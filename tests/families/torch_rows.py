"""What a family of transformers gets of a compressed cache, measured on its tiny model: a row of docs/reference/models.md."""

from __future__ import annotations

import torch
import torch_families
from family_row import CLOSE, HEAD, PIECES, SAME, Row, divergence, words_of
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput

from spectral_kv_core.errors import UsageError
from spectral_kv_torch import make_prompt_cache
from spectral_kv_torch.generation import plain_cache
from spectral_kv_torch.integration import cache_argument
from spectral_kv_torch.survey import survey

__all__ = ["CLOSE", "HEAD", "SAME", "Row", "row", "table"]


def table() -> list[str]:
    """The lines of the page's table."""
    return [*HEAD, *(str(row(name)) for name in torch_families.FAMILIES)]


def row(name: str) -> Row:
    """The row of the family `name`."""
    model = torch_families.tiny(name)
    words = [name, *words_of(survey(model))]
    try:
        cache = make_prompt_cache(model, method="identity")
    except UsageError as error:
        assert "only: " in str(error) or "a model with attention" in str(error), error
        return Row(*words)
    got = [logits(model, each) for each in (cache, plain_cache(model))]  # a plain cache beside ours
    coded = logits(model, make_prompt_cache(model, 8, method="turboquant", window=0, sinks=0))
    expected = logits(torch_families.tiny(name), plain_cache(model))
    return Row(
        *words,
        max(float((x - expected).abs().max()) for x in got),
        divergence(*(x.double().numpy() for x in (expected, coded))),
    )


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

"""What only transformers asks of caches that drop tokens: `test_live_eviction.py` has the rest."""

# ruff: noqa: E402 (without PyTorch the whole file is skipped before its imports)
from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hosts import only
from test_eviction import positions_of
from torch_models import logits_of, model_and_profile, tokens
from transformers import DynamicCache

torch = pytest.importorskip("torch")

from torch_models import ByteTokenizer

from spectral_kv_torch import SpectralCache, make_prompt_cache, restore
from spectral_kv_torch.cache import SpectralKVLayer
from spectral_kv_torch.generation import generate
from spectral_kv_torch.integration import plain_cache

BUDGET = 150


def stores(cache) -> list:
    return [layer.store for layer in cache.layers if isinstance(layer, SpectralKVLayer)]


@only("torch", "models of mlx-lm take no masks")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi"])
def test_logits_are_those_of_a_plain_cache_with_a_mask(name):
    """Positions, masks and left padding stay right: two rows of different length, the host masks what was dropped."""
    model, profile = model_and_profile(name)
    ids, pads, prompt = tokens(330, batch=2), [0, 90], 300
    mask = (torch.arange(330)[None] >= torch.tensor(pads)[:, None]).long()
    cache = make_prompt_cache(model, profile, method="streaming", budget_tokens=BUDGET)
    plain = DynamicCache(config=model.config)
    heads = profile.shape.kv_heads
    places = (torch.arange(330)[None] - torch.tensor(pads)[:, None]).clamp(min=0)
    for start, stop in [(0, prompt), (prompt, 308), *((i, i + 1) for i in range(308, 330))]:
        window = slice(start, stop)
        held = [np.arange(start)[None]] * 2
        if start:
            store = stores(cache)[0]
            rows = [
                next(i for i, group in enumerate(store.padding_groups) if row in group.sequences) for row in range(2)
            ]
            held = [positions_of(store, group, heads)[0, 0] + pad for group, pad in zip(rows, pads)]
        visible = torch.zeros(2, 1, stop - start, stop, dtype=torch.bool)
        for row, (slots, pad) in enumerate(zip(held, pads)):
            visible[row, 0, :, torch.as_tensor(np.ravel(slots))] = True
            visible[row, 0, :, :pad] = False
        visible[..., start:] = torch.ones(stop - start, stop - start).tril().bool() & (mask[:, None, None, window] > 0)
        sliding = visible & (torch.arange(stop) > torch.arange(start, stop)[:, None] - 32)
        sliding[..., :start] = mask[:, None, None, :start] & (
            torch.arange(start) > torch.arange(start, stop)[:, None] - 32
        )
        sliding = sliding[
            ..., -min(start, 31) - (stop - start) :
        ]  # the host keeps no more of a layer with a window of 32
        with torch.no_grad():
            expected = model(
                ids[:, window],
                attention_mask={"full_attention": visible, "sliding_attention": sliding}
                if name == "gemma3"
                else visible,
                position_ids=places[:, window],
                past_key_values=plain,
            ).logits
            got = model(
                ids[:, window],
                attention_mask=mask[:, :stop],
                position_ids=places[:, window],
                past_key_values=cache,
            ).logits
        real = mask[:, window].bool()
        assert float((got - expected)[real].abs().max()) < 2e-3 * float(expected.abs().max())
    assert all(group.dropped for store in stores(cache) for group in store.padding_groups)


@only("torch", "MLX keeps the left padding in the cache")
def test_other_attention_does_not_guess_about_padding():
    model, profile = model_and_profile("llama")
    model = copy.deepcopy(model)
    cache = make_prompt_cache(model, profile, method="knorm", budget_tokens=BUDGET)
    mask = (torch.arange(300)[None] >= torch.tensor([[0], [200]])).long()
    logits_of(model, tokens(300, batch=2), cache, attention_mask=mask)
    restore(model)
    with pytest.raises(ValueError, match="equally many tokens"):
        logits_of(model, tokens(1, batch=2), cache)


@only("torch", "SpectralCache takes a profile and no model")
def test_a_bare_cache_without_a_budget_is_refused():
    _, profile = model_and_profile("llama")
    for method in ("knorm", "triattention+spectral"):
        with pytest.raises(ValueError, match="budget"):
            SpectralCache(profile, method=method)


@only("torch", "transformers takes the end of a text from the model")
def test_the_end_of_a_text_can_be_ignored():
    model = copy.deepcopy(model_and_profile("llama")[0])
    prompt = tokens(100)[0].tolist()
    first = generate(model, ByteTokenizer(), prompt, plain_cache(model), 1, True, lambda token: None).tokens[0]
    model.generation_config.eos_token_id = model.config.eos_token_id = first
    assert len(generate(model, ByteTokenizer(), prompt, plain_cache(model), 10, False, lambda token: None).tokens) == 1
    assert len(generate(model, ByteTokenizer(), prompt, plain_cache(model), 10, True, lambda token: None).tokens) == 10

"""What a cache says once of a model or of its use, in one line."""

from __future__ import annotations

import pytest
from hosts import tokens

from spectral_kv_core.profile.store import warn_once


@pytest.fixture
def told(caplog):
    """How often some words were said."""
    warn_once.cache_clear()
    return lambda words: sum(words in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "name, method, times", [("qwen2", "turboquant", 1), ("qwen2", "spectral", 0), ("llama", "turboquant", 0)]
)
def test_a_method_that_suffers_from_the_keys_of_a_model_says_so_once(host, told, name, method, times):
    model, profile = host.new_model(name), host.profile(name)
    for layer in model.model.layers if name == "qwen2" else ():
        bias = layer.self_attn.k_proj.bias
        bias = bias.detach() if host.NAME == "torch" else bias
        bias[:] = 4 * bias
    for _ in range(2):
        host.logits(model, tokens(200), host.make_prompt_cache(model, profile, method=method))
    assert told("a constant part that outweighs") == times


def test_more_tokens_than_the_model_was_made_for_are_told_once(host, told):
    model = host.new_model("llama")
    arguments = model.config if host.NAME == "torch" else model.args
    arguments.max_position_embeddings = 128
    for count in (0, 1):
        cache = host.make_prompt_cache(model, method="turboquant")
        host.logits(model, tokens(127), cache)
        host.logits(model, tokens(1), cache)
        assert told("more tokens than the 128 that its model was made for") == count
        for _ in range(2):
            host.logits(model, tokens(1), cache)
        assert told("more tokens than the 128 that its model was made for") == 1


def test_a_cache_of_another_model_is_told(host, told):
    first, second = host.new_model("llama"), host.new_model("llama")
    cache = host.make_prompt_cache(first, method="turboquant")
    host.install(second)
    host.logits(first, tokens(100), cache)
    host.logits(second, tokens(1), cache)
    assert not told("is used by other weights")  # which are equal
    for layer in second.model.layers:
        for name in ("q_proj", "k_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight = weight.detach() if host.NAME == "torch" else weight
            weight[:] = -weight
    for read in (True, False):  # and where the right model has not read anything yet
        warn_once.cache_clear()
        before, cache = told("is used by other weights"), host.make_prompt_cache(first, method="turboquant")
        if read:
            host.logits(first, tokens(100), cache)
            assert told("is used by other weights") == before
        for _ in range(3):
            host.logits(second, tokens(1), cache)
        assert told("is used by other weights") == before + 1

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

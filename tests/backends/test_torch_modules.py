"""Models that are compiled, wrapped, offloaded or trained, with compressed caches."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from accelerate import cpu_offload
from hosts import ByteTokenizer
from tolerances import assert_close, relative_rms
from torch._dynamo.utils import counters
from torch_models import SIZES, TEXT, logits_of, model_and_profile, tiny_model, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_kv_torch import SpectralProfiler, load_prompt_cache, make_prompt_cache, restore, save_prompt_cache
from spectral_kv_torch.generation import plain_cache
from spectral_kv_torch.handles import ATTENTION, _wants_gradients
from spectral_kv_torch.integration import cache_argument, weights_digest


def turns(model, cache, count: int = 200, steps: int = 3) -> torch.Tensor:
    """Logits of a prompt and of some tokens after it, one at a time."""
    ids = tokens(count + steps)
    return torch.cat(
        [logits_of(model, part, cache) for part in (ids[:, :count], *ids[:, count:].split(1, dim=1))], dim=1
    )


@pytest.fixture
def compiled():
    """A fresh compiler that says nothing of what it recompiles."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda model: torch.compile(model, backend="eager")
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_attends_to_codes_as_it_did(compiled):
    """A compiler sees none of our code: it breaks its graph there and nowhere else."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    expected = turns(model, make_prompt_cache(model, method="turboquant", window=16), steps=2)
    got = turns(compiled(model), make_prompt_cache(model, method="turboquant", window=16), steps=2)
    assert_close("logits", got, expected)
    assert counters["graph_break"]
    for reason in counters["graph_break"]:
        assert "torch.compiler.disable" in reason and ("SpectralKV" in reason or "attention_forward" in reason), reason


class Wrapper(torch.nn.Module):
    """Stands around a model as PEFT does: it calls it, and hands on what it does not have itself."""

    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def test_a_wrapper_around_a_model_is_that_model(tmp_path):
    model = tiny_model("llama")
    wrapped, digest = Wrapper(model), weights_digest(model)
    assert weights_digest(wrapped) == digest
    profiler = SpectralProfiler(tokens=1024, document=512, progress=False, basis_sets=("head.post",))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        profile = profiler.profile_from_model(wrapped, ByteTokenizer(), TEXT)
        assert profile.basis_sets == profiler.profile_from_model(model, ByteTokenizer(), TEXT).basis_sets
        cache = make_prompt_cache(wrapped, profile, bits=3, window=16)
        got = turns(wrapped, cache)
    assert model.config._attn_implementation == ATTENTION
    assert_close("logits", got, turns(model, make_prompt_cache(model, profile, bits=3, window=16)))
    path = save_prompt_cache(tmp_path / "prompt.safetensors", cache, model=wrapped)
    again, _ = load_prompt_cache(path, wrapped, profile)
    assert again.get_seq_length() == 203
    restore(wrapped)
    assert model.config._attn_implementation == "sdpa"


def test_weights_that_wait_elsewhere_until_they_are_used():
    """accelerate leaves the weights on no device, and brings each where it is used."""
    model, profile = model_and_profile("llama")
    away = cpu_offload(deepcopy(model), torch.device("cpu"))
    assert away.device.type == "meta" and weights_digest(away) == ""
    expected = turns(model, make_prompt_cache(model, profile, bits=3, window=16))
    assert_close("logits", turns(away, make_prompt_cache(away, profile, bits=3, window=16)), expected)
    profiler = SpectralProfiler(tokens=1024, document=512, progress=False, basis_sets=("head.post",))
    found, there = (profiler.profile_from_model(m, ByteTokenizer(), TEXT) for m in (away, model))
    assert found.calibration["gradients"] == "score" and found.basis_sets == there.basis_sets


@pytest.mark.parametrize("part", ["model.layers.1", "model.embed_tokens", "model.norm"])
def test_the_digest_of_weights_of_which_some_are_nowhere(part):
    model = tiny_model("llama")
    digest = weights_digest(model)
    model.get_submodule(part).to("meta")
    known = weights_digest(model)
    assert digest.startswith(known) and make_prompt_cache(model, method="identity").get_seq_length() == 0


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize(
    "method, bits, limit", [("identity", None, 1e-5), ("spectral", 8, 0.05), ("spectral-dense", 8, 0.05)]
)
def test_gradients_go_through_what_follows_a_cached_prompt(before, count, method, bits, limit):
    """And the tables that a cache made without gradients serve another with them."""
    model, profile = model_and_profile("llama")
    weights, ids = [layer.self_attn.q_proj.weight for layer in model.model.layers], tokens(220)
    found = []
    for cache in (plain_cache(model), make_prompt_cache(model, profile, bits, method=method, window=16)):
        with before():
            model(ids[:, :200], **cache_argument(model, cache))
        log_p = model(ids[:, 200 : 200 + count], **cache_argument(model, cache)).logits.log_softmax(-1)
        found.append(torch.autograd.grad(log_p[..., 5].sum(), weights))
    for got, expected in zip(*reversed(found), strict=True):
        assert relative_rms(got, expected) < limit
    assert not model.model.layers[0].self_attn.q_proj.weight.grad


def test_without_gradients_codes_are_attended_to():
    query = torch.zeros(1, 1, 1, 4, requires_grad=True)

    class Taken:
        keys = values = torch.zeros(1, 1, 1, 4)

    assert _wants_gradients(query, Taken) and not _wants_gradients(query.detach(), Taken)
    with torch.no_grad():
        assert not _wants_gradients(query, Taken)

"""How models of transformers reach our caches: other masks, other arguments, other code, and the way back."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hosts import ByteTokenizer  # noqa: E402
from tolerances import assert_close  # noqa: E402
from torch_models import SIZES, TEXT, logits_of, model_and_profile, tiny_model, tokens  # noqa: E402
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration  # noqa: E402
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from spectral_kv_core.errors import UsageError  # noqa: E402
from spectral_kv_torch import (  # noqa: E402
    SpectralCache,
    SpectralProfiler,
    capture,
    generation,
    handles,
    integration,
    make_prompt_cache,
    restore,
)
from spectral_kv_torch.generation import plain_cache  # noqa: E402
from spectral_kv_torch.handles import ATTENTION, Handle, RoutedName, attention_forward  # noqa: E402
from spectral_kv_torch.integration import cache_argument, install  # noqa: E402

# --- versions of transformers


def test_nothing_that_transformers_gives_up_is_used():
    model = tiny_model("llama")
    ids = tokens(40)[0].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = make_prompt_cache(model, method="identity")
        generation.feed(model, ids, cache)
        generation.generate(model, None, ids[:3], cache, 4, True, lambda token: None)
        capture(model, ids)
    assert cache.get_seq_length() == 46


# --- the way back


@pytest.mark.parametrize("before", ["eager", "flex_attention", "sdpa"])
def test_restore_gives_back_what_was_there(before):
    model = tiny_model("llama")
    model.set_attn_implementation(before)
    config = model.config
    make_prompt_cache(model, method="identity")
    assert config._attn_implementation == ATTENTION
    install(model)  # twice
    copied = copy.deepcopy(model)
    for one in (model, copied):
        restore(one)
        assert type(one.config._attn_implementation) is str and one.config._attn_implementation == before
        assert one.model.layers[0].self_attn.config._attn_implementation == before


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_restored_attention_decodes_the_cache(before):
    model, ids = tiny_model("llama"), tokens(200)
    expected = logits_of(model, ids, plain_cache(model))
    model.set_attn_implementation(before)
    cache = make_prompt_cache(model, method="identity")
    first = logits_of(model, ids[:, :100], cache)
    restore(model)
    got = torch.cat([first, logits_of(model, ids[:, 100:199], cache), logits_of(model, ids[:, 199:], cache)], dim=1)
    assert_close("logits", got, expected)


def test_attention_that_torch_compiles_gets_decoded_keys(monkeypatch):
    """flex_attention, in whose place stands something here that needs no compiler."""
    given, mapping = [], AttentionInterface._global_mapping
    assert "flex_attention" in mapping
    monkeypatch.setitem(mapping, "flex_attention", lambda module, *sides, **options: given.append(sides))
    model = tiny_model("llama")
    cache = make_prompt_cache(model, method="identity", window=16)
    logits_of(model, tokens(100), cache)
    query, new = torch.ones(1, 4, 1, 16), torch.ones(2, 1, 2, 1, 16)
    mapping["flex_attention"](model, query, *cache.layers[0].update(*new), None)
    _, keys, values, _ = given[0]
    assert type(keys) is type(values) is torch.Tensor and keys.shape == values.shape == (1, 2, 101, 16)
    mapping["flex_attention"](model, query, *new, None)
    assert given[1][1].shape == (1, 2, 1, 16)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_a_static_cache_while_installed(before):
    """Whose keys have room behind the tokens."""
    model, ids = tiny_model("llama"), tokens(40)
    model.set_attn_implementation(before)
    expected = logits_of(model, ids, plain_cache(model))
    install(model)
    for options in ({}, {"output_attentions": True}):
        cache = StaticCache(config=model.config, max_cache_len=64)
        parts = [logits_of(model, part, cache, **options) for part in ids.split([30, 9, 1], dim=1)]
        assert_close("logits", torch.cat(parts, dim=1), expected)


def test_a_part_that_was_installed_alone():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    install(model.model)
    install(model)
    with integration.routed(model):
        assert integration.is_routed(model)
    assert integration.is_routed(model)
    restore(model)
    assert not integration.is_routed(model.model) and model.config._attn_implementation == "eager"


def test_restore_gives_every_part_its_own_back():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config={**SIZES, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    parts = [model.config, model.config.text_config, model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    assert set(before) == {"sdpa", "eager"}
    install(model)
    assert all(part._attn_implementation == ATTENTION for part in parts)
    restore(model)
    assert [part._attn_implementation for part in parts] == before


def test_capture_leaves_the_attention_as_it_was():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    capture(model, tokens(20)[0].tolist())
    assert model.config._attn_implementation == "eager"


def test_our_name_is_seen_as_sdpa():
    """Models compute something else for a name they do not know."""
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    forward = layer.forward

    def picky(*args, **options):
        out, weights = forward(*args, **options)
        known = layer.config._attn_implementation in ("eager", "sdpa") and layer.config._attn_implementation != "eager"
        return (out if known else out * 2), weights

    layer.forward = picky
    ids = tokens(50)
    expected = logits_of(model, ids, plain_cache(model))
    cache = make_prompt_cache(model, method="identity")
    assert_close("identity", logits_of(model, ids, cache, 20), expected)
    assert_close("plain", logits_of(model, ids, plain_cache(model)), expected)
    name = model.config._attn_implementation
    for same in (copy.deepcopy(name), pickle.loads(pickle.dumps(RoutedName("eager", decode=True)))):
        assert same == ATTENTION and same == "sdpa" and same != "eager" and {ATTENTION: 1}[same] == 1
    assert (same.before, same.decode) == ("eager", True)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_attention_weights_are_those_of_the_model(before):
    model, ids = tiny_model("llama"), tokens(40)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, output_attentions=True).attentions
        model.set_attn_implementation(before)
        cache = make_prompt_cache(model, method="identity")
        model(ids[:, :30], **cache_argument(model, cache))
        got = model(ids[:, 30:], output_attentions=True, **cache_argument(model, cache)).attentions
    assert len(got) == len(expected) == 3
    for some, whole in zip(got, expected):
        assert_close("weights", some, whole[:, :, 30:])
    with torch.no_grad():
        logits_of(model, tokens(1), cache)
        assert cache.get_seq_length() == 41


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method, bits", [("spectral", 8), ("turboquant", None), ("identity", None)])
@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_across_seals_give_the_tokens_of_plain_greedy(family, method, bits, way):
    """Sixty tokens with a window of 16: blocks are sealed, and cut by drafts that are taken back."""
    model, profile = model_and_profile(family)
    ids = tokens(30).repeat(1, 4)
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    options |= {"attention_mask": torch.ones_like(ids)}
    helper = tiny_model(family)  # right most of the time
    for p in helper.parameters():
        p.data += 0.003 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    drafts = {way: 4 if way == "prompt_lookup_num_tokens" else helper}
    found = []
    for more in ({}, drafts):
        cache = make_prompt_cache(model, profile, bits, method=method, window=16, sinks=4)
        found.append(model.generate(ids, **cache_argument(model, cache), **options, **more))
    assert torch.equal(*found)
    assert method == "identity" or cache.layers[-1].store.padding_groups[0].sealed >= 144


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompt_lookup_takes_tokens_back(family):
    """transformers asks every layer whether it can be cropped."""
    model, _ = model_and_profile(family)
    ids = tokens(30).repeat(1, 4)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    options |= {"attention_mask": torch.ones_like(ids), "prompt_lookup_num_tokens": 4}
    caches = plain_cache(model), make_prompt_cache(model, method="identity", window=16, sinks=4)
    expected, got = (model.generate(ids, **cache_argument(model, cache), **options) for cache in caches)
    assert torch.equal(got, expected)


# --- masks


@pytest.mark.parametrize("method, bits", [("identity", None), ("spectral", 8)])
@pytest.mark.parametrize("hidden", [slice(50, 250), slice(0, 50)], ids=["between", "first"])
def test_a_mask_that_hides_tokens(method, bits, hidden):
    """In a call of one token too; the next one sees them again."""
    model, profile = model_and_profile("llama")
    ids, mask = tokens(403), torch.ones(1, 401, dtype=torch.long)
    mask[:, hidden] = 0
    plain, cache = plain_cache(model), make_prompt_cache(model, profile, bits, method=method)
    outputs = []
    for one in (plain, cache):
        logits_of(model, ids[:, :400], one)
        outputs.append(logits_of(model, ids[:, 400:401], one, attention_mask=mask))
        outputs.append(logits_of(model, ids[:, 401:403], one, 1))
        assert one.get_seq_length() == 403
    unmasked = plain_cache(model)
    logits_of(model, ids[:, :400], unmasked)
    change = (outputs[0] - logits_of(model, ids[:, 400:401], unmasked)).abs().max()
    for got, expected in zip(outputs[2:], outputs):
        error = (got - expected).abs().max()
        assert error < (1e-4 if method == "identity" else 0.1 * change), (error, change)


@pytest.mark.parametrize("method, bits", [("identity", None), ("spectral", 8), ("spectral-dense", 8)])
def test_a_later_turn_with_padding_of_its_own(method, bits):
    """A second turn of a chat, shorter in one row: padding that lies behind tokens."""
    model, profile = model_and_profile("llama")
    ids = tokens(90, batch=2)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :10] = 0
    mask[1, 60:75] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = []
    told = mask.clone()
    told[1, 60:75] = 1  # what a cache would make of it that hears nothing of the later padding
    for cache, heard in (
        (plain_cache(model), mask),
        (make_prompt_cache(model, profile, bits, method=method, window=16), mask),
        (plain_cache(model), told),
    ):
        parts = []
        for part in (slice(0, 60), slice(60, 88), slice(88, 89), slice(89, 90)):
            given = {"attention_mask": heard[:, : part.stop], "position_ids": position[:, part]}
            parts.append(logits_of(model, ids[:, part], cache, **given))
        outputs.append(torch.cat(parts, dim=1)[mask.bool()])
    if method == "identity":
        assert_close("logits", outputs[1], outputs[0])
    assert (outputs[1] - outputs[0]).abs().max() < 0.1 * (outputs[2] - outputs[0]).abs().max()


def test_a_second_turn_of_a_batch_that_generates():
    """One conversation of two goes on with fewer tokens: transformers pads it on the left, behind its first turn."""
    model, _ = model_and_profile("llama")
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    found = []
    for cache in (plain_cache(model), make_prompt_cache(model, method="identity", window=16)):
        ids, mask = tokens(100, batch=2), torch.ones(2, 100, dtype=torch.long)
        mask[0, :30] = 0
        ids = model.generate(ids, attention_mask=mask, **cache_argument(model, cache), **options)
        turn, turn_mask = tokens(40, seed=4, batch=2), torch.ones(2, 40, dtype=torch.long)
        turn_mask[1, :25] = 0
        ids, mask = torch.cat([ids, turn], 1), torch.cat([mask, torch.ones(2, 24, dtype=torch.long), turn_mask], 1)
        found.append(model.generate(ids, attention_mask=mask, **cache_argument(model, cache), **options))
    assert torch.equal(*found)


def test_padding_on_the_right_is_honored():
    model, _ = model_and_profile("llama")
    ids, mask = tokens(52, batch=2), torch.ones(2, 52, dtype=torch.long)
    mask[1, 40:50] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = []
    for cache in (plain_cache(model), make_prompt_cache(model, method="identity")):
        first = {"attention_mask": mask[:, :50], "position_ids": position[:, :50]}
        parts = [logits_of(model, ids[:, :50], cache, **first)]
        parts.append(logits_of(model, ids[:, 50:], cache, attention_mask=mask, position_ids=position[:, 50:]))
        outputs.append(torch.cat(parts, dim=1)[mask.bool()])
    assert_close("logits", outputs[1], outputs[0])


def test_a_span_that_sees_itself_in_both_directions():
    """As image tokens do: a mask that is no padding, before any token is stored."""
    model, _ = model_and_profile("llama")
    ids = tokens(60)
    mask = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
    mask[..., 10:20, 10:20] = True
    expected, got = plain_cache(model), make_prompt_cache(model, method="identity")
    first = [logits_of(model, ids, cache, attention_mask=mask) for cache in (expected, got)]
    then = [logits_of(model, tokens(5, seed=1), cache) for cache in (expected, got)]
    assert_close("first", first[1], first[0])
    assert_close("then", then[1], then[0])
    assert (first[0] - logits_of(model, ids, plain_cache(model))).abs().max() > 1e-3


def test_additive_masks_are_read_as_what_they_add():
    """Zero and the lowest number are a mask; anything between changes scores."""
    low = torch.finfo(torch.float32).min
    additive = torch.zeros(2, 1, 1, 6).masked_fill(torch.arange(6) < torch.tensor([0, 2]).view(2, 1, 1, 1), low)
    assert handles.left_padding(additive, 1) == [0, 2]
    for bias in (-1.5, 1.5):
        additive[0, 0, 0, 3] = bias
        assert handles.left_padding(additive, 1) is None


def test_another_mask_after_tokens_were_dropped_is_refused():
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, method="streaming", budget_tokens=120)
    logits_of(model, tokens(300), cache)
    cache.finalize()
    mask = torch.ones(1, 301, dtype=torch.long)
    mask[:, 250:260] = 0
    with pytest.raises(UsageError, match="dropped"):
        logits_of(model, tokens(1, seed=3), cache, attention_mask=mask)


# --- arguments


def module_like(**names) -> torch.nn.Module:
    """An attention module of two query heads per KV head, in a module of its own that has what `names` says."""
    home = ModuleType("somebodys_model")
    vars(home).update(names)
    sys.modules[home.__name__] = home

    class Attention(torch.nn.Module):
        num_key_value_groups, is_causal, layer_idx = 2, True, 0

    Attention.__module__ = home.__name__
    return Attention().eval()


def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """Attention with every argument that models have, written down."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling + kwargs.get("position_bias", 0)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores + attention_mask if attention_mask is not None else scores
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), weights


ARGUMENTS = {
    "softcap": 0.5,
    "s_aux": torch.tensor([0.5, 2.0, -1.0, 3.0]),
    "position_bias": None,
    "somebodys_argument": True,
    "is_causal": False,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_change_scores_reach_the_hosts_function(name):
    module, draw = module_like(eager_attention_forward=eager), torch.Generator().manual_seed(0)
    cache = make_prompt_cache(model_and_profile("llama")[0], method="identity")
    keys, values = torch.randn(2, 1, 2, 90, 16, generator=draw)
    queries = torch.randn(1, 4, 90, 16, generator=draw)
    for start, stop in ((0, 80), (80, 88), (88, 89), (89, 90)):
        part = slice(start, stop)
        value = ARGUMENTS[name]
        if name == "position_bias":
            value = torch.randn(1, 4, stop - start, stop, generator=draw)
        mask = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)[None, None]
        given = None if start == 0 or stop - start == 1 else mask
        given_back = cache.layers[0].update(keys[:, :, part], values[:, :, part])
        got, _ = attention_forward(module, queries[:, :, part], *given_back, given, scaling=0.25, **{name: value})
        seen = None if name == "is_causal" and given is None else torch.where(mask, 0.0, -torch.inf)
        sides = keys[:, :, :stop], values[:, :, :stop]
        expected, _ = eager(module, queries[:, :, part], *sides, seen, 0.25, **{name: value})
        assert_close(f"{name} of {start} to {stop}", got, expected)
    assert cache.get_seq_length() == 90


def test_an_argument_that_nobody_honors_is_refused():
    cache = make_prompt_cache(model_and_profile("llama")[0], method="identity")
    given_back = cache.layers[0].update(*torch.zeros(2, 1, 2, 5, 16))
    with pytest.raises(UsageError, match="softcap.*restore"):
        attention_forward(module_like(), torch.zeros(1, 4, 5, 16), *given_back, None, softcap=20.0)


def test_usual_arguments_stay_on_the_fast_path():
    for value in ({"dropout": 0.0, "sliding_window": None, "is_causal": True, "position_ids": tokens(3)}, {}):
        assert handles._function_for(module_like(), {**value, "output_attentions": False, "s_aux": None}) is None
    assert handles._function_for(module_like(), {"dropout": 0.1}) is handles.sdpa_attention_forward


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi", "phi3"])
def test_no_family_leaves_the_fast_path(monkeypatch, family):
    """Whatever arguments this version of transformers hands on."""
    model = tiny_model(family)
    cache = make_prompt_cache(model, method="identity")
    monkeypatch.setattr(type(cache.layers[-1]), "decoded", lambda *a: pytest.fail("the history was decoded"))
    ids, mask = tokens(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    model.generate(ids, attention_mask=mask, **cache_argument(model, cache), **options)
    assert cache.get_seq_length() == 63


def test_a_model_without_sdpa_attends_by_its_own_function():
    """GPT-OSS and others are wrong under any other."""
    model = tiny_model("llama")
    expected = logits_of(model, tokens(40), plain_cache(model))
    type(model)._supports_sdpa, kept = False, type(model)._supports_sdpa
    modeling = type(model.model)
    modeling._supports_sdpa = False
    try:
        cache = make_prompt_cache(model, method="identity")
    finally:
        type(model)._supports_sdpa = modeling._supports_sdpa = kept
    calls, eager_forward = [], modeling_llama.eager_attention_forward

    def counted(*args, **options):
        calls.append(1)
        return eager_forward(*args, **options)

    modeling_llama.eager_attention_forward = counted
    try:
        assert_close("logits", logits_of(model, tokens(40), cache, 15), expected)
    finally:
        modeling_llama.eager_attention_forward = eager_forward
    assert len(calls) == 9


def test_the_decoder_of_an_encoder_and_its_position_bias():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
        relative_attention_num_buckets=8, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    for block in (*model.encoder.block, *model.decoder.block):
        for layer in block.layer[:-1]:
            attention = getattr(layer, "SelfAttention", None) or layer.EncDecAttention
            if attention.has_relative_attention_bias:
                attention.relative_attention_bias.weight.data.normal_(0, 3)
    encoded, ids = tokens(20, seed=1), tokens(30)
    outputs = []
    for self_attention in (DynamicCache(), make_prompt_cache(model, method="identity")):
        cache = EncoderDecoderCache(self_attention, DynamicCache())
        with torch.no_grad():
            parts = [
                model(encoded, decoder_input_ids=part, use_cache=True, **cache_argument(model, cache)).logits
                for part in (ids[:, :20], ids[:, 20:29], ids[:, 29:])
            ]
        outputs.append(torch.cat(parts, dim=1))
    assert_close("logits", outputs[1], outputs[0])


# --- handles that go another way


def after_update(monkeypatch, change):
    """Let `change(keys, values)` come between the cache's `update` and the attention of a Llama."""
    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS

    class Between:
        def get_interface(self, name, default):
            function = interface.get_interface(name, default)

            def attend(module, query, key, value, *args, **options):
                return function(module, query, *change(key, value), *args, **options)

            return attend

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Between())


CHANGES = {
    "keys cast": lambda keys, values: (keys.to(torch.float64).float(), values),
    "values scaled": lambda keys, values: (keys, values * 0.5),
    "both": lambda keys, values: (keys.clone(), values.contiguous() + 0.0),
    "keys for values": lambda keys, values: (keys, keys),
    "halves": lambda keys, values: (keys, torch.cat(torch.chunk(values, 2, dim=1), dim=1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_handles_is_done_to_the_whole_history(monkeypatch, name):
    model, ids = tiny_model("llama"), tokens(70)
    after_update(monkeypatch, CHANGES[name])
    expected = logits_of(model, ids, plain_cache(model), 30)
    got = logits_of(model, ids, make_prompt_cache(model, method="identity"), 30)
    assert_close("logits", got, expected)


def test_a_change_in_place_of_a_handle_is_refused(monkeypatch):
    model = tiny_model("llama")
    after_update(monkeypatch, lambda keys, values: (keys, values.mul_(0.5) * 0 + values))
    with pytest.raises(UsageError, match="stay as they are"):
        logits_of(model, tokens(10), make_prompt_cache(model, method="identity"))


@pytest.mark.parametrize("way", [lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x.data_ptr()])
def test_a_handle_has_no_memory_to_read(way):
    """Code in C or Triton that takes an address must not find an empty one."""
    cache = make_prompt_cache(model_and_profile("llama")[0], method="identity")
    keys, _ = cache.layers[0].update(*torch.ones(2, 1, 2, 5, 16))
    assert isinstance(keys, Handle)
    with pytest.raises((RuntimeError, TypeError, UsageError)):
        way(keys)


def test_a_layer_with_attention_code_of_its_own(monkeypatch):
    model, ids = tiny_model("llama"), tokens(70)

    class Own:
        def get_interface(self, name, default):
            def attend(module, query, key, value, mask, scaling, **options):
                rows = query.unflatten(1, (key.shape[1], -1))
                scores = torch.einsum("bhgld,bhnd->bhgln", rows, key) * scaling
                past = key.shape[2] - query.shape[2]
                scores += torch.full(scores.shape[-2:], -torch.inf).triu(past + 1)
                out = torch.einsum("bhgln,bhnd->bhgld", scores.softmax(-1), value).flatten(1, 2)
                return out.transpose(1, 2), None

            return attend

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Own())
    expected = logits_of(model, ids, plain_cache(model), 30)
    assert_close("logits", logits_of(model, ids, make_prompt_cache(model, method="identity"), 30), expected)
    found, plain = capture(model, ids[0].tolist()), plain_cache(model)
    logits_of(model, ids, plain)
    for layer, exact in zip(found.layers, plain.layers, strict=True):
        assert layer.queries is None  # which such a layer shows nobody
        assert_close("keys", layer.keys, exact.keys)


@pytest.mark.parametrize("method, bits", [("identity", None), ("spectral", 8)])
def test_a_layer_may_attend_to_what_another_has_attended_to(method, bits):
    """Layers that share keys and values, and two halves of attention over one pair."""
    model, profile = model_and_profile("llama")
    module, draw = module_like(eager_attention_forward=eager), torch.Generator().manual_seed(0)
    cache = make_prompt_cache(model, profile, bits, method=method)
    keys, values = torch.randn(2, 1, 2, 400, 16, generator=draw)
    queries = torch.randn(1, 4, 400, 16, generator=draw)
    for part in (slice(0, 390), slice(390, 399), slice(399, 400)):
        given, length = queries[:, :, part], part.stop - part.start
        given_back = cache.layers[0].update(keys[:, :, part], values[:, :, part])
        mask = torch.ones(length, part.stop, dtype=torch.bool).tril(part.start)[None, None] if length > 1 else None
        first, second, third = (attention_forward(module, given, *given_back, mask)[0] for _ in range(3))
        assert_close("second", second, first, limit=1e-5 if method == "identity" or part.start == 0 else 0.02)
        assert torch.equal(second, third)
    assert cache.get_seq_length() == 400


def test_handles_of_an_earlier_call_are_refused():
    cache, vectors = make_prompt_cache(model_and_profile("llama")[0], method="identity"), torch.ones(2, 1, 2, 5, 16)
    old = [cache.layers[0].update(*vectors * n) for n in range(1, 4)]
    assert torch.equal(old[2][0][:, :, ::5] + 0, torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1).expand(1, 2, 3, 16))
    with pytest.raises(UsageError, match="last update"):
        old[0][1] + 0


def test_dropped_tokens_are_not_attended_to_twice():
    """Of a prompt that was cut to its budget, nobody can attend to all that was there."""
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, method="streaming", budget_tokens=120)
    logits_of(model, tokens(300), cache)
    logits_of(model, tokens(1), cache)
    given_back = cache.layers[0].update(*torch.ones(2, 1, 2, 1, 16))
    module = module_like(eager_attention_forward=eager)
    attention_forward(module, torch.ones(1, 4, 1, 16), *given_back)
    with pytest.raises(UsageError, match="dropped"):
        attention_forward(module, torch.ones(1, 4, 1, 16), *given_back)


# --- families


def soft_capped():
    from transformers import Gemma2Config

    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return Gemma2Config(
        **SIZES, head_dim=16, sliding_window=32, layer_types=kinds, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    )


def with_sink_logits():
    from transformers import GptOssConfig

    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return GptOssConfig(
        **SIZES, head_dim=16, sliding_window=32, layer_types=kinds, num_local_experts=4, num_experts_per_tok=2
    )


@pytest.mark.parametrize("config", [soft_capped, with_sink_logits])
def test_models_whose_attention_only_they_have(config):
    """They are calibrated and compressed, and attend to the decoded history."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    ids = tokens(400)
    expected = logits_of(model, ids, plain_cache(model))
    got = logits_of(model, ids, make_prompt_cache(model, method="identity"), 150)
    assert_close("identity", got, expected)
    assert_close("plain", logits_of(model, ids, plain_cache(model)), expected)
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False)
    profile, errors = profiler.profile_from_model(model, ByteTokenizer(), TEXT), []
    assert profile.shape.layers == (1, 2)
    for bits in (8.0, 4.0, 2.0):
        cache = make_prompt_cache(model, profile, bits)
        logits_of(model, ids[:, :360], cache)
        got = logits_of(model, ids[:, 360:], cache)
        errors.append(float((got - expected[:, 360:]).norm() / expected[:, 360:].norm()))
    assert errors == sorted(errors) and errors[0] < 0.01 and errors[-1] > 0.01, errors


def sharing():
    from transformers import Gemma3nTextConfig

    sizes = {**SIZES, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    own = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
    own |= {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4}
    return Gemma3nTextConfig(**sizes, head_dim=16, sliding_window=32, **own)


def in_two_halves():
    from transformers import DiffLlamaConfig

    return DiffLlamaConfig(**SIZES)


@pytest.mark.parametrize("config", [sharing, in_two_halves])
def test_models_that_attend_twice_to_one_pair(config):
    """Layers that share keys and values with an earlier one, and halves of a difference."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    ids = tokens(120)
    expected = logits_of(model, ids, plain_cache(model), 40)
    for chunk in (40, 7):
        got = logits_of(model, ids, make_prompt_cache(model, method="identity", window=16, sinks=4), chunk)
        assert_close("logits", got, expected)


# --- calibration


def test_dropout_stays_out_of_a_calibration():
    model = tiny_model("phi")
    ids = tokens(40)[0].tolist()
    expected = [layer.keys.clone() for layer in capture(model, ids).layers]
    for layer in model.model.layers:
        layer.resid_dropout.p = 0.5
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    for got, layer in zip(expected, capture(model, ids).layers):
        assert torch.equal(layer.keys, got)
    assert [module.training for module in model.modules()] == before


# --- copies and files by other means


def used_cache(**options):
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, **options)
    logits_of(model, tokens(300), cache)
    return model, cache


def test_a_cache_is_not_pickled(tmp_path):
    _, cache = used_cache(bits=3.0)
    for store in (pickle.dumps, lambda x: torch.save(x, tmp_path / "cache")):
        for what in (cache, cache.layers[0], {"cache": cache}):
            with pytest.raises(UsageError, match="save_prompt_cache"):
                store(what)


def test_copies_go_their_own_way():
    model, cache = used_cache(bits=3.0)
    follow = tokens(30, seed=4)
    copies = [copy.copy(cache), copy.deepcopy(cache)]
    expected = logits_of(model, follow, cache, 1)
    for one in copies:
        assert one.get_seq_length() == 300
        torch.testing.assert_close(logits_of(model, follow, one, 1), expected, rtol=0, atol=0)


def test_a_cache_is_read_layer_by_layer():
    """As transformers' own: keys, values and the window of every layer."""
    model, cache = used_cache(method="identity")
    plain = plain_cache(model)
    logits_of(model, tokens(300), plain)
    assert len(list(cache)) == len(cache) == 3
    for got, expected in zip(cache, plain):
        assert len(got) == len(expected)
        for a, b in zip(got, expected):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)
    assert [keys for keys, *_ in SpectralCache(model_and_profile("llama")[1])] == [None] * 3


def test_a_cache_stays_on_its_device():
    _, cache = used_cache(bits=3.0)
    for call in ("offload", "prefetch"):
        with pytest.raises(UsageError, match="device"):
            getattr(cache.layers[0], call)()


def test_a_mask_that_changes_in_inference_mode_is_read_again():
    """Such a mask does not count its changes."""
    model, ids = tiny_model("llama"), tokens(101)
    with torch.inference_mode():
        mask, found = torch.zeros(1, 1, 1, 101), []
        for cache in (plain_cache(model), make_prompt_cache(model, method="identity")):
            mask.zero_()
            model(ids[:, :100], past_key_values=cache)
            model(ids[:, 100:], past_key_values=cache, attention_mask=mask)
            cache.crop(-1)
            mask[..., :50] = torch.finfo(mask.dtype).min
            found.append(model(ids[:, 100:], past_key_values=cache, attention_mask=mask).logits)
    assert_close("logits", found[1], found[0])


def test_decoded_handles_are_laid_out_as_torch_expects():
    """`reshape` of a handle is planned by its own strides, which are those of a new tensor."""
    cache = make_prompt_cache(tiny_model("llama"), method="identity")
    new = torch.randn(2, 2, 5, 2, 16).transpose(2, 3)
    keys, values = cache.layers[0].update(*new)
    assert_close("keys", keys.reshape(4, 5, 16), new[0].reshape(4, 5, 16))
    assert_close("values", values.view(4, -1, 16), new[1].reshape(4, 5, 16))


def test_a_module_around_a_model_is_refused():
    with pytest.raises(UsageError, match="received a Sequential, which has no config. Give the model in it"):
        make_prompt_cache(torch.nn.Sequential(tiny_model("llama")), method="identity")


def test_windows_without_a_sliding_window_are_left_out():
    with pytest.raises(UsageError, match="only: no sliding window. Leave `windows` out."):
        make_prompt_cache(tiny_model("llama"), 3, method="turboquant", windows="turboquant")

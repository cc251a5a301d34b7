"""The PyTorch backend inside transformers' own forward pass and `generate`."""

from __future__ import annotations

import copy
import functools
import logging
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tolerances import assert_close  # noqa: E402
from torch_models import CONFIGS, ByteTokenizer, tiny_model, tokens  # noqa: E402

from spectral_kv_core.codecs.spectral import SpectralCodec  # noqa: E402
from spectral_kv_core.profile import store as profile_store  # noqa: E402
from spectral_kv_torch import (  # noqa: E402
    SpectralCache,
    SpectralProfiler,
    cache_nbytes,
    capture,
    integration,
    make_prompt_cache,
    ops,
    restore,
)
from spectral_kv_torch.cache import SpectralKVLayer  # noqa: E402
from spectral_kv_torch.generation import generate, plain_cache, score  # noqa: E402
from spectral_kv_torch.handles import Handle  # noqa: E402
from spectral_kv_torch.integration import ATTENTION, model_shape  # noqa: E402
from spectral_kv_torch.kernels import build  # noqa: E402
from spectral_kv_torch.kernels.attention import LatentStep  # noqa: E402

# uniformly random tokens, like the prompts below
TEXT = [bytes(b - 3 for b in tokens(1024, seed=9 + i)[0].tolist()).decode("latin-1") for i in range(2)]


@functools.cache
def model_and_profile(name: str):
    model = tiny_model(name)
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False)
    return model, profiler.profile_from_model(model, ByteTokenizer(), TEXT, name=name)


def logits_of(model, ids, cache, chunk=None, **kwargs):
    """Logits [B, T, V] of `ids` fed in chunks."""
    out = []
    with torch.no_grad():
        for part in torch.split(ids, chunk or ids.shape[1], dim=1):
            out.append(model(part, past_key_values=cache, use_cache=True, **kwargs).logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_identity_is_the_plain_cache(name):
    model = tiny_model(name)
    ids = tokens(150)
    expected = logits_of(model, ids, plain_cache(model))
    for chunk in (None, 40, 1):
        got = logits_of(model, ids, make_prompt_cache(model, method="identity"), chunk)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_spectral_is_close_at_8_bits_and_worse_at_1(name):
    model, profile = model_and_profile(name)
    ids = tokens(400)
    with torch.no_grad():
        expected = logits_of(model, ids[:, :380], plain_cache(model), 360)[:, 360:]
        errors = []
        for bits in (8.0, 4.0, 1.0):
            cache = make_prompt_cache(model, profile, bits=bits)
            got = logits_of(model, ids[:, :380], cache, 360)[:, 360:]
            errors.append(float((got - expected).pow(2).mean().sqrt() / expected.std()))
    assert 0 < errors[0] < 0.05 and errors[0] < errors[1] < errors[2], errors


def test_greedy_generate_equals_the_plain_cache():
    model, profile = model_and_profile("llama")
    ids = tokens(200)
    kwargs = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    expected = model.generate(ids, past_key_values=plain_cache(model), **kwargs)
    identity = model.generate(ids, past_key_values=make_prompt_cache(model, method="identity"), **kwargs)
    compressed = model.generate(ids, past_key_values=make_prompt_cache(model, profile, bits=8), **kwargs)
    assert torch.equal(identity, expected)
    assert compressed.shape == expected.shape


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "stock"])
def test_our_attention_function_gets_the_handles(monkeypatch, kernels):
    """The fast path really runs: nobody decodes the history while a step attends to codes."""
    model, profile = model_and_profile("llama")
    if not kernels:
        monkeypatch.setattr(ops, "kernels", None)
    elif build.library() is None:
        pytest.skip("there is no C compiler")
    cache = make_prompt_cache(model, profile)
    logits_of(model, tokens(300), cache)
    assert model.config._attn_implementation == ATTENTION
    decoded = []
    monkeypatch.setattr(Handle, "__torch_dispatch__", classmethod(lambda cls, func, *a, **k: decoded.append(func)))
    calls = []
    owner, name = (LatentStep, "__call__") if kernels else (SpectralCodec, "attend")
    attend = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *a: calls.append(1) or attend(self, *a))
    monkeypatch.setattr(SpectralCodec, "decode", lambda self, *a: pytest.fail("the history was decoded"))
    logits_of(model, tokens(1, seed=3), cache)
    assert not decoded and len(calls) == len(cache.layers)


def test_a_copy_of_a_cache_goes_its_own_way():
    """Reading a prefix once and copying it is what transformers' guide does."""
    model, profile = model_and_profile("llama")
    prefix, tail = tokens(300), tokens(40, seed=5)
    cache = make_prompt_cache(model, profile)
    logits_of(model, prefix, cache)
    copies = copy.deepcopy(cache)
    expected = logits_of(model, tail, cache, 1)
    assert (cache.get_seq_length(), copies.get_seq_length()) == (340, 300)
    assert torch.equal(logits_of(model, tail, copies, 1), expected)
    assert cache_nbytes(copies) == cache_nbytes(cache)
    assert cache_nbytes(copies).table_nbytes == cache_nbytes(cache).table_nbytes


def test_other_attention_gets_dense_keys():
    model, profile = model_and_profile("llama")
    ids = tokens(300)
    ours = logits_of(model, ids, make_prompt_cache(model, profile), 200)
    cache = make_prompt_cache(model, profile)
    restore(model)
    assert model.config._attn_implementation == "sdpa"
    dense = logits_of(model, ids, cache, 200)
    torch.testing.assert_close(dense, ours, atol=1e-4, rtol=1e-4)
    assert float((dense[:, 200:] - logits_of(model, ids, plain_cache(model))[:, 200:]).abs().max()) > 1e-4


def test_custom_loop_gets_dense_tensors():
    _, profile = model_and_profile("llama")
    cache = SpectralCache(profile, bits=4)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 300, 16, generator=generator)
    for start in range(0, 300, 100):
        keys, values = cache.update(k[:, :, start : start + 100], v[:, :, start : start + 100], layer_idx=0)
        assert keys.shape == values.shape == (1, 2, start + 100, 16)
        torch.testing.assert_close((keys + 0)[:, :, start:], k[:, :, start : start + 100])
        assert type(values + 0) is torch.Tensor and cache.get_seq_length() == start + 100
    torch.testing.assert_close((keys * 1)[:, :, :4], k[:, :, :4])


def test_plain_caches_are_left_alone():
    model = tiny_model("llama")
    ids = tokens(60)
    expected = logits_of(model, ids, plain_cache(model), 20)
    make_prompt_cache(model, method="identity")
    torch.testing.assert_close(logits_of(model, ids, plain_cache(model), 20), expected)


@pytest.mark.parametrize("method,bits", [("identity", None), ("spectral", 3), ("affine16", 4.5)])
@pytest.mark.parametrize("chunk", [None, 90])
def test_left_padded_batch_equals_the_rows_alone(method, bits, chunk, affine16):
    model, profile = model_and_profile("llama")
    method = affine16 if method == "affine16" else method
    long, short = tokens(260, seed=1), tokens(170, seed=2)
    ids = torch.cat([long, torch.cat([torch.full((1, 90), 2), short], dim=1)])
    mask = (torch.arange(260)[None] >= torch.tensor([[0], [90]])).long()

    def new():
        return make_prompt_cache(model, profile, bits, method=method)

    def feed(cache, start, stop):
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        with torch.no_grad():
            return model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=position, past_key_values=cache
            ).logits

    cache, batch = new(), []
    steps = [0, chunk, 258, 259, 260] if chunk else [0, 258, 259, 260]
    for start, stop in pairwise(steps):
        batch.append(feed(cache, start, stop))
    batch = torch.cat(batch, dim=1)
    first = [s for s in steps if s != chunk]
    alone_long, alone_short = new(), new()
    got_long = torch.cat([logits_of(model, long[:, a:b], alone_long) for a, b in pairwise(steps)], dim=1)
    got_short = torch.cat(
        [logits_of(model, short[:, max(a - 90, 0) : b - 90], alone_short) for a, b in pairwise(first)], dim=1
    )
    torch.testing.assert_close(batch[0], got_long[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(batch[1, 90:], got_short[0], atol=1e-4, rtol=1e-3)
    assert len(cache.layers[0].store.lanes) == 2
    assert int(cache_nbytes(cache)) == int(cache_nbytes(alone_long)) + int(cache_nbytes(alone_short))


@pytest.fixture
def affine16():
    from dataclasses import replace

    from spectral_kv_core.planning.methods import METHODS

    return replace(METHODS["affine"], group_size=16)


def test_left_padded_generate():
    model, _ = model_and_profile("llama")
    ids = torch.cat([tokens(100, seed=1), torch.cat([torch.full((1, 30), 2), tokens(70, seed=2)], dim=1)])
    mask = (torch.arange(100)[None] >= torch.tensor([[0], [30]])).long()
    kwargs = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(ids, past_key_values=plain_cache(model), **kwargs)
    got = model.generate(ids, past_key_values=make_prompt_cache(model, method="identity"), **kwargs)
    assert torch.equal(got, expected)


def test_right_padding_is_refused():
    model, profile = model_and_profile("llama")
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, 40:] = 0
    with pytest.raises(ValueError, match="left"), torch.no_grad():
        model(tokens(50, batch=2), attention_mask=mask, past_key_values=make_prompt_cache(model, profile))


@pytest.mark.parametrize("removed", [5, 100, 350])
def test_crop_goes_back_in_time(removed):
    """Into the window, into a sealed chunk, and further: what is left is what was there before."""
    model, profile = model_and_profile("llama")
    ids = tokens(400)
    cache = make_prompt_cache(model, profile, bits=8)
    logits_of(model, ids, cache)
    before = [layer.store.dense() for layer in cache.layers]
    cache.crop(-removed)
    assert cache.get_seq_length() == 400 - removed
    for layer, (keys, values) in zip(cache.layers, before):
        for now, then in zip(layer.store.dense(), (keys, values)):
            torch.testing.assert_close(now, then[:, :, : 400 - removed], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    again = logits_of(model, ids[:, 400 - removed :], cache)
    expected = logits_of(model, ids, plain_cache(model))[:, 400 - removed :]
    assert float((again - expected).pow(2).mean().sqrt() / expected.std()) < 0.1


def test_beam_search_equals_the_plain_cache():
    model, profile = model_and_profile("llama")
    ids = tokens(120, batch=2)
    kwargs = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, past_key_values=plain_cache(model), **kwargs)
    assert torch.equal(
        model.generate(ids, past_key_values=make_prompt_cache(model, method="identity"), **kwargs), expected
    )
    assert model.generate(ids, past_key_values=make_prompt_cache(model, profile, bits=8), **kwargs).shape[0] == 2


def test_reorder_moves_codes_with_their_rows():
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, bits=3)
    logits_of(model, tokens(300, batch=3), cache)
    before = cache.layers[1].store.dense()[0]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(cache.layers[1].store.dense()[0], before[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    torch.testing.assert_close(cache.layers[1].store.dense()[0], before[[2, 0]])


def test_one_cache_over_several_calls():
    """Chat turns: tokens fed in pieces give codes and logits as when they come in one stream of the same pieces."""
    model, profile = model_and_profile("qwen3")
    ids = tokens(330)
    cache = make_prompt_cache(model, profile, bits=4)
    kwargs = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **kwargs)
    assert cache.get_seq_length() == first.shape[1] - 1
    longer = torch.cat([first, tokens(50, seed=5)], dim=1)
    second = model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **kwargs)
    assert cache.get_seq_length() == second.shape[1] - 1
    fresh = make_prompt_cache(model, profile, bits=4)
    logits_of(model, first[:, :330], fresh)
    logits_of(model, first[:, 330:-1], fresh, 1)
    logits_of(model, second[:, first.shape[1] - 1 : longer.shape[1]], fresh)
    logits_of(model, second[:, longer.shape[1] : -1], fresh, 1)
    for mine, theirs in zip(cache.layers, fresh.layers):
        torch.testing.assert_close(mine.store.dense()[0], theirs.store.dense()[0], atol=1e-4, rtol=1e-4)


def reachable_bytes(root) -> int:
    """Bytes of every tensor storage that can be reached through attributes of `root`."""
    seen, storages, stack = set(), {}, [root]
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, (type, ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            stack += x.values()
        elif isinstance(x, (list, tuple, set)):
            stack += x
        elif hasattr(x, "__dict__"):
            stack += vars(x).values()
    return sum(storages.values())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("method,bits", [("identity", None), ("spectral", 2.5)])
def test_reported_bytes_are_all_there_is(name, method, bits):
    model, profile = model_and_profile(name)
    cache = make_prompt_cache(model, profile, bits, method=method)
    logits_of(model, tokens(700), cache, 300)
    logits_of(model, tokens(37, seed=4), cache, 1)
    size = cache_nbytes(cache)
    passed = 8 * sum(hasattr(layer, "_sliding_window_tensor") for layer in cache.layers)  # the host's own bookkeeping
    assert reachable_bytes(cache) == int(size) + size.table_nbytes + passed
    if method == "identity":
        assert size.compression == pytest.approx(0.5, rel=1e-2)  # float32 against 16 bits
    if name == "llama":
        assert size.dense_nbytes == 737 * 3 * 2 * 2 * 16 * 2


def test_decoded_chunks_stay_where_they_may():
    model, profile = model_and_profile("llama")
    with pytest.raises(ValueError, match="spectral-dense"):
        make_prompt_cache(model, profile, 3.0, working_set=10**6)
    caches = [
        make_prompt_cache(model, profile, 3.0, method="spectral-dense", working_set=n) for n in (0, 10**6, 150_000)
    ]
    outputs = [(logits_of(model, tokens(700), c), logits_of(model, tokens(2, seed=1), c, 1)) for c in caches]
    for (prompt, decoded), cache in zip(outputs[1:], caches[1:]):
        assert torch.equal(prompt, outputs[0][0])
        assert_close("logits from chunks in 16 bits", decoded, outputs[0][1], "float16")
        for layer, plain in zip(cache.layers, caches[0].layers):
            (lane,), (other,) = layer.store.lanes, plain.store.lanes
            for chunk, expected in zip(lane.chunks, other.chunks, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(chunk.arrays, expected.arrays, strict=True))
            for (chunk, _), held in lane.decoded.items():
                for x, exact in zip(held, layer.store.codec.decode(chunk)):
                    assert torch.equal(x, exact.half())
    assert len(caches[1].layers[0].store.lanes[0].decoded) == len(caches[1].layers[0].store.lanes[0].chunks)
    none, all_of_it, some = (int(cache_nbytes(cache)) for cache in caches)
    sealed = caches[1].layers[0].store.lanes[0].sealed
    assert all_of_it - none == 3 * sealed * 2 * 2 * 2 * 16 and some == none  # a third of it is no chunk
    size = cache_nbytes(caches[1])
    assert reachable_bytes(caches[1]) == int(size) + size.table_nbytes


def test_sealed_bits_stay_below_the_ceiling():
    model, profile = model_and_profile("qwen3")
    for bits in (1.0, 2.3, 4.0):
        cache = make_prompt_cache(model, profile, bits)
        logits_of(model, tokens(1500), cache)
        stores = [layer.store for layer in cache.layers]
        stored = sum(a.numel() for s in stores for chunk in s.lanes[0].chunks for a in chunk.arrays)
        elements = sum(s.lanes[0].sealed for s in stores) * 2 * 2 * 32
        assert 0.93 * bits < stored * 8 / elements <= bits


def test_budget_bytes_holds(caplog):
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, budget_bytes=120_000, max_context=1000)
    logits_of(model, tokens(1000), cache)
    assert 110_000 < int(cache_nbytes(cache)) <= 120_000
    with pytest.raises(ValueError, match=r"between [\d,]+ and [\d,]+"):
        make_prompt_cache(model, profile, budget_bytes=1000, max_context=1000)
    with pytest.raises(ValueError, match="max_context"):
        make_prompt_cache(model, profile, budget_bytes=1000)
    with pytest.raises(ValueError, match="between 0.25 and 8"):
        make_prompt_cache(model, profile, bits=11)


def test_passed_layers_are_named_once(caplog):
    model, profile = model_and_profile("gemma3")
    shape, passed = model_shape(model)
    assert shape.layers == (1, 2) and passed == {0: "sliding window"}
    profile_store.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "spectralkv"):
        cache = make_prompt_cache(model, profile)
        make_prompt_cache(model, profile)
    assert sum("sliding window" in record.message for record in caplog.records) == 1
    assert [isinstance(layer, SpectralKVLayer) for layer in cache.layers] == [False, True, True]


@pytest.mark.parametrize("name", CONFIGS)
def test_capture_sees_true_queries_keys_and_values(name):
    """Attention rebuilt from what was captured gives what the layer's output projection received."""
    model = tiny_model(name)
    layers = model.model.layers
    seen = {}

    def remember(i):
        return lambda module, inputs: seen.__setitem__(i, inputs[0].detach())

    projections = [getattr(layer.self_attn, "o_proj", None) or layer.self_attn.dense for layer in layers]
    hooks = [projection.register_forward_pre_hook(remember(i)) for i, projection in enumerate(projections)]
    cache = capture(model, tokens(90)[0].tolist())
    for hook in hooks:
        hook.remove()
    assert model.config._attn_implementation == "sdpa"
    for i in model_shape(model)[0].layers:
        captured = cache.layers[i]
        out = torch.nn.functional.scaled_dot_product_attention(
            captured.queries, captured.keys, captured.values, is_causal=True, enable_gqa=True,
            scale=layers[i].self_attn.scaling,
        )  # fmt: skip
        torch.testing.assert_close(out.transpose(1, 2).flatten(2), seen[i], atol=1e-4, rtol=1e-4)


def test_score_gradients_match_finite_differences():
    from spectral_kv_torch.capture import score_gradients

    model = tiny_model("llama").double()
    ids = tokens(60)[0].tolist()
    cache = capture(model, ids[:40])
    gradients = score_gradients(model, cache, ids[40:], 1, torch.Generator().manual_seed(7))[0]
    layer = cache.layers[1]

    def loss(shift):
        saved = layer.keys
        layer.keys = saved.detach() + shift
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids[40:]]), past_key_values=cache).logits[0].float(), -1)
        layer.keys = saved
        return log_p

    labels = torch.multinomial(loss(0.0).exp(), 1, generator=torch.Generator().manual_seed(7))
    direction = torch.randn(layer.keys.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    step = 1e-3
    slope = (loss(step * direction).gather(1, labels).sum() - loss(-step * direction).gather(1, labels).sum()) / (
        2 * step
    )
    assert float((gradients[1][0] * direction[0]).sum()) == pytest.approx(float(slope), rel=2e-2)


def test_profile_errors_come_before_work():
    model, profile = model_and_profile("llama")
    with pytest.raises(ValueError, match="profile of this model"):
        make_prompt_cache(tiny_model("qwen3"), profile)
    with pytest.raises(ValueError, match="at least 64 tokens"):
        SpectralProfiler(progress=False).profile_from_model(model, ByteTokenizer(), ["short"])
    broken = tiny_model("llama")
    broken.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        SpectralProfiler(tokens=128, document=128, progress=False).profile_from_model(broken, ByteTokenizer(), TEXT)
    with pytest.raises(ValueError, match="NaN"):
        logits_of(broken, tokens(200), make_prompt_cache(broken, profile))
    with pytest.raises(ValueError, match="multiple of the group"):
        make_prompt_cache(model, method="affine")
    with pytest.raises(ValueError, match="kv_heads"):
        SpectralCache(profile).update(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16), layer_idx=0)


def test_profile_is_deterministic_and_serves_every_budget(tmp_path):
    model, profile = model_and_profile("qwen2")
    again = SpectralProfiler(tokens=2048, document=1024, progress=False).profile_from_model(
        model, ByteTokenizer(), TEXT, name="qwen2"
    )
    np.testing.assert_array_equal(again.basis_sets["head.post"].cost, profile.basis_sets["head.post"].cost)
    loaded = type(profile).load(profile.save(tmp_path / "p.safetensors"))
    for bits in (1.0, 1.37, 5.5, 8.0):
        cache = make_prompt_cache(model, loaded, bits)
        assert bits - 0.05 < cache.plan.bits_per_element <= bits


def test_profile_without_a_backward_pass_serves_too():
    """Gradients of every layer's own output: another plan, from the same means, bases and spectra."""
    model, profile = model_and_profile("qwen2")
    profiler = SpectralProfiler(tokens=2048, document=1024, gradients=False, progress=False)
    local = profiler.profile_from_model(model, ByteTokenizer(), TEXT)
    assert local.calibration["gradients"] == "local" and profile.calibration["gradients"] == "score"
    ours, theirs = (p.basis_sets["head.post"] for p in (profile, local))
    # a pass that records gradients may differ in the last bits from one that does not; vectors wait in float16
    assert_close("mean", theirs.mean, ours.mean)
    assert_close("variance", theirs.variance, ours.variance)
    assert_close(
        "variance of every coefficient", theirs.variance / ours.variance, np.ones_like(ours.variance), "float16"
    )
    assert np.isfinite(theirs.cost).all() and (theirs.sensitivity > 0).mean() > 0.99
    ids = tokens(300)
    expected = logits_of(model, ids, plain_cache(model))[:, 250:]
    got = logits_of(model, ids, make_prompt_cache(model, local, bits=8.0), 250)[:, 250:]
    assert float((got - expected).pow(2).mean().sqrt() / expected.std()) < 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_probe_changes_one_layer_and_keeps_nothing(name):
    model, profile = model_and_profile(name)
    ids = tokens(120)[0].tolist()
    held, log_p = SpectralProfiler().probe(model, profile.shape, ids, 10)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -10:], -1).numpy()
    np.testing.assert_allclose(log_p({}), expected, atol=2e-4)
    assert [x.shape for x in held[0]] == [(1, 2, 110, profile.shape.head_dim)] * 2
    keys, values = held[1]
    changed = log_p({1: (keys, 0.5 * values)})
    assert np.abs(changed - expected).max() > 1e-2
    np.testing.assert_array_equal(log_p({1: (keys, values)}), log_p({}))
    np.testing.assert_allclose(log_p({}), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_probe_runs_no_layer_below_the_one_that_it_changes(name):
    """Also where something else has put itself before a layer's forward, as accelerate does for several devices."""
    model, profile = model_and_profile(name)
    ids, runs = tokens(120)[0].tolist(), []
    (held, log_p), (_, without) = (SpectralProfiler().probe(model, profile.shape, ids, 10) for _ in range(2))
    log_p({})

    def counted(forward):
        return lambda *args, **options: runs.append(forward) or forward(*args, **options)

    layers = model.model.layers
    for layer in layers[1:]:
        layer.forward = counted(layer.forward)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for n, i in enumerate(profile.shape.layers):
            changed = {n: (held[n][0], 0.5 * held[n][1])}
            expected = without(changed)
            runs.clear()
            np.testing.assert_array_equal(log_p(changed), expected)
            assert len(runs) == len(layers) - max(i, 1)
        assert [layer.__dict__.get("forward") for layer in layers] == before and before[0] is None
    finally:
        for layer in layers[1:]:
            del layer.forward


def test_generate_and_score_report_times_and_logits():
    model, profile = model_and_profile("llama")
    prompt, seen = tokens(100)[0].tolist(), []
    out = generate(model, ByteTokenizer(), prompt, make_prompt_cache(model, profile), 8, True, seen.append)
    assert out.tokens == seen and len(seen) == 8 and len(out.times) == 9
    assert out.prefill_tokens_per_s(100) > 0 and out.decode_tokens_per_s() > 0
    plain = score(model, prompt, out.tokens, plain_cache(model))
    assert plain.shape == (8, 256)
    ids = torch.tensor([prompt + out.tokens[:-1]])
    with torch.no_grad():
        expected = model(ids).logits[0, 99:]
    np.testing.assert_allclose(plain, expected.numpy(), atol=1e-4)


def test_a_mask_is_read_once_for_all_layers(monkeypatch):
    reads = []
    monkeypatch.setattr(integration, "left_padding", lambda mask, _: reads.append(1) or [int((~mask[0, 0, -1]).sum())])
    mask = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    assert [integration._last_padding(mask, 4) for _ in range(3)] == [[0]] * 3 and len(reads) == 1
    mask[..., :2] = False
    assert integration._last_padding(mask, 4) == [2]
    with torch.inference_mode():
        other = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    assert [integration._last_padding(x, 4) for x in (other, other, mask)] == [[0], [0], [2]] and len(reads) == 4

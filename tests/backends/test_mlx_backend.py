"""What only mlx-lm asks of a backend, and both backends on the same weights: `test_backend.py` has the rest."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import copy
import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn
import mlx_host
import mlx_lm
from hosts import FAMILIES, SMALL, only
from mlx_lm.generate import generate_step
from mlx_lm.models import base, llama
from mlx_lm.models import cache as host_cache
from mlx_lm.models.rope_utils import initialize_rope
from mlx_models import calibrate, close, feed, make_model, make_tokens, save_llama

from spectral_kv_core.arrays.rope import rotate
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.codecs.transform import TransformCodec
from spectral_kv_core.hosts.weights import are_other_weights
from spectral_kv_mlx import (
    SpectralProfiler,
    cache_nbytes,
    capture,
    load_model,
    make_prompt_cache,
    ops,
    restore,
)
from spectral_kv_mlx.cache import SpectralKVCache
from spectral_kv_mlx.capture import label_gradients, score_gradients
from spectral_kv_mlx.generation import generate, plain_cache, score
from spectral_kv_mlx.handles import routing
from spectral_kv_mlx.integration import install, model_shape, weights_digest
from spectral_kv_mlx.masks import MaskCheck
from spectral_kv_mlx.rotation import measure_rope, rope_of_module


@pytest.fixture(scope="module", params=FAMILIES["mlx"])
def family(request):
    return SimpleNamespace(
        name=request.param, model=mlx_host.model(request.param), profile=mlx_host.profile(request.param)
    )


@pytest.fixture(scope="module")
def tiny():
    return SimpleNamespace(model=mlx_host.model("llama"), profile=mlx_host.profile("llama"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The same tiny Llama on disk, in transformers, and through our `load_model`; its RoPE base is not the default."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("llama")
    theirs = save_llama(path, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    ours, tokenizer = load_model(path)
    return SimpleNamespace(path=path, torch=theirs, mlx=ours, tokenizer=tokenizer)


@only("mlx", "transformers makes the mask itself, from one that tells padding")
def test_a_mask_that_is_not_causal_goes_to_the_attention_of_the_host(tiny):
    """Of booleans or of numbers that are added: all see all, and what nobody may see, also by a single new token."""
    install(tiny.model)
    x, attention = mx.random.normal((1, 13, 64), key=mx.random.key(0)), tiny.model.layers[0].self_attn
    causal, hole = mx.tril(mx.ones((6, 6), dtype=mx.bool_)), mx.arange(13)[None] != 3
    bias = mx.random.normal((4, 6, 12), key=mx.random.key(1))
    for later in (mx.ones((6, 12), dtype=mx.bool_), mx.where(hole[:, :12], mx.zeros((6, 12)), -mx.inf), bias):
        outputs = []
        for cache in (host_cache.KVCache(), make_prompt_cache(tiny.model, method="identity")[0]):
            first = attention(x[:, :6], causal, cache)
            steps = [attention(x[:, 6:12], later, cache), attention(x[:, 12:], hole, cache)]
            outputs.append(mx.concatenate([first, *steps], axis=1))
        close(outputs[1], outputs[0], 1e-5)


@only("mlx", "transformers makes the mask itself, from one that tells padding")
def test_a_mask_of_the_new_tokens_alone_is_refused(tiny):
    install(tiny.model)
    x, cache = mx.zeros((1, 6, 64)), make_prompt_cache(tiny.model, method="identity")[0]
    attention = tiny.model.layers[0].self_attn
    attention(x, "causal", cache)
    with pytest.raises(ValueError, match="a mask for 12 tokens, received one for 6"):
        attention(x, mx.tril(mx.ones((6, 6), dtype=mx.bool_)), cache)


@only("mlx", "trim of mlx-lm returns how much it took away")
def test_trim_everything_and_more(tiny):
    cache = make_prompt_cache(tiny.model, tiny.profile, 4.0, **SMALL)
    feed(tiny.model, cache, make_tokens(50))
    assert host_cache.trim_prompt_cache(cache, 80) == 50
    assert cache[0].empty() and cache[0].nbytes == 0 and cache[0].keys_and_values() == (None, None)
    assert feed(tiny.model, cache, make_tokens(5)).shape == (5, 256)


@only("mlx", "generate of mlx-lm takes text")
def test_mlx_lm_generate_and_several_turns(checkpoint):
    model, tokenizer = checkpoint.mlx, checkpoint.tokenizer
    for turn in ("one text", " and another one"):
        cache, plain = make_prompt_cache(model, method="identity"), plain_cache(model)
        for _ in range(2):
            text = mlx_lm.generate(model, tokenizer, turn, prompt_cache=cache, max_tokens=9)
            assert text == mlx_lm.generate(model, tokenizer, turn, prompt_cache=plain, max_tokens=9)
            assert cache[0].offset == plain[0].offset
    cache = make_prompt_cache(model, calibrate(model), 3.0, **SMALL)
    parts = list(mlx_lm.stream_generate(model, tokenizer, "once more " * 8, prompt_cache=cache, max_tokens=20))
    assert len(parts) >= 1 and cache[0].offset > 80
    assert cache[0].store.padding_groups[0].sealed > 0


@only("mlx", "caches of mlx-lm alone")
def test_caches_of_other_kinds_are_untouched_while_installed(tiny):
    tokens = make_tokens(40)
    install(tiny.model)
    assert llama.scaled_dot_product_attention is not base.scaled_dot_product_attention
    for other in (host_cache.QuantizedKVCache(group_size=32, bits=8), host_cache.RotatingKVCache(max_size=64)):
        layers = [other, copy.deepcopy(other)]
        assert feed(tiny.model, layers, tokens).shape == (40, 256)


@only("mlx", "attention of mlx-lm belongs to a module, that of transformers to a model")
def test_restore_counts_models_of_a_family():
    mlx_host.restore(mlx_host.model("qwen2"))
    a, b = make_model("qwen2"), make_model("qwen2", seed=1)
    module = pytest.importorskip("mlx_lm.models.qwen2")
    for model in (a, b, a):
        install(model)
    restore(a)
    assert module.scaled_dot_product_attention is not base.scaled_dot_product_attention
    restore(b)
    restore(b)
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention
    install(a)
    install(b)
    del a, model
    gc.collect()
    restore(b)
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention


@only("mlx", "a call of transformers tells by handles who attends")
def test_tokens_that_nobody_attends_to_are_kept(tiny):
    cache = make_prompt_cache(tiny.model, method="identity")[0]
    x = mx.random.normal((1, 2, 7, 32), key=mx.random.key(0))
    cache.update_and_fetch(x, x)
    install(tiny.model)
    for _ in range(2):
        with pytest.raises(ValueError, match="the model has attended elsewhere"), routing():
            assert cache.update_and_fetch(x, x)[0] is x
    assert cache.offset == 21 and cache.keys_and_values()[0].shape == (1, 2, 21, 32) and cache.offset == 21


class Wrapper:
    """A cache around another with what a model calls and no more, as loggers and servers have them."""

    def __init__(self, inner):
        self.inner = inner

    def update_and_fetch(self, keys, values):
        return self.inner.update_and_fetch(keys, values)

    def make_mask(self, *args, **options):
        return self.inner.make_mask(*args, **options)

    @property
    def offset(self):
        return self.inner.offset

    @property
    def state(self):
        return self.inner.state


@only("mlx", "update of transformers gives handles, which go through a wrapper")
def test_a_wrapped_cache_is_attended_as_codes(tiny, monkeypatch):
    """Whoever stands between the model and our cache: neither a slower way without a word, nor the new tokens alone."""
    tokens = make_tokens(120)
    caches = [make_prompt_cache(tiny.model, tiny.profile, 3.0, **SMALL) for _ in range(2)]
    expected = feed(tiny.model, caches[0], tokens, 40)
    monkeypatch.setattr(LayerCache, "dense", lambda self, *a: pytest.fail("decoded"))
    assert np.array_equal(feed(tiny.model, [Wrapper(layer) for layer in caches[1]], tokens, 40), expected)


@only("mlx", "update of transformers gives handles, which a change makes dense")
def test_a_cache_that_changes_keys_is_refused(tiny):
    class Cast(Wrapper):
        def update_and_fetch(self, keys, values):
            return tuple(x.astype(mx.float16) for x in self.inner.update_and_fetch(keys, values))

    cache = make_prompt_cache(tiny.model, tiny.profile, 3.0, **SMALL)
    with pytest.raises(ValueError, match="keys and values that update_and_fetch gave back"):
        feed(tiny.model, [Cast(layer) for layer in cache], make_tokens(20))


@only("mlx", "test_a_mask_is_read_once_for_all_layers has the masks of transformers")
def test_the_last_mask_is_not_kept(tiny):
    tokens, mask = make_tokens(20), mx.array(np.tril(np.ones((20, 20), bool)))
    check, cache = MaskCheck(), make_prompt_cache(tiny.model, tiny.profile, 3.0, **SMALL)
    feed(tiny.model, cache, tokens)
    assert check(mask, cache[0], 20) == ""
    found = weakref.ref(mask)
    del mask
    assert found() is None
    assert check(mx.zeros((20, 20), mx.bool_), cache[0], 20) == "a mask that is not causal"


@only("mlx", "transformers has attention functions by name")
def test_attention_modules_are_given_back():
    mlx_host.restore(mlx_host.model("qwen2"))
    model = make_model("qwen2", seed=4)
    cls = type(model.layers[0].self_attn)
    before = cls.__call__
    install(model)
    assert cls.__call__ is not before
    restore(model)
    assert cls.__call__ is before


@only("mlx", "the protocol of mlx-lm's caches")
def test_host_protocol(tiny):
    cache = make_prompt_cache(tiny.model, tiny.profile, 3.0, **SMALL)[0]
    for name in ("bits", "to_quantized"):
        assert not hasattr(cache, name)
    assert host_cache.can_trim_prompt_cache([cache]) and cache.empty() and cache.offset == 0
    assert cache.make_mask(1) is None and cache.make_mask(4) == "causal"
    assert cache.make_mask(4, return_array=True).shape == (4, 4)
    mx.eval([cache.state])


@only("mlx", "caches of transformers have no state to read and set")
def test_state_round_trip(tiny):
    cache = make_prompt_cache(tiny.model, tiny.profile, 3.0, **SMALL)
    feed(tiny.model, cache, make_tokens(100))
    copies = copy.deepcopy(cache)
    restored = make_prompt_cache(tiny.model, tiny.profile, 3.0, **SMALL)
    for new, old in zip(restored, cache):
        new.state = old.state
    tail = make_tokens(30, seed=8)
    expected = feed(tiny.model, cache, tail)
    assert [c.offset for c in copies] == [100, 100] and [c.offset for c in cache] == [130, 130]
    assert np.array_equal(feed(tiny.model, copies, tail), expected)
    assert np.array_equal(feed(tiny.model, restored, tail), expected)
    other = make_prompt_cache(tiny.model, tiny.profile, 2.0, **SMALL)
    with pytest.raises(ValueError, match="plan"):
        other[0].state = cache[0].state
    with pytest.raises(ValueError, match="make_prompt_cache"):
        SpectralKVCache.from_state(cache[0].state)


@only("mlx", "caches of transformers have no state to read and set")
def test_reading_the_state_leaves_a_prompt_open(tiny):
    """mlx-lm evaluates it after every piece of a prompt."""
    prompt, tail = make_tokens(150), make_tokens(4, seed=8)
    expected, cache, restored = (make_prompt_cache(tiny.model, tiny.profile, 2.0, **SMALL) for _ in range(3))
    feed(tiny.model, expected, prompt, 50)
    for start in range(0, 150, 50):
        feed(tiny.model, cache, prompt[start : start + 50])
        mx.eval([c.state for c in cache])
    assert all(c.store.is_staged for c in cache)
    for new, old in zip(restored, cache):
        new.state = old.state
    expected = feed(tiny.model, expected, tail, 1)
    for other in (cache, restored):
        assert np.array_equal(feed(tiny.model, other, tail, 1), expected) and not other[0].store.is_staged


@only("mlx", "generate_step feeds the last token alone")
def test_mlx_lm_reads_a_prompt_in_pieces_as_one_prompt(tiny):
    prompt, options = mx.array(make_tokens(150)), {"max_tokens": 3, "prefill_step_size": 50}
    caches = [make_prompt_cache(tiny.model, tiny.profile, 2.0, **SMALL) for _ in range(2)]
    list(generate_step(prompt, tiny.model, prompt_cache=caches[0], **options))
    feed(tiny.model, caches[1], prompt.tolist()[:149], 50)
    feed(tiny.model, caches[1], make_tokens(1), 1)
    for ours, theirs in zip(*caches):
        assert theirs.store.padding_groups[0].sealed == 128
        for a, b in zip(ours.store.dense(), theirs.store.dense()):
            assert mx.array_equal(a[:, :, 4:132], b[:, :, 4:132])


@only("mlx", "mlx-lm allocates plain caches in steps of 256 tokens")
def test_bytes_of_every_array(family):
    model, tokens = family.model, make_tokens(300)
    plain, cache = plain_cache(model), make_prompt_cache(model, family.profile, 3.0, **SMALL)
    for c in (plain, cache):
        feed(model, c, tokens)
    shape, passed = model_shape(model)
    full = 300 * len(shape.layers) * 2 * shape.kv_heads * shape.head_dim
    sliding = cache_nbytes([plain[i] for i in passed])
    assert cache_nbytes(plain).dense_nbytes == cache_nbytes(cache).dense_nbytes == 2 * full + sliding.dense_nbytes
    assert cache_nbytes(plain) - sliding == 4 * full * 512 // 300  # float32, allocated in steps of 256
    held = [a for i in shape.layers for a in cache[i].state[1:]]
    assert cache_nbytes(cache) == sum(a.nbytes for a in held) + cache_nbytes([cache[i] for i in passed])
    ours = [cache[i] for i in shape.layers]
    sealed = ours[0].store.padding_groups[0].sealed
    codes = sum(a.nbytes for c in ours for chunk in c.store.padding_groups[0].chunks for a in chunk.arrays)
    assert sealed >= 256 and 2.5 < codes * 8 / (full * sealed / 300) <= 3.01  # rows end in whole bytes
    assert cache_nbytes(cache).table_nbytes > 0 and cache_nbytes(make_prompt_cache(model, method="identity")) == 0


ROPES = {
    "plain": nn.RoPE(32, base=5e5),
    "partial": nn.RoPE(16),
    "traditional": nn.RoPE(32, traditional=True),
    "partial traditional": nn.RoPE(8, traditional=True, base=100.0),
    "linear": initialize_rope(32, 1e4, False, {"rope_type": "linear", "factor": 4.0}),
    "llama3": initialize_rope(
        32, 5e5, False, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    ),
    "yarn": initialize_rope(
        32, 1e4, False, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    ),
    "longrope": initialize_rope(
        32,
        1e4,
        False,
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0 + i / 4 for i in range(16)],
        },
        512,
    ),
    "proportional": initialize_rope(32, 1e4, False, {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
    "dynamic": initialize_rope(32, 1e4, False, {"rope_type": "dynamic", "factor": 2.0}, 4096),
}


READ = [(name, reader) for name in ROPES for reader in (rope_of_module, measure_rope)]
READ.remove(("proportional", measure_rope))  # pairs that stand still cannot be told from channels that are not rotated


@only("mlx", "RoPE modules of MLX; test_rope.py has those of transformers")
@pytest.mark.parametrize("name, reader", READ)
def test_rope_is_read_from_the_module(name, reader):
    module = ROPES[name]
    rope = reader(module, 32)
    x = mx.random.normal((1, 2, 9, 32), key=mx.random.key(0))
    for offset in (0, 3, 700):
        close(rotate(ops, x, rope, offset), module(x, offset=offset), 2e-3 if reader is measure_rope else 2e-4)


@only("mlx", "steps for float32; test_torch_backend.py takes float64")
def test_score_gradients_are_derivatives(family):
    cache = capture(family.model, make_tokens(40))
    i = model_shape(family.model)[0].layers[0]
    follow, labels = make_tokens(6, seed=3), mx.array(make_tokens(6, seed=4))
    gradient = label_gradients(family.model, cache, follow, labels)[i]

    def log_p(keys, values):
        held = [copy.copy(c) if hasattr(c, "leaves") else copy.deepcopy(c) for c in cache]
        held[i].keys, held[i].values = keys, values
        for c in held:
            if hasattr(c, "leaves"):
                c.leaves = True
        logits = family.model(mx.array([follow]), cache=held)[0]
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logits, labels[:, None], axis=-1).sum().item()

    for side in (0, 1):
        held = [cache[i].keys, cache[i].values]
        direction = gradient[side][None] / mx.linalg.norm(gradient[side])
        high, low = ([x + s * 0.03 * direction if n == side else x for n, x in enumerate(held)] for s in (1, -1))
        slope = (log_p(*high) - log_p(*low)) / 0.06
        assert slope == pytest.approx(mx.linalg.norm(gradient[side]).item(), rel=0.05)


@only("mlx", "random numbers of MLX come from keys")
def test_score_gradients_depend_on_their_key_only(tiny):
    cache = capture(tiny.model, make_tokens(40))

    def draw(key, globally):
        mx.random.seed(globally)
        return score_gradients(tiny.model, cache, make_tokens(8, seed=3), 2, key)

    first, again, other = draw(0, 1), draw(0, 2), draw(1, 1)
    assert mx.array_equal(first[0][0][0], again[0][0][0])
    assert not mx.allclose(first[0][0][0], first[1][0][0]) and not mx.allclose(first[0][0][0], other[0][0][0])


@only("mlx", "transformers reads its own configurations")
def test_load_model_reads_the_rope_base_where_transformers_5_writes_it(checkpoint):
    torch = pytest.importorskip("torch")
    assert "rope_theta" not in json.loads((checkpoint.path / "config.json").read_text())
    tokens = make_tokens(300)
    with torch.no_grad():
        expected = checkpoint.torch(torch.tensor([tokens])).logits[0].numpy()
    close(feed(checkpoint.mlx, None, tokens), expected, 1e-3)


@only("mlx", "transformers reads its own configurations")
@pytest.mark.parametrize("family_name", ["gemma3", "llama3", "yarn", "qwen3"])
def test_load_model_understands_configurations_of_transformers_5(tmp_path, family_name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from mlx_models import SIZES

    sizes = {**SIZES, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": 0}
    if family_name == "gemma3":
        ropes = {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, sliding_window=32, layer_types=types, rope_parameters=ropes, query_pre_attn_scalar=32
        )
        kind = transformers.Gemma3ForCausalLM
    elif family_name == "qwen3":
        config = transformers.Qwen3Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        kind = transformers.Qwen3ForCausalLM
    else:
        scaling = {"rope_type": family_name, "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
        if family_name == "llama3":
            scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config, kind = transformers.LlamaConfig(**sizes, rope_parameters=scaling), transformers.LlamaForCausalLM
    save_llama(tmp_path)  # for the tokenizer
    torch.manual_seed(0)
    theirs = kind(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape) * 1.5 * p.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path)
    tokens = make_tokens(150)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    close(feed(ours, None, tokens), expected, 2e-3)
    from spectral_kv_torch.integration import model_shape as torch_shape

    shape, expected_shape = model_shape(ours)[0], torch_shape(theirs)[0]
    assert expected_shape.mismatch(shape) is None and shape.fingerprint == expected_shape.fingerprint


@only("mlx", "transformers tells a missing model by itself")
def test_load_model_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (tmp_path / "none", "nobody/no-such-model", tmp_path):
        with pytest.raises(FileNotFoundError, match="Expected a model directory") as caught:
            load_model(name)
        assert "\n" not in str(caught.value)


@only("mlx", "both hosts on one checkpoint, in the process of MLX")
def test_backends_agree_on_one_model(checkpoint):
    torch = pytest.importorskip("torch")
    import spectral_kv_torch
    from spectral_kv_torch.capture import capture as torch_capture
    from spectral_kv_torch.capture import score_gradients as torch_gradients
    from spectral_kv_torch.integration import model_shape as torch_shape
    from spectral_kv_torch.integration import weights_digest as torch_digest

    shape, theirs = model_shape(checkpoint.mlx)[0], torch_shape(checkpoint.torch)[0]
    assert theirs.mismatch(shape) is None and shape.fingerprint == theirs.fingerprint
    assert weights_digest(checkpoint.mlx) == torch_digest(checkpoint.torch) != ""
    tokens, follow = make_tokens(80), make_tokens(10, seed=2)
    ours, expected = capture(checkpoint.mlx, tokens), torch_capture(checkpoint.torch, tokens)
    for i in shape.layers:
        for name in ("queries", "keys", "values"):
            close(getattr(ours[i], name), getattr(expected.layers[i], name).numpy(), 1e-4)
    with torch.no_grad():
        p = checkpoint.torch(torch.tensor([tokens + follow])).logits[0, -len(follow) :].softmax(-1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    expected = torch_gradients(checkpoint.torch, expected, follow, 1, 3)[0]
    gradients = label_gradients(checkpoint.mlx, ours, follow, mx.array(labels.numpy()))
    for i in shape.layers:
        for mine, other in zip(gradients[i], expected[i]):
            error = np.linalg.norm(np.array(mine) - other.numpy()) / np.linalg.norm(other.numpy())
            assert error < 1e-3, (i, error)
    assert set(spectral_kv_torch.__all__) - set(__import__("spectral_kv_mlx").__all__) == {"SpectralCache"}


@only("mlx", "both hosts on one checkpoint, in the process of MLX")
def test_a_profile_serves_both_backends(checkpoint, tmp_path):
    pytest.importorskip("torch")
    import spectral_kv_torch
    from spectral_kv_torch.generation import score as torch_score

    prompt, continuation = make_tokens(150), make_tokens(6, seed=5)
    settings = {"tokens": 640, "document": 256, "progress": False}
    texts = ["Some text, and then some more text. " * 12, "Other text: 1, 2, 3, 5, 8, 13, 21, 34, 55. " * 12]
    by_mlx = SpectralProfiler(**settings).profile_from_model(checkpoint.mlx, checkpoint.tokenizer, texts)
    by_torch = spectral_kv_torch.SpectralProfiler(**settings).profile_from_model(
        checkpoint.torch, checkpoint.tokenizer, texts
    )
    close(by_mlx.queries.mean, by_torch.queries.mean, 1e-3)
    for profile in (by_mlx, by_torch):
        profile = type(profile).load(profile.save(tmp_path / "p.safetensors"))
        ours = make_prompt_cache(checkpoint.mlx, profile, 4.0, **SMALL)
        theirs = spectral_kv_torch.make_prompt_cache(checkpoint.torch, profile, 4.0, **SMALL)
        mine = score(checkpoint.mlx, prompt, continuation, ours)
        # mlx-lm feeds the last token of a prompt alone, so that it sees the sealed tokens; torch is fed alike here
        other = torch_score(checkpoint.torch, prompt[:-1], [prompt[-1], *continuation], theirs)[1:]
        assert np.square(mine - other).mean() < 1e-4 * np.square(other).mean()
        assert cache_nbytes(ours) == spectral_kv_torch.cache_nbytes(theirs)
        mine, other = (
            sum(x.nbytes for layer in layers for x in TransformCodec.tables(layer.store.codec))
            for layers in (ours, theirs.layers)
        )
        assert mine == other


@only("mlx", "quantized layers of MLX")
def test_quantized_weights(checkpoint, tmp_path):
    profile = calibrate(checkpoint.mlx)
    mlx_lm.convert(str(checkpoint.path), str(tmp_path / "q"), quantize=True, q_bits=4, q_group_size=32)
    quantized, _ = load_model(tmp_path / "q")
    assert isinstance(quantized.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    assert weights_digest(quantized) == profile.weights_digest.partition("-")[0]  # no projection can be compared
    assert not are_other_weights(weights_digest(quantized), profile.weights_digest)
    prompt, continuation = make_tokens(120), make_tokens(5, seed=5)
    reference = score(quantized, prompt, continuation, plain_cache(quantized))
    for p in (profile, calibrate(quantized)):
        got = score(quantized, prompt, continuation, make_prompt_cache(quantized, p, 6.0, **SMALL))
        assert np.square(got - reference).mean() < 0.05 * np.square(reference).mean()


@only("mlx", "mlx-lm takes the end of a text from the tokenizer")
def test_generate_stops_at_a_token_of_the_tokenizer(tiny):
    prompt = make_tokens(30)
    seen = []
    out = generate(tiny.model, None, prompt, plain_cache(tiny.model), 6, True, seen.append)
    assert out.tokens == seen and len(out.times) == 7 and sorted(out.times) == out.times
    tokenizer = SimpleNamespace(eos_token_ids={out.tokens[2]})
    stop = out.tokens.index(out.tokens[2]) + 1
    assert generate(tiny.model, tokenizer, prompt, plain_cache(tiny.model), 6, False, seen.append).tokens == seen[:stop]


@only("mlx", "both hosts on one checkpoint, in the process of MLX")
@pytest.mark.slow
def test_backends_agree_on_the_demo_model():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from spectral_kv_core.hosts.demo_model import demo_model_path

    path = demo_model_path()
    ours, tokenizer = load_model(path)
    tokens = tokenizer.encode("The tides are caused by the Moon, whose gravity pulls the oceans. " * 2)[:24]
    assert len(tokens) == 24
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    close(feed(ours, None, tokens), expected, 1e-3)

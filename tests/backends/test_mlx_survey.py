"""What a trial run finds of models of mlx-lm whose layers do unusual things, and that it leaves no trace."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
from hosts import SMALL  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.base import create_causal_mask  # noqa: E402
from mlx_lm.models.cache import KVCache  # noqa: E402
from mlx_lm.models.rope_utils import initialize_rope  # noqa: E402
from mlx_models import feed, make_model, make_tokens  # noqa: E402

from spectral_kv_core.cache.layer_cache import LayerCache  # noqa: E402
from spectral_kv_core.errors import UsageError  # noqa: E402
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED  # noqa: E402
from spectral_kv_mlx import make_prompt_cache, places, restore  # noqa: E402
from spectral_kv_mlx import survey as surveys  # noqa: E402
from spectral_kv_mlx.capture import capture  # noqa: E402
from spectral_kv_mlx.generation import plain_cache  # noqa: E402
from spectral_kv_mlx.survey import model_shape, survey  # noqa: E402


class Windowed(llama.Attention):
    """A window of 8 tokens, of which nothing but the mask tells."""

    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, cache.make_mask(x.shape[1], return_array=True, window_size=8), cache)


class Chunked(llama.Attention):
    """Attention within chunks of 32 tokens, of which nothing but the mask tells."""

    def __call__(self, x, mask=None, cache=None):
        length, offset = x.shape[1], cache.offset
        rows, columns = mx.arange(offset, offset + length)[:, None] // 32, mx.arange(offset + length)[None] // 32
        return super().__call__(x, create_causal_mask(length, offset) & (rows == columns), cache)


class Narrow(llama.Attention):
    """Cuts the mask to the keys that the cache gives back."""

    def __call__(self, x, mask=None, cache=None):
        length, size = x.shape[1], x.shape[:2]
        q, k, v = (proj(x).reshape(*size, -1, 32).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mask = cache.make_mask(length, return_array=True, window_size=8)
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
        out = llama.scaled_dot_product_attention(q, k, v, cache, self.scale, mask[..., -k.shape[2] :])
        return self.o_proj(out.swapaxes(1, 2).reshape(*size, -1))


class Kernel(llama.Attention):
    """Calls MLX's kernel itself, in a module that has mlx-lm's function too."""

    def __call__(self, x, mask=None, cache=None):
        size = x.shape[:2]
        q, k, v = (proj(x).reshape(*size, -1, 32).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(*size, -1))


class Cast(llama.Attention):
    """Casts keys between the cache and attention, which then gets other arrays."""

    def __call__(self, x, mask=None, cache=None):
        size = x.shape[:2]
        q, k, v = (proj(x).reshape(*size, -1, 32).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        k, v = (y.astype(mx.float16).astype(mx.float32) for y in cache.update_and_fetch(k, v))
        out = llama.scaled_dot_product_attention(q, k, v, cache, self.scale, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(*size, -1))


class Peeking(llama.Attention):
    """Asks for the class of its cache, and attends to nothing without it."""

    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, mask, cache) * (1.0 if type(cache) is KVCache else 0.5)


class Both(llama.Attention):
    """Sees tokens behind it too."""

    def __call__(self, x, mask=None, cache=None):
        return super().__call__(x, None, cache)


def unusual(kind: type, layer: int = 0):
    """A tiny Llama, one layer of which has attention of `kind`."""
    model = make_model("llama", num_hidden_layers=3)
    model.layers[layer].self_attn.__class__ = kind
    return model


def ways(model) -> list[tuple[str, str]]:
    return [(layer.way, layer.reason) for layer in survey(model)]


OWN = "attention code of its own"
KINDS = [
    (Windowed, DECODED, "a mask that is not causal"),
    (Chunked, DECODED, "a mask that is not causal"),
    (Both, DECODED, "attention in both directions"),
    (Narrow, DECODED, OWN),
    (Kernel, DECODED, OWN),
    (Cast, DECODED, OWN),
    (Peeking, PASSED, "attention that a compressed cache changes"),
]


@pytest.mark.parametrize("kind, way, reason", KINDS, ids=[kind.__name__.lower() for kind, *_ in KINDS])
def test_one_layer_is_told_from_the_others_and_nothing_is_wrong(kind, way, reason):
    model, tokens = unusual(kind), make_tokens(150)
    assert ways(model) == [(way, reason), (CODES, ""), (CODES, "")]
    expected = feed(model, plain_cache(model), tokens, 50)
    cache = make_prompt_cache(model, method="identity")
    np.testing.assert_allclose(feed(model, cache, tokens, 50), expected, atol=1e-4)
    steps = make_tokens(3, seed=2)
    plain = plain_cache(model)
    feed(model, plain, tokens, 50)
    np.testing.assert_allclose(feed(model, cache, steps, 1), feed(model, plain, steps, 1), atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coded = feed(model, make_prompt_cache(model, bits=8, method="turboquant", **SMALL), tokens, 50)
    assert np.square(coded - expected).mean() < 0.01 * np.square(expected).mean()


@pytest.mark.parametrize("kind", [Kernel, Cast])
def test_tokens_that_never_reach_our_attention_raise(kind):
    """Whatever the survey said: a layer that is routed and attends elsewhere is no layer to be quiet about."""
    model = unusual(kind)
    cache = make_prompt_cache(model, method="identity")
    places.install(model)  # no layer has attention of its own, says somebody who has not looked
    with pytest.raises(UsageError, match="attended elsewhere|received others"):
        feed(model, cache, make_tokens(20))


def test_keys_that_are_attended_to_twice_raise():
    class Twice(llama.Attention):
        def __call__(self, x, mask=None, cache=None):
            size = x.shape[:2]
            q, k, v = (p(x).reshape(*size, -1, 32).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            k, v = cache.update_and_fetch(k, v)
            both = (llama.scaled_dot_product_attention(y, k, v, cache, self.scale, mask) for y in (q, -q))
            return self.o_proj(sum(both).swapaxes(1, 2).reshape(*size, -1))

    model = unusual(Twice)
    assert ways(model) == [(DECODED, OWN), (CODES, ""), (CODES, "")]
    cache = make_prompt_cache(model, method="identity")
    places.install(model)
    with pytest.raises(UsageError, match="once, received them again"):
        feed(model, cache, make_tokens(20))


def test_a_survey_leaves_no_trace():
    model = unusual(Kernel)
    restore(model)
    before = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
    classes = {type(part) for layer in model.layers for _, part in layer.named_modules()}
    calls = {kind: kind.__call__ for kind in classes}
    functions = llama.scaled_dot_product_attention, mx.fast.scaled_dot_product_attention
    attributes = {name: set(vars(part)) for name, part in model.named_modules()}
    surveys._surveys.clear()
    survey(model)
    assert functions == (llama.scaled_dot_product_attention, mx.fast.scaled_dot_product_attention)
    assert {kind: kind.__call__ for kind in classes} == calls
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(before[name], np.array(p)) for name, p in after.items()) and len(after) == len(before)


def test_a_model_is_tried_once(monkeypatch):
    surveys._surveys.clear()
    models, tried, trial = [make_model("llama", seed=n) for n in (0, 1)], [], surveys._Trial
    monkeypatch.setattr(surveys, "_Trial", lambda model: tried.append(model) or trial(model))
    for model in (*models, models[0]):
        model_shape(model)
    assert len(tried) == 1
    model_shape(unusual(Cast))  # other code, equal arguments but for a layer
    model_shape(make_model("llama", rope_theta=5e5))
    assert len(tried) == 3


def test_a_model_that_cannot_be_tried_is_taken_from_its_arguments():
    class Picture(llama.Model):
        def __call__(self, inputs, cache=None, pixels=None):
            if pixels is None:
                raise ValueError("Expected pixels.")
            return super().__call__(inputs, cache)

    model = make_model("llama")
    model.__class__ = Picture
    with pytest.warns(UserWarning, match="No trial run of this model was possible: Expected pixels"):
        shape, passed = model_shape(model)
    assert (shape.q_heads, shape.kv_heads, shape.head_dim, shape.layers, passed) == (4, 2, 32, (0, 1), {})
    number = id(model)
    assert number in surveys._untried
    del model
    gc.collect()
    assert number not in surveys._untried


def test_weights_that_give_nothing_finite_say_nothing_of_their_kind():
    surveys._surveys.clear()
    broken, whole = make_model("llama"), make_model("llama", seed=1)
    broken.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        model_shape(broken)
    assert ways(broken) == [(CODES, "")] * 2  # as shapes and calls tell
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ways(whole) == [(CODES, "")] * 2


class NoPE(nn.Module):
    """No rotation, as SmolLM3 has it in some layers."""

    def __call__(self, x, offset=0):
        return x


@pytest.mark.parametrize("rope", ["none", "function", "interleaved", "partial", "backwards"])
def test_a_rotation_is_seen_whatever_applies_it(rope):
    model = make_model("llama", num_hidden_layers=3)
    own = {
        "none": NoPE(),
        "function": lambda x, offset=0: mx.fast.rope(
            x, 32, traditional=False, base=500.0, scale=1.0, offset=offset, freqs=None
        ),
        "interleaved": nn.RoPE(32, traditional=True),
        "partial": nn.RoPE(16),
        "backwards": lambda x, offset=0: mx.fast.rope(
            x, 32, traditional=False, base=500.0, scale=-1.0, offset=offset, freqs=None
        ),
    }[rope]
    model.layers[1].self_attn.rope = own
    shape = model_shape(model)[0]
    assert shape.rope_of(0) == shape.rope_of(2) == shape.rope and shape.rope.rotary_dim == 32
    found = shape.rope_of(1)
    if rope == "none":
        assert found is None
        return
    assert found.rotary_dim == (16 if rope == "partial" else 32) and found.interleaved == (rope == "interleaved")
    base = 500.0 if rope in ("function", "backwards") else 1e4
    slowest = base ** -(1 - 2 / found.rotary_dim) * (-1 if rope == "backwards" else 1)
    assert found.inv_freq[-1] == pytest.approx(slowest, rel=1e-2)


def test_a_rotation_that_changes_is_named_with_its_place():
    model = make_model("llama")
    for layer in model.layers:
        layer.self_attn.rope = initialize_rope(32, 1e4, False, {"rope_type": "dynamic", "factor": 4.0}, 64)
    for layer in survey(model):
        assert layer.way == CODES and layer.rope.rotary_dim == 32
        assert layer.limit == "keys are rotated otherwise somewhere between positions 64 and 509"
    assert not any(layer.limit for layer in survey(make_model("llama")))


def test_the_queries_of_attention_that_nobody_sees_are_none():
    model = unusual(Kernel, layer=1)
    cache = capture(model, make_tokens(30))
    assert cache[1].queries is None and cache[1].keys.shape == (1, 2, 30, 32)
    assert cache[0].queries.shape == (1, 4, 30, 32)


@pytest.mark.parametrize("kind", [Windowed, Kernel, None], ids=["windowed", "kernel", "sinks"])
def test_rows_of_a_padded_batch_are_as_if_alone(kind):
    """Decoded layers, and sink logits on codes, keep to the left padding of every row."""
    model = unusual(kind) if kind else with_sinks()
    rows, pads = [make_tokens(n, seed=n) for n in (70, 49)], [0, 21]
    cache = make_prompt_cache(model, method="identity", left_padding=pads)
    ids = mx.array([[2] * pad + row for row, pad in zip(rows, pads)])
    steps = mx.array([[5, 9, 4], [7, 3, 8]])
    parts = [model(ids, cache=cache), *(model(steps[:, i : i + 1], cache=cache) for i in range(3))]
    batch = np.array(mx.concatenate(parts, axis=1))
    for number, (row, pad) in enumerate(zip(rows, pads)):
        expected = feed(model, plain_cache(model), row + steps[number].tolist())
        np.testing.assert_allclose(batch[number, pad:], expected, atol=1e-3)


def with_sinks():
    """A tiny Llama whose attention has sink logits."""
    model = make_model("llama")
    for layer in model.layers:
        layer.self_attn.__class__ = Sinks
    return model


class Sinks(llama.Attention):
    """As GPT-OSS: a logit for every head that nothing belongs to."""

    def __call__(self, x, mask=None, cache=None):
        size = x.shape[:2]
        q, k, v = (proj(x).reshape(*size, -1, 32).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
        sinks = mx.array([0.5, 2.0, -1.0, 1.0])
        out = llama.scaled_dot_product_attention(q, k, v, cache, self.scale, mask, sinks=sinks)
        return self.o_proj(out.swapaxes(1, 2).reshape(*size, -1))


def test_sink_logits_are_attended_on_codes(monkeypatch):
    model, tokens = with_sinks(), make_tokens(150)
    assert ways(model) == [(CODES, "")] * 2
    expected, cache = (
        feed(model, plain_cache(model), tokens, 50),
        make_prompt_cache(model, 8, method="turboquant", **SMALL),
    )
    monkeypatch.setattr(LayerCache, "dense", lambda self, *a: pytest.fail("decoded"))
    got = feed(model, cache, tokens, 50)
    steps = make_tokens(3, seed=2)
    plain = plain_cache(model)
    feed(model, plain, tokens, 50)
    assert np.square(got - expected).mean() < 0.03 * np.square(expected).mean()
    expected, got = feed(model, plain, steps, 1), feed(model, cache, steps, 1)
    assert np.square(got - expected).mean() < 0.03 * np.square(expected).mean()


def test_what_takes_tokens_in_may_be_a_part_of_what_attends():
    class Taking(llama.Attention):
        def __call__(self, x, mask=None, cache=None):
            size = x.shape[:2]
            q, k, v = (p(x).reshape(*size, -1, 32).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
            return q, *cache.update_and_fetch(k, v)

    class Block(llama.TransformerBlock):
        def __call__(self, x, mask=None, cache=None):
            own = self.self_attn
            q, k, v = own(self.input_layernorm(x), mask, cache)
            out = llama.scaled_dot_product_attention(q, k, v, cache, own.scale, mask)
            x = x + own.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1))
            return x + self.mlp(self.post_attention_layernorm(x))

    model, tokens = unusual(Taking), make_tokens(90)
    model.layers[0].__class__ = Block
    assert ways(model) == [(CODES, "")] * 3
    expected = feed(model, plain_cache(model), tokens, 30)
    np.testing.assert_allclose(
        feed(model, make_prompt_cache(model, method="identity"), tokens, 30), expected, atol=1e-4
    )

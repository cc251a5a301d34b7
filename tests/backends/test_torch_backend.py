"""What only transformers asks of a backend: `test_backend.py` tests what both hosts promise."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hosts import only  # noqa: E402
from torch_models import logits_of, model_and_profile, tiny_model, tokens  # noqa: E402

from spectral_kv_core.codecs.spectral import SpectralCodec  # noqa: E402
from spectral_kv_torch import (  # noqa: E402
    capture,
    handles,
    make_prompt_cache,
    ops,
)
from spectral_kv_torch.generation import plain_cache  # noqa: E402
from spectral_kv_torch.handles import ATTENTION, Handle  # noqa: E402
from spectral_kv_torch.kernels import build  # noqa: E402
from spectral_kv_torch.kernels.attention import LatentStep  # noqa: E402


@only("torch", "MLX's attention gets the cache, which is no tensor")
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


@only("torch", "generate_step of mlx-lm reads one row")
def test_left_padded_generate():
    model, _ = model_and_profile("llama")
    ids = torch.cat([tokens(100, seed=1), torch.cat([torch.full((1, 30), 2), tokens(70, seed=2)], dim=1)])
    mask = (torch.arange(100)[None] >= torch.tensor([[0], [30]])).long()
    kwargs = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(ids, past_key_values=plain_cache(model), **kwargs)
    got = model.generate(ids, past_key_values=make_prompt_cache(model, method="identity"), **kwargs)
    assert torch.equal(got, expected)


@only("torch", "trim of mlx-lm takes a count, crop of transformers also a length")
def test_a_length_to_crop_to_is_refused():
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, bits=8)
    logits_of(model, tokens(400), cache)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


@only("torch", "mlx-lm has no beam search")
def test_beam_search_equals_the_plain_cache():
    model, profile = model_and_profile("llama")
    ids = tokens(120, batch=2)
    kwargs = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, past_key_values=plain_cache(model), **kwargs)
    assert torch.equal(
        model.generate(ids, past_key_values=make_prompt_cache(model, method="identity"), **kwargs), expected
    )
    assert model.generate(ids, past_key_values=make_prompt_cache(model, profile, bits=8), **kwargs).shape[0] == 2


@only("torch", "mlx-lm never selects rows of a cache")
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


@only("torch", "MLX computes in float32 on its default device: test_mlx_backend.py takes larger steps")
def test_score_gradients_match_finite_differences():
    from spectral_kv_torch.capture import score_gradients

    model = tiny_model("llama").double()
    ids = tokens(60)[0].tolist()
    cache = capture(model, ids[:40])
    gradients = score_gradients(model, cache, ids[40:], 1, 7)[0]
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


@only("torch", "MLX keeps the left padding in the cache")
def test_a_mask_is_read_once_for_all_layers(monkeypatch):
    reads = []
    monkeypatch.setattr(handles, "left_padding", lambda mask, _: reads.append(1) or [int((~mask[0, 0, -1]).sum())])
    mask = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    assert [handles._last_padding(mask, 4) for _ in range(3)] == [[0]] * 3 and len(reads) == 1
    mask[..., :2] = False
    assert handles._last_padding(mask, 4) == [2]
    with torch.inference_mode():
        other = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    assert [handles._last_padding(x, 4) for x in (other, other, mask)] == [[0], [0], [2]] and len(reads) == 4

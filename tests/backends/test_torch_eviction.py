"""Caches that drop tokens, in transformers' own forward passes and generation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from test_eviction import positions_of
from test_torch_backend import logits_of, model_and_profile
from torch_models import tokens
from transformers import DynamicCache

torch = pytest.importorskip("torch")

from torch_models import ByteTokenizer  # noqa: E402

from spectral_kv_core.scorers import SCORERS  # noqa: E402
from spectral_kv_torch import SpectralCache, cache_nbytes, make_prompt_cache, restore, save_prompt_cache  # noqa: E402
from spectral_kv_torch.cache import SpectralKVLayer, fill  # noqa: E402
from spectral_kv_torch.generation import generate  # noqa: E402
from spectral_kv_torch.integration import plain_cache  # noqa: E402

BUDGET = 150


def stores(cache) -> list:
    return [layer.store for layer in cache.layers if isinstance(layer, SpectralKVLayer)]


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
            rows = [next(i for i, lane in enumerate(store.lanes) if row in lane.rows) for row in range(2)]
            held = [positions_of(store, lane, heads)[0, 0] + pad for lane, pad in zip(rows, pads)]
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
    assert all(lane.dropped for store in stores(cache) for lane in store.lanes)


@pytest.mark.parametrize("name", SCORERS)
def test_generate_stays_within_the_budget(name):
    model, profile = model_and_profile("qwen3")
    prompt = tokens(400)[0].tolist()
    for method, bits in ((name, None), (f"{name}+spectral", 4.0)):
        cache = make_prompt_cache(model, profile, bits, method=method, budget_tokens=BUDGET)
        out = generate(model, ByteTokenizer(), prompt, cache, 80, True, lambda token: None)
        assert len(out.tokens) == 80 and cache.get_seq_length() == 479
        assert all(store.lanes[0].stored <= BUDGET for store in stores(cache))
        size = cache_nbytes(cache)
        assert size == sum(x.untyped_storage().nbytes() for store in stores(cache) for x in store.arrays())
        assert size.dense_nbytes == 479 * 3 * 2 * 2 * 32 * 2
        assert size.compression > (1.5 if bits is None else 2)  # exact tokens are float32 here


def test_prompt_may_come_in_pieces():
    model, profile = model_and_profile("llama")
    ids = tokens(700)
    cache = make_prompt_cache(model, profile, method="triattention+spectral", bits=8, budget_tokens=200)
    for start in range(0, 650, 100):
        logits_of(model, ids[:, start : start + 100], cache)
        assert all(store.lanes[0].stored <= 200 and not store.lanes[0].sealed for store in stores(cache))
    logits_of(model, ids[:, :1], cache)
    assert all(store.lanes[0].sealed and store.lanes[0].stored <= 200 for store in stores(cache))


def test_other_attention_sees_the_same_tokens():
    """A model that attends by itself gets the tokens that are left, and a mask of their number."""
    model, profile = model_and_profile("llama")
    model = copy.deepcopy(model)
    ids = tokens(330)
    cache = make_prompt_cache(model, profile, method="knorm", budget_tokens=BUDGET)
    logits_of(model, ids[:, :300], cache)
    other = copy.deepcopy(cache)
    expected = [logits_of(model, ids[:, 300:320], cache), logits_of(model, ids[:, 320:321], cache)]
    restore(model)
    got = [logits_of(model, ids[:, 300:320], other), logits_of(model, ids[:, 320:321], other)]
    for a, b in zip(got, expected):
        assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max())


def test_other_attention_does_not_guess_about_padding():
    model, profile = model_and_profile("llama")
    model = copy.deepcopy(model)
    cache = make_prompt_cache(model, profile, method="knorm", budget_tokens=BUDGET)
    mask = (torch.arange(300)[None] >= torch.tensor([[0], [200]])).long()
    logits_of(model, tokens(300, batch=2), cache, attention_mask=mask)
    restore(model)
    with pytest.raises(ValueError, match="equally many tokens"):
        logits_of(model, tokens(1, batch=2), cache)


def test_what_dropped_tokens_cannot_be_stored(tmp_path):
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, method="knorm", budget_tokens=BUDGET)
    logits_of(model, tokens(300), cache)
    with pytest.raises(ValueError, match="keeps every token with"):
        save_prompt_cache(tmp_path / "x.safetensors", cache, model=model)
    with pytest.raises(ValueError, match="keeps every token"):
        save_prompt_cache(tmp_path / "x.safetensors", plain_cache(model), model=model, method="knorm")
    with pytest.raises(ValueError, match="holds every token"):
        fill(make_prompt_cache(model, profile), cache)
    assert not list(tmp_path.iterdir())


def test_queries_of_the_prompt_reach_snapkv():
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, method="snapkv", budget_tokens=BUDGET)
    with pytest.raises(ValueError, match="recent"):
        cache.update(torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16), 0)
        cache.layers[0].commit()


def test_the_wavelet_decides_who_stays():
    """Through generation by the host; budget and bytes are the same with every wavelet."""
    model, profile = model_and_profile("llama")
    prompt, held, sizes = tokens(300)[0].tolist(), {}, set()
    for wavelet in (None, "db2", "haar", "bior2.2"):
        cache = make_prompt_cache(model, profile, method="waveletkv", budget_tokens=BUDGET, wavelet=wavelet)
        out = generate(model, ByteTokenizer(), prompt, cache, 20, True, lambda token: None)
        assert len(out.tokens) == 20 and all(store.lanes[0].stored <= BUDGET for store in stores(cache))
        held[wavelet] = positions_of(stores(cache)[0]).tolist()
        sizes.add(int(cache_nbytes(cache)))
    assert held[None] == held["db2"] and len(sizes) == 1
    assert held["haar"] != held["db2"] != held["bior2.2"] != held["haar"]
    with pytest.raises(ValueError, match="random has none"):
        make_prompt_cache(model, profile, method="random", budget_tokens=BUDGET, wavelet="haar")


def test_any_scorer_may_weigh_the_rounding():
    model, profile = model_and_profile("qwen2")
    ids = tokens(300)
    held = {}
    for scorer in (None, "expected-attention", "triattention", "nearest"):
        cache = make_prompt_cache(model, profile, bits=2, rounding_scores=scorer)
        logits_of(model, ids, cache)
        held[scorer] = cache.layers[0].store.dense()[0]
    assert torch.equal(held[None], held["expected-attention"])
    assert not torch.equal(held[None], held["triattention"]) and not torch.equal(held[None], held["nearest"])
    with pytest.raises(ValueError, match="rounds by scores"):
        make_prompt_cache(model, profile, method="identity", rounding_scores="triattention")


def test_layers_agree_on_how_many_tokens_they_hold():
    """One mask serves all of them, and one crop."""
    model, profile = model_and_profile("llama")
    model = copy.deepcopy(model)
    ids = tokens(420)
    cache = make_prompt_cache(model, profile, 8, method="triattention+spectral", budget_tokens=BUDGET)
    logits_of(model, ids[:, :300], cache)
    for start in range(300, 400, 4):
        logits_of(model, ids[:, start : start + 4], cache)
        assert len({store.lanes[0].stored for store in stores(cache)}) == 1
    cache.crop(-5)
    assert {store.seen for store in stores(cache)} == {395}
    other = copy.deepcopy(cache)
    expected = logits_of(model, ids[:, 395:401], cache)
    restore(model)
    got = logits_of(model, ids[:, 395:401], other)
    assert float((got - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_a_second_crop_forgets_nothing_in_between():
    model, profile = model_and_profile("llama")
    cache = make_prompt_cache(model, profile, method="random", budget_tokens=BUDGET)
    logits_of(model, tokens(300), cache)
    cache.crop(-60)
    with pytest.raises(ValueError, match="at most"):
        cache.crop(-60)
    places = positions_of(stores(cache)[0])
    assert (places[..., -1] == 239).all() and cache.get_seq_length() == 240


def test_padding_may_end_in_a_later_piece_of_the_prompt():
    model, profile = model_and_profile("llama")
    ids, pads = tokens(200, batch=2), [0, 90]
    mask = (torch.arange(200)[None] >= torch.tensor(pads)[:, None]).long()
    places = (torch.arange(200)[None] - torch.tensor(pads)[:, None]).clamp(min=0)
    for method, options in (("identity", {}), ("streaming", {"budget_tokens": BUDGET})):
        whole, cache = (make_prompt_cache(model, profile, method=method, **options) for _ in range(2))
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, position_ids=places, past_key_values=whole).logits[:, -1]
            for part in (slice(0, 50), slice(50, 100), slice(100, 200)):
                got = model(
                    ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=places[:, part],
                    past_key_values=cache,
                ).logits[:, -1]
        assert stores(cache)[0].padding == pads
        assert float((got - expected).abs().max()) < (1e-3 if method == "identity" else 1.0) * float(
            expected.abs().max()
        )


def test_a_cache_without_a_budget_is_refused():
    _, profile = model_and_profile("llama")
    for method in ("knorm", "triattention+spectral"):
        with pytest.raises(ValueError, match="budget"):
            SpectralCache(profile, method=method)


def test_the_end_of_a_text_can_be_ignored():
    model = copy.deepcopy(model_and_profile("llama")[0])
    prompt = tokens(100)[0].tolist()
    first = generate(model, ByteTokenizer(), prompt, plain_cache(model), 1, True, lambda token: None).tokens[0]
    model.generation_config.eos_token_id = model.config.eos_token_id = first
    assert len(generate(model, ByteTokenizer(), prompt, plain_cache(model), 10, False, lambda token: None).tokens) == 1
    assert len(generate(model, ByteTokenizer(), prompt, plain_cache(model), 10, True, lambda token: None).tokens) == 10

"""mlx-lm's batches of compressed caches: every sequence as if it were alone."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import ast
import copy
import functools
import json
import re
import sys
import threading
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx_host
import mlx_lm
from hosts import SMALL, only
from mlx_lm.generate import BatchGenerator, GenerationBatch, batch_generate, generate_step
from mlx_lm.models import cache as host_cache
from mlx_models import calibrate, feed, make_tokens, save_llama

from spectral_kv_mlx import cache_nbytes, load_model, make_prompt_cache, restore, save_prompt_cache
from spectral_kv_mlx.cache import FollowingKVCache, SpectralKVCache

pytestmark = only("mlx", "mlx-lm alone makes batches out of caches")
TIE = 0.02  # how near the log-probabilities of two tokens may be before a batch may choose the other
FLIP = 0.05  # how far a code that rounds the other way may move a logit: the last bits of a product depend on the batch
PROMPTS = {  # tokens and seed of each prompt: none has a tie within 16 tokens at 2 bits
    "llama": ((150, 21), (90, 58), (40, 25), (7, 39)),
    "gemma3": ((150, 33), (90, 53), (40, 33), (7, 34)),
}


class Tokenizer:
    """As much of a tokenizer as `batch_generate` needs."""

    eos_token_ids = ()

    def decode(self, tokens):
        return str(tokens)


@pytest.fixture(scope="module", params=PROMPTS)
def family(request):
    name = request.param
    prompts = [make_tokens(count, seed) for count, seed in PROMPTS[name]]
    return SimpleNamespace(model=mlx_host.model(name), profile=mlx_host.profile(name), prompts=prompts)


@pytest.fixture(scope="module")
def tiny():
    prompts = [make_tokens(count, seed) for count, seed in PROMPTS["llama"]]
    return SimpleNamespace(model=mlx_host.model("llama"), profile=mlx_host.profile("llama"), prompts=prompts)


def new_cache(of, bits: float | None = 2.0, **options) -> list:
    return make_prompt_cache(of.model, of.profile, bits, **SMALL, **options)


def alone(of, prompt: list[int], cache: list, count: int = 16, step: int = 64) -> list[int]:
    """Greedy tokens after a prompt by itself, none of which was a tie."""
    tokens = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = generate_step(mx.array(prompt), of.model, max_tokens=count, prompt_cache=cache, prefill_step_size=step)
        for token, logprobs in steps:
            second, first = np.sort(np.array(logprobs))[-2:]
            assert first - second > TIE, "choose another prompt: another processor might choose another token"
            tokens.append(int(token))
    return tokens


def logprobs_of(model, cache: list, token: int) -> np.ndarray:
    """Log-probabilities after one more token."""
    logits = mx.array(feed(model, cache, [token])[0])
    return np.array(logits - mx.logsumexp(logits))


def compressed(cache: list) -> list[SpectralKVCache]:
    return [layer for layer in cache if isinstance(layer, SpectralKVCache)]


def bytes_of(cache: list) -> list[bytes]:
    """All that a cache holds, by array."""
    return [bytes(memoryview(np.array(x))) for layer in compressed(cache) for x in layer.store.state_arrays()]


@pytest.mark.parametrize("step", [2048, 64])
def test_batch_generate_gives_every_prompt_the_tokens_that_it_gets_alone(family, step):
    """At 2 bits, prompts of different length, read at once and in pieces."""
    expected = [alone(family, prompt, new_cache(family), step=step) for prompt in family.prompts]
    caches = [new_cache(family) for _ in family.prompts]
    got = batch_generate(
        family.model, Tokenizer(), family.prompts, caches, 16, return_token_ids=True, prefill_step_size=step
    )
    assert got.token_ids == expected
    assert all(layer.empty() for cache in caches for layer in cache), "caches that are given stay as they are"


def test_more_prompts_than_a_batch_has_room_for_come_and_go(family):
    """One ends early, its place is taken, and all go on together."""
    order, counts = [2, 0, 3, 1, 2], [3, 16, 5, 16, 16]
    prompts = [family.prompts[i] for i in order]
    generator = BatchGenerator(family.model, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=64)
    uids = generator.insert(prompts, counts, [new_cache(family) for _ in prompts])
    got, sizes = {uid: [] for uid in uids}, set()
    while responses := generator.next_generated():
        for response in responses:
            got[response.uid].append(response.token)
        batch = generator._generation_batch
        sizes.add(len(batch))
        for layer in compressed(batch.prompt_cache):
            assert layer.nbytes > 0 and layer.store.batch == len(batch) and min(layer.left_padding or [0]) == 0
    generator.close()
    assert {1, 2, 3} <= sizes
    for uid, i, count in zip(uids, order, counts):
        assert got[uid] == alone(family, family.prompts[i], new_cache(family))[:count]


def test_what_comes_back_is_the_cache_of_the_sequence_alone(family):
    """It goes on by itself and in a batch with history, as mlx-lm's server uses stored caches."""
    caches = [new_cache(family) for _ in family.prompts]
    options = {"return_prompt_caches": True, "return_token_ids": True}
    got = batch_generate(family.model, Tokenizer(), family.prompts, caches, 4, **options)
    more = make_tokens(30, 5)
    generator = BatchGenerator(family.model)
    generator.insert([more] * 4, [1] * 4, copy.deepcopy(got.caches))
    in_a_batch = {response.uid: np.array(response.logprobs) for response in generator.next_generated()}
    generator.close()
    for uid, (prompt, tokens, cache) in enumerate(zip(family.prompts, got.token_ids, got.caches)):
        whole = new_cache(family)
        feed(family.model, whole, prompt[:-1])
        feed(family.model, whole, prompt[-1:] + tokens, 1)
        assert [layer.offset for layer in cache] == [len(prompt) + 4] * len(cache)
        for layer, other in zip(compressed(cache), compressed(whole)):
            assert layer.left_padding is None and layer.store.batch == 1
            assert layer.nbytes == other.nbytes and layer.store.tokens() == other.store.tokens()
        for held in (cache, whole):
            feed(family.model, held, more[:-1])
        ours, expected = (logprobs_of(family.model, held, more[-1]) for held in (cache, whole))
        np.testing.assert_allclose(ours, expected, atol=FLIP)
        np.testing.assert_allclose(in_a_batch[uid], expected, atol=FLIP)


METHODS = {
    "identity": {},
    "kivi": {},
    "turboquant": {},
    "spectral-dense-pairs": {"bits": 3.0},
    "random": {"budget_tokens": 60},
    "snapkv+spectral": {"budget_tokens": 60, "bits": 4.0},
    "keydiff+spectral": {"budget_tokens": 60, "bits": 4.0, "selection": "per_head"},
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_in_a_batch(tiny, method):
    """Layers that are coded together, caches that drop tokens, and such that compress nothing."""
    profile = {"spectral-dense-pairs": _pairs, "identity": lambda: None}.get(method, lambda: tiny.profile)()

    def new() -> list:
        return make_prompt_cache(tiny.model, profile, method=method, **SMALL, **METHODS[method])

    generator = BatchGenerator(tiny.model, prefill_step_size=64)
    generator.insert(tiny.prompts, [6] * 4, [new() for _ in tiny.prompts])
    tokens, logprobs, caches = [[] for _ in tiny.prompts], [[] for _ in tiny.prompts], {}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
            logprobs[response.uid].append(np.array(response.logprobs))
            caches[response.uid] = response.prompt_cache
    generator.close()
    for uid, prompt in enumerate(tiny.prompts):
        cache = new()
        feed(tiny.model, cache, prompt[:-1], 64)
        for token, got in zip([prompt[-1], *tokens[uid]], logprobs[uid]):
            np.testing.assert_allclose(got, logprobs_of(tiny.model, cache, token), atol=FLIP)
        assert compressed(caches[uid])[0].store.tokens() == len(prompt) + 6
        assert "budget_tokens" not in METHODS[method] or all(c.store.slots <= 60 for c in compressed(caches[uid]))
        assert [isinstance(layer, FollowingKVCache) for layer in caches[uid]] == [False, "pairs" in method]


@functools.cache
def _pairs():
    return mlx_host.calibrate(mlx_host.model("llama"), pairs=True)


def test_layers_of_a_group_are_merged_in_their_order(tiny):
    caches = [make_prompt_cache(tiny.model, _pairs(), 3.0, method="spectral-dense-pairs", **SMALL) for _ in range(2)]
    with pytest.raises(ValueError, match="in their order"):
        caches[0][1].merge([cache[1] for cache in caches])
    merged = [layer.merge(list(layers)) for layer, layers in zip(caches[0], zip(*caches))]
    assert merged[1].first is merged[0] and merged[0].store.batch == 2


def test_merged_and_extracted_caches_share_their_arrays(tiny):
    caches = [new_cache(tiny) for _ in range(2)]
    for cache, count in zip(caches, (150, 90)):
        feed(tiny.model, cache, make_tokens(count))
    batch = [layer.merge([a, b]) for layer, a, b in zip(caches[0], *caches)]
    assert [layer.nbytes for layer in batch] == [a.nbytes + b.nbytes for a, b in zip(*caches)]
    assert [layer.size() for layer in batch] == [150, 150] and batch[0].offset.tolist() == [150, 90]
    held = {id(x) for cache in caches for layer in cache for x in layer.arrays()}
    assert {id(x) for layer in batch for x in layer.arrays()} == held
    for number, cache in enumerate(caches):
        got = [layer.extract(number) for layer in batch]
        assert [[id(x) for x in layer.arrays()] for layer in got] == [
            [id(x) for x in layer.arrays()] for layer in cache
        ]
    before = [bytes_of(cache) for cache in caches]
    with_an_empty_one = caches[0][0].merge([caches[0][0], new_cache(tiny)[0]])
    assert with_an_empty_one.offset.tolist() == [150, 0] and with_an_empty_one.store.batch == 2
    mx.eval(tiny.model(mx.array([[5], [6]]), cache=batch))
    assert [bytes_of(cache) for cache in caches] == before and batch[1].offset.tolist() == [151, 91]


def test_caches_that_are_made_differently_are_not_merged(tiny):
    cache = new_cache(tiny)[0]
    others = {
        "plan": new_cache(tiny, 3.0),
        "window 16 and 32": make_prompt_cache(tiny.model, tiny.profile, 2.0, sinks=4, window=32),
        "budget None and 60": new_cache(tiny, 2.0, method="random+spectral", budget_tokens=60),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            cache.merge([cache, other[0]])


def test_a_copy_shares_what_is_sealed_and_goes_on_by_itself(family):
    """mlx-lm's prompt cache copies an entry at every hit."""
    cache = new_cache(family)
    feed(family.model, cache, make_tokens(200))
    before = bytes_of(cache)
    used = mx.get_active_memory()
    new = copy.deepcopy(cache)
    assert mx.get_active_memory() == used
    for ours, theirs in zip(compressed(new), compressed(cache)):
        assert [id(x) for x in ours.arrays()] == [id(x) for x in theirs.arrays()]
        assert [id(x) for x in ours.tables()] == [id(x) for x in theirs.tables()]
    feed(family.model, new, make_tokens(40, 5))
    for layer in compressed(new):
        layer.trim(60)
    assert bytes_of(cache) == before and [c.offset for c in cache] == [200] * len(cache)


def test_stored_caches_of_the_server(tiny):
    """mlx-lm's `LRUPromptCache`: a longer entry is copied and trimmed, and bytes are counted."""
    stored, tokens = host_cache.LRUPromptCache(), make_tokens(180)
    cache = new_cache(tiny)
    feed(tiny.model, cache, tokens)
    stored.insert_cache("tiny", tokens, cache)
    assert stored.nbytes == cache_nbytes(cache) == sum(layer.nbytes for layer in cache)
    got, rest = stored.fetch_nearest_cache("tiny", [*tokens[:170], 7, 8])
    assert rest == [7, 8] and got[0].offset == 170 and cache[0].offset == 180
    generator = BatchGenerator(tiny.model)
    generator.insert([rest], [2], [got], [tokens[:170]])
    responses = generator.next_generated()
    assert len(responses) == 1 and generator.prompt_cache_nbytes > 0
    generator.close()
    again, rest = stored.fetch_nearest_cache("tiny", tokens)
    assert rest == [] and [layer.nbytes for layer in again] == [layer.nbytes for layer in cache]


@contextmanager
def served(path, make_cache):
    """mlx-lm's server for the model at `path`, whose caches `make_cache` makes: the generator, and what posts to it."""
    server, providers = pytest.importorskip("mlx_lm.server"), []
    arguments = ["mlx_lm.server", "--model", str(path), "--temp", "0", "--log-level", "ERROR"]
    run = patch.object(server, "run", lambda host, port, provider: providers.append(provider))
    with run, patch.object(sys, "argv", arguments):
        server.main()
    (provider,) = providers
    load, loaded = provider.load, []

    def load_with_ours(*args):
        model, tokenizer = load(*args)
        if "make_cache" not in vars(model):
            model.set_dtype(mx.float32)
            model.make_cache = lambda: make_cache(model)
            loaded.append(model)
        return model, tokenizer

    provider.load = load_with_ours
    generator = server.ResponseGenerator(provider, host_cache.LRUPromptCache(16))
    handler = functools.partial(server.APIHandler, generator, system_fingerprint="test")
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()

    def post(body: dict) -> dict:
        address = f"http://127.0.0.1:{http.server_address[1]}/v1/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    try:
        yield generator, post
    finally:
        http.shutdown()
        http.server_close()
        generator.stop_and_join()
        for model in loaded:
            restore(model)


def test_eight_requests_at_a_time_to_the_server_of_mlx_lm(tmp_path):
    """Each gets the tokens that its prompt gets alone, most of them in a batch, and is stored for the next time."""
    pytest.importorskip("torch")
    save_llama(tmp_path)
    model, tokenizer = load_model(tmp_path, "float32")
    profile, texts, expected = calibrate(model), [], []
    of = SimpleNamespace(model=model, profile=profile)
    for seed in range(60):
        text = "".join(chr(33 + token % 90) for token in make_tokens(40 + 7 * (seed % 8), seed))
        try:
            tokens = alone(of, tokenizer.encode(text), new_cache(of), 8, 2048)
        except AssertionError:  # a tie
            continue
        texts.append(text)
        expected.append(tokens)
        if len(texts) == 8:
            break
    batches = []
    step = GenerationBatch._step

    def counted(self):
        batches.append(len(self))
        return step(self)

    serving = served(tmp_path, lambda model: make_prompt_cache(model, profile, 2.0, **SMALL))
    with patch.object(GenerationBatch, "_step", counted), serving as (generator, post):
        bodies = [{"prompt": text, "max_tokens": 8, "logprobs": True} for text in texts]
        for cached in (False, True):
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(post, bodies))
            for answer, tokens in zip(answers, expected):
                got = [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]
                assert len(got) == 8 and (cached or got == tokens), "a stored cache has more tokens sealed"
                assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == cached
        stored = generator.prompt_cache
        assert generator.is_healthy and max(batches) > 1 and len(stored) >= 8
        token = 2 * 2 * 2 * 32 * 4  # bytes of it in a plain cache
        assert 0 < stored.nbytes < len(stored) * token * (max(map(len, map(tokenizer.encode, texts))) + 8)
    restore(model)


@pytest.mark.slow
def test_the_example_of_the_guide(capsys):
    page = (Path(__file__).parents[2] / "docs" / "guide" / "batches.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S))
    names: dict = {}
    exec(compile(code, "batches.md", "exec"), names)
    expected = [
        mlx_lm.generate(
            names["model"], names["tokenizer"], prompt, prompt_cache=names["model"].make_cache(), max_tokens=8
        )
        for prompt in names["prompts"]
    ]
    printed = ast.literal_eval(capsys.readouterr().out)
    assert [text.strip() for text in printed] == [text.strip() for text in expected]
    restore(names["model"])


def test_nbytes_is_the_memory_that_goes_with_a_cache(tiny):
    """At once, so that nothing that leads back to a cache keeps it; tables are shared by all caches of a plan."""
    limit = mx.set_cache_limit(0)  # else a buffer may be larger than what is asked for
    try:
        cache = new_cache(tiny)
        feed(tiny.model, cache, make_tokens(300), 100)
        mx.eval([layer.state for layer in cache])
        codecs = [(layer.store.codec, layer.store.staging) for layer in cache]
        told, used = sum(layer.nbytes for layer in cache), mx.get_active_memory()
        del cache
        freed = used - mx.get_active_memory()
    finally:
        mx.set_cache_limit(limit)
    assert told <= freed <= 1.02 * told and codecs, (told, freed)


def test_mlx_lm_refuses_to_save_what_it_could_not_load(tiny, tmp_path):
    cache = new_cache(tiny)
    feed(tiny.model, cache, make_tokens(90))
    with pytest.raises(ValueError) as error:
        host_cache.save_prompt_cache(str(tmp_path / "theirs.safetensors"), cache)
    assert "save_prompt_cache of spectral_kv_mlx" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert save_prompt_cache(tmp_path / "ours.safetensors", cache).exists()


@pytest.mark.parametrize("name, ours", [("kv_bits", "bits"), ("max_kv_size", "budget_tokens")])
def test_limits_of_mlx_lm_are_answered_in_one_line(tiny, name, ours):
    prompt, model = mx.array(make_tokens(20)), tiny.model
    wanted = f"{name}=8 changes no cache of spectralkv. Give {ours} to make_prompt_cache instead."
    cache = new_cache(tiny)
    for step in (2048, 7):
        with pytest.warns(UserWarning) as told:
            list(generate_step(prompt, model, prompt_cache=cache, max_tokens=2, prefill_step_size=step, **{name: 8}))
        assert {str(warning.message) for warning in told} == {wanted}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(generate_step(prompt, model, prompt_cache=cache, max_tokens=2))
        list(generate_step(prompt, model, max_tokens=2, **{name: 64 if name == "max_kv_size" else 8}))


def test_a_limit_of_a_batch_is_answered_in_one_line(tiny):
    with pytest.warns(UserWarning, match="max_kv_size=64 changes no cache") as told:
        batch_generate(
            tiny.model, Tokenizer(), tiny.prompts, [new_cache(tiny) for _ in tiny.prompts], 2, max_kv_size=64
        )
    assert len({str(warning.message) for warning in told}) == 1


def test_padding_is_told_before_and_behind(tiny):
    """`prepare` of mlx-lm's protocol, as `BatchKVCache` has it."""
    ours, theirs = new_cache(tiny, None, method="identity"), [host_cache.BatchKVCache([0, 0]) for _ in range(2)]
    rows = mx.array([make_tokens(30), make_tokens(30, 5)])
    for cache in (ours, theirs):
        for layer in cache:
            layer.prepare(left_padding=[0, 3])
            layer.prepare(lengths=[30, 20], right_padding=[0, 10])
    logits = [np.array(tiny.model(rows, cache=cache)) for cache in (ours, theirs)]
    np.testing.assert_allclose(logits[0][0], logits[1][0], atol=1e-4)
    np.testing.assert_allclose(logits[0][1, 3:20], logits[1][1, 3:20], atol=1e-4)
    for cache in (ours, theirs):
        for layer in cache:
            layer.finalize()
    assert ours[0].offset.tolist() == theirs[0].offset.tolist() == [30, 17]
    assert ours[0].left_padding == theirs[0].left_padding.tolist()
    more = mx.array([[5], [6]])
    np.testing.assert_allclose(*(np.array(tiny.model(more, cache=cache)) for cache in (ours, theirs)), atol=1e-4)
    with pytest.raises(ValueError, match="empty cache"):
        ours[0].prepare(left_padding=[1, 1])
    with pytest.raises(ValueError, match="lengths"):
        ours[0].prepare(right_padding=[0, 1])


def test_attention_of_the_host_sees_padded_batches_too(tiny):
    """Where our dispatcher is not installed, caches give back decoded keys and values."""
    expected = [alone(tiny, prompt, new_cache(tiny, None, method="identity"), 1) for prompt in tiny.prompts]
    with mlx_host.own_attention(tiny.model):
        caches = [new_cache(tiny, None, method="identity") for _ in tiny.prompts]
        mlx_host.restore(tiny.model)
        got = batch_generate(tiny.model, Tokenizer(), tiny.prompts, caches, 1, return_token_ids=True)
    assert got.token_ids == expected

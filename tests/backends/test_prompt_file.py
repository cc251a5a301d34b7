"""Stored prompt caches: what goes in comes out, a generation goes on as if nothing had been saved, damage is refused."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_profile import header_of, rewrite

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_models import ByteTokenizer, tiny_model, tokens  # noqa: E402

from spectral_kv_core.cache import prompt_cache_file as prompt_file  # noqa: E402
from spectral_kv_core.cache.prompt_cache_file import PromptFile  # noqa: E402
from spectral_kv_core.codecs.registry import make_plan  # noqa: E402
from spectral_kv_core.files import container as signed_file  # noqa: E402
from spectral_kv_core.planning.methods import METHODS  # noqa: E402
from spectral_kv_torch import (  # noqa: E402
    SpectralCache,
    SpectralProfiler,
    cache_nbytes,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from spectral_kv_torch.cache import SpectralKVLayer  # noqa: E402
from spectral_kv_torch.generation import decode_cache, encode_cache, feed, generate, plain_cache, score  # noqa: E402

AFFINE = replace(METHODS["affine"], group_size=16)  # the tiny heads have 16 channels
LIVE = {"identity": None, "affine": 4.5, "spectral": 3.0, "spectral-dense": 2.0}
TEXT = [bytes(b - 3 for b in tokens(1024, seed=9 + i)[0].tolist()).decode("latin-1") for i in range(2)]
QUESTION = tokens(9, seed=4)[0].tolist()


@functools.cache
def model_and_profile(name: str = "llama"):
    model = tiny_model(name)
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False)
    return model, profiler.profile_from_model(model, ByteTokenizer(), TEXT, name=name)


def read(cache, count=300, model=None, **kwargs):
    """`cache` after `count` tokens, which come back too."""
    ids = tokens(count)
    with torch.no_grad():
        (model or model_and_profile()[0])(ids, past_key_values=cache, **kwargs)
    return cache, ids[0].tolist()


def new(method="spectral", bits=3.0, name="llama", **options):
    model, profile = model_and_profile(name)
    return make_prompt_cache(model, profile, bits, method=AFFINE if method == "affine" else method, **options)


def greedy(model, cache, prompt=QUESTION):
    return generate(model, None, prompt, cache, 12, True, lambda token: None).tokens


def arrays_of(cache) -> list[torch.Tensor]:
    return [
        x
        for layer in cache.layers
        for x in (layer.arrays() if hasattr(layer, "arrays") else (layer.keys, layer.values))
    ]


def same(cache, other):
    ours, theirs = arrays_of(cache), arrays_of(other)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture
def path(tmp_path):
    """A file of the tiny Llama at 3 bits, `spectral`."""
    model, _ = model_and_profile()
    cache, ids = read(new())
    return save_prompt_cache(tmp_path / "folder" / "cache.safetensors", cache, ids, model=model)


def refused(path, profile=None, model=None, kind=ValueError, **options) -> str:
    ours, its_profile = model_and_profile()
    with pytest.raises(kind) as caught:
        load_prompt_cache(path, model or ours, profile or its_profile, **options)
    message = str(caught.value)
    assert message.startswith("Expected") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("method", LIVE)
def test_round_trip_goes_on_as_if_nothing_had_been_saved(method, name, tmp_path):
    model, profile = model_and_profile(name)
    cache, ids = read(new(method, LIVE[method], name), model=model)
    path = save_prompt_cache(tmp_path / "c", cache, ids, model=model)
    loaded, told = load_prompt_cache(path, model, profile)
    assert told == ids and isinstance(loaded, SpectralCache) and loaded.get_seq_length() == 300
    same(loaded, cache)
    file, size = PromptFile.load(path), cache_nbytes(loaded)
    assert file.size() == size == sum(file.bytes_by_part().values()) == sum(x.nbytes for x in arrays_of(cache))
    assert file.size().dense_nbytes == size.dense_nbytes == cache_nbytes(cache).dense_nbytes
    expected = score(model, QUESTION, tokens(30, seed=5)[0].tolist(), cache)
    np.testing.assert_array_equal(score(model, QUESTION, tokens(30, seed=5)[0].tolist(), loaded), expected)
    same(loaded, cache)


@pytest.mark.parametrize("method", ["identity", "spectral"])
def test_transformers_generates_from_it(method, tmp_path):
    """`model.generate` with all token ids, and ours with the new ones only, both as without a file."""
    model, profile = model_and_profile()
    cache, ids = read(new(method, LIVE[method]))
    path = save_prompt_cache(tmp_path / "c", cache, ids)
    expected = greedy(model, cache)
    assert greedy(model, load_prompt_cache(path, model, profile)[0]) == expected and len(set(expected)) > 2
    loaded, told = load_prompt_cache(path, model, profile)
    out = model.generate(
        torch.tensor([told + QUESTION]), past_key_values=loaded, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert out[0, 309:].tolist() == expected
    if method == "identity":
        out = model.generate(torch.tensor([ids + QUESTION]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert out[0, 309:].tolist() == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_batch_with_left_padding(name, tmp_path):
    model, profile = model_and_profile(name)
    mask = (torch.arange(200)[None] >= torch.tensor([[0], [70], [0]])).long()

    def feed_batch(cache, ids, mask):
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            return model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits

    ids = tokens(200, batch=3)
    cache = new(bits=4.0, name=name)
    feed_batch(cache, ids, mask)
    path = save_prompt_cache(tmp_path / "c", cache, ids)
    loaded, told = load_prompt_cache(path, model, profile)
    assert told == ids.tolist() and PromptFile.load(path).padding == [0, 70, 0]
    same(loaded, cache)
    assert PromptFile.load(path).size().dense_nbytes == cache_nbytes(cache).dense_nbytes
    plain = load_prompt_cache(path, model, profile, method="plain")[0]
    again = load_prompt_cache(path, model, profile, method="identity")[0]
    more, mask = tokens(3, seed=8, batch=3), torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
    expected = feed_batch(cache, more, mask)
    assert torch.equal(feed_batch(loaded, more, mask), expected)
    for other in (plain, again):
        torch.testing.assert_close(feed_batch(other, more, mask), expected, atol=2e-3, rtol=2e-3)


def test_half_precision_is_kept_to_the_bit(tmp_path):
    _, profile = model_and_profile()
    model = tiny_model("llama")
    for parameter in model.parameters():  # transformers leaves RoPE in float32
        parameter.data = parameter.data.bfloat16()
    cache, ids = read(make_prompt_cache(model, profile, 3.0), model=model)
    path = save_prompt_cache(tmp_path / "c", cache, ids)
    loaded, _ = load_prompt_cache(path, model, profile)
    same(loaded, cache)
    assert loaded.layers[0].store.padding_groups[0].exact_keys.dtype == torch.bfloat16
    assert load_file(path)["layers/0/padding_groups/0/keys"].dtype == np.uint16
    wider = load_prompt_cache(path, model.float(), profile)[0].layers[0].store.padding_groups[0].exact_keys
    assert wider.dtype == torch.float32 and torch.equal(
        wider, cache.layers[0].store.padding_groups[0].exact_keys.float()
    )


def test_a_staged_prompt_is_ended_first(tmp_path):
    model, profile = model_and_profile()
    cache = new(bits=2.0)
    for part in torch.split(tokens(600), 200, dim=1):
        feed(model, part[0].tolist(), cache)
    assert cache.layers[0].store.is_staged
    path = save_prompt_cache(tmp_path / "c", cache)
    loaded, told = load_prompt_cache(path, model, profile)
    assert told is None and not cache.layers[0].store.is_staged
    same(loaded, cache)
    for part in torch.split(tokens(100, seed=3), 50, dim=1):  # it goes on as a prompt does
        feed(model, part[0].tolist(), loaded)
        feed(model, part[0].tolist(), cache)
    assert loaded.layers[0].store.is_staged
    same(loaded, cache)


def test_several_chunks_and_none(tmp_path, monkeypatch):
    model, profile = model_and_profile()
    monkeypatch.setattr("spectral_kv_core.codecs.base.Codec.chunk_tokens", 64)
    cache, _ = read(new())
    loaded, _ = load_prompt_cache(save_prompt_cache(tmp_path / "c", cache), model, profile)
    assert [(c.start, c.tokens) for c in loaded.layers[0].store.padding_groups[0].chunks] == [
        (4, 64),
        (68, 64),
        (132, 64),
        (196, 32),
    ]
    same(loaded, cache)
    short, _ = read(new(), 5)
    same(load_prompt_cache(save_prompt_cache(tmp_path / "c", short), model, profile)[0], short)
    bare, _ = read(new(window=0, sinks=0), 64)
    same(load_prompt_cache(save_prompt_cache(tmp_path / "c", bare), model, profile)[0], bare)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_plain_caches_go_in_and_come_out(name, tmp_path):
    model, profile = model_and_profile(name)
    plain, ids = read(plain_cache(model), model=model)
    path = save_prompt_cache(tmp_path / "c", plain, ids, model=model)
    assert PromptFile.load(path).method.name == "identity"
    loaded, _ = load_prompt_cache(path, model, method="plain")
    assert type(loaded) is transformers.DynamicCache
    same(loaded, plain)
    np.testing.assert_array_equal(feed(model, QUESTION, loaded), feed(model, QUESTION, plain))
    plain, _ = read(plain_cache(model), model=model)
    save_prompt_cache(path, plain, ids, model=model, method="spectral", bits=4, profile=profile, sinks=8, window=32)
    loaded, _ = load_prompt_cache(path, model, profile)
    reference = new(bits=4.0, name=name, sinks=8, window=32)
    same(loaded, read(reference, model=model)[0])  # a first call is encoded as a whole, which transcoding does too


def test_from_one_method_to_another(path):
    model, profile = model_and_profile()
    cache, _ = load_prompt_cache(path, model, profile)
    held = cache.layers[1].keys_and_values()
    same(load_prompt_cache(path, model, profile, method="spectral", bits=3.0)[0], cache)  # nothing is coded twice
    other, _ = load_prompt_cache(path, model, profile, method="spectral-dense", bits=6.0)
    assert other.plan.method.name == "spectral-dense" and other.layers[1].store.padding_groups[0].sealed == 224
    for a, b in zip(other.layers[1].keys_and_values(), held):
        assert 0 < float((a - b).norm() / b.norm()) < 0.2
    plain = load_prompt_cache(path, model, profile, method="plain")[0]
    assert torch.equal(plain.layers[1].keys, held[0]) and torch.equal(plain.layers[1].values, held[1])
    assert "among" in refused(path, method="nothing")
    assert "for files" in refused(path, method="spectral-stored")
    assert "received plain" in refused(path, method="plain", bits=3.0)


def test_a_method_for_files(tmp_path):
    model, profile = model_and_profile()
    plain, ids = read(plain_cache(model))
    options = {"model": model, "method": "spectral-stored", "profile": profile}
    sizes = [save_prompt_cache(tmp_path / "c", plain, ids, bits=b, **options).stat().st_size for b in (4.0, 1.0)]
    loaded, told = load_prompt_cache(tmp_path / "c", model, profile)
    file = PromptFile.load(tmp_path / "c")
    sealed = 224 * 3 * 2 * 2 * 16  # tokens, layers, sides, heads, channels
    assert 0.5 < 8 * file.bytes_by_part()["codes"] / sealed <= 1.0 and sizes[1] < sizes[0]
    assert type(loaded) is transformers.DynamicCache and told == ids
    container = encode_cache(make_plan(profile.shape, profile, "spectral-stored", 1.0), plain, 4, 64)
    same(decode_cache(container, model), loaded)
    with pytest.raises(ValueError, match="for files"):
        SpectralCache(profile, method="spectral-stored")
    assert load_prompt_cache(tmp_path / "c", model, profile, method="spectral", bits=3.0)[0].plan.bits == 3.0
    short, _ = read(plain_cache(model), 20)
    save_prompt_cache(tmp_path / "c", short, bits=1.0, **options)  # nothing to seal
    same(load_prompt_cache(tmp_path / "c", model, profile)[0], short)


def test_pinned_header(path):
    header = header_of(path)
    metadata = json.loads(header.pop("__metadata__")["spectralkv"])
    assert sorted(metadata) == [
        "bits", "format", "layers", "library_version", "metadata", "method", "model", "plan_hash", "profile", "seen",
        "sha256", "shape", "sinks", "version", "weights_digest", "window",
    ]  # fmt: skip
    assert (metadata["format"], metadata["version"], metadata["seen"]) == ("spectralkv-cache", 2, 300)
    assert metadata["layers"] == 3 * [
        {"dtype": "float32", "padding_groups": [{"sequences": [0], "pad": 0, "chunks": [[4, 224]]}]}
    ]
    assert sorted(metadata["method"]) == [
        "block", "codec", "group", "group_size", "name", "quantizer", "reads", "rope", "rounding", "time",
    ]  # fmt: skip
    assert header["tokens"]["dtype"] == "I32" and header["tokens"]["shape"] == [300]
    assert header["layers/2/padding_groups/0/values"]["shape"] == [1, 2, 76, 16]
    assert all(name.startswith(("tokens", "layers/")) for name in header)


def test_file_is_the_same_twice(path, tmp_path):
    model, profile = model_and_profile()
    cache, ids = load_prompt_cache(path, model, profile)
    assert save_prompt_cache(tmp_path / "again", cache, ids, model=model).read_bytes() == path.read_bytes()
    assert PromptFile.load(path).save(tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("keep", [0, 8, 100, 0.5, -1])
def test_truncated_file_is_refused(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert "truncated" in refused(path) and str(path) in refused(path)


@pytest.mark.parametrize("place", [0.5, 0.999])
def test_altered_array_is_refused(path, place):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    assert "altered" in refused(path)


@pytest.mark.parametrize("field", [*PromptFile.PLAIN_FIELDS, "method", "shape", "sha256"])
def test_altered_header_is_refused(path, field):
    rewrite(path, **{field: None})
    assert "altered" in refused(path)


def test_other_versions_and_kinds(path, tmp_path):
    _, profile = model_and_profile()
    rewrite(path, version=3)
    assert "version 2" in refused(path) and "pip install -U" in refused(path)
    rewrite(path, version=1)  # whose plans have hashes of another kind
    assert "received 1" in refused(path) and "Make it again: spectralkv cache-prompt" in refused(path)
    assert "cache-prompt" in refused(tmp_path / "none", kind=FileNotFoundError)
    assert "spectralkv-profile" in refused(profile.save(tmp_path / "profile"))
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other")
    assert "another safetensors file" in refused(tmp_path / "other")
    (tmp_path / "pickle").write_bytes(b"\x80\x04}q\x00.")
    refused(tmp_path / "pickle")


def test_another_model(path, caplog):
    model, _ = model_and_profile()
    message = refused(path, model=model_and_profile("qwen3")[0])
    assert "head_dim 32, the file has 16" in message and "cache-prompt" in message
    assert "RoPE" in refused(path, model=tiny_model("llama3-rope"))
    tuned = tiny_model("llama")
    tuned.model.norm.weight.data.mul_(1.5)
    with caplog.at_level(logging.WARNING):
        load_prompt_cache(path, model, model_and_profile()[1])
        assert not caplog.records
        load_prompt_cache(path, tuned, model_and_profile()[1])
    assert "other weights" in caplog.text and str(path) in caplog.text


def test_another_profile(path, tmp_path, monkeypatch):
    model, profile = model_and_profile()
    profiler = SpectralProfiler(tokens=1024, document=512, progress=False)
    other = profiler.profile_from_model(model, ByteTokenizer(), TEXT[:1], name="a shorter text")
    other.save(tmp_path / "other.safetensors")
    message = refused(path, type(other).load(tmp_path / "other.safetensors"))
    assert "not saved, of llama, 2,048 tokens" in message and "other.safetensors, of a shorter text" in message
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "store"))
    with pytest.raises(ValueError, match="found none"):
        load_prompt_cache(path, model)
    profile.save(prompt_file.find_profile.__globals__["cached_profile_path"](profile.shape))
    same(load_prompt_cache(path, model)[0], load_prompt_cache(path, model, profile)[0])


@pytest.mark.parametrize(
    "name,change",
    [
        ("tokens", lambda x: x[1:]),
        ("layers/1/padding_groups/0/keys", lambda x: x[:, :, 1:]),
        ("layers/1/padding_groups/0/values", lambda x: x.astype(np.float16)),
        ("layers/0/padding_groups/0/chunks/0/0", lambda x: np.concatenate([x, x], axis=1)),
        ("layers/2/padding_groups/0/chunks/0/1", lambda x: x.astype(np.uint16)),
        ("layers/0/padding_groups/0/chunks/1/0", lambda x: np.zeros(3, np.uint8)),
    ],
)
def test_arrays_must_fit_header_and_plan(path, name, change):
    file = PromptFile.load(path)
    file.arrays[name] = np.ascontiguousarray(change(file.arrays.get(name)))
    file.save(path)
    assert name in refused(path)


def test_chunks_must_not_leave_gaps(path):
    file = PromptFile.load(path)
    file.layers[1]["padding_groups"][0]["chunks"] = [[20, 224]]
    file.save(path)
    assert "gaps" in refused(path)


def test_what_cannot_be_stored(tmp_path):
    model, profile = model_and_profile()
    path = tmp_path / "c"
    for empty in (new(), plain_cache(model)):
        with pytest.raises(ValueError, match="empty"):
            save_prompt_cache(path, empty, model=model)
    cache, ids = read(new(), 40)
    for wrong in (ids[1:], [ids, ids], []):
        with pytest.raises(ValueError, match="ids of the 40 tokens"):
            save_prompt_cache(path, cache, wrong)
    with pytest.raises(ValueError, match="model="):
        save_prompt_cache(path, read(plain_cache(model))[0])
    with pytest.raises(ValueError, match="method="):
        save_prompt_cache(path, cache, bits=2.0)
    with pytest.raises(ValueError, match="between"):
        save_prompt_cache(path, cache, model=model, method="spectral", bits=20, profile=profile)
    cache.layers[1] = transformers.cache_utils.LinearAttentionLayer()
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        save_prompt_cache(path, cache)
    assert not path.exists()


def test_another_window(tmp_path):
    model, profile = model_and_profile("gemma3")
    path = save_prompt_cache(tmp_path / "c", read(new(name="gemma3"), model=model)[0])
    model.config.sliding_window, before = 64, model.config.sliding_window
    try:
        assert "another window" in refused(path, profile, model)
    finally:
        model.config.sliding_window = before


def test_failed_write_leaves_what_was_there(path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(signed_file.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        PromptFile.load(path).save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_recipe_of_ones_own_travels_with_the_file(tmp_path):
    model, _ = model_and_profile()
    file = PromptFile.load(save_prompt_cache(tmp_path / "c", read(new("affine", 4.5))[0]))
    assert file.method.group_size == 16 and file.method.name == "affine"
    file = replace(file, method=replace(AFFINE, name="mine"))
    file.plan_hash = make_plan(file.shape, None, file.method, 4.5).hash
    file.save(tmp_path / "c")
    assert isinstance(load_prompt_cache(tmp_path / "c", model)[0].layers[0], SpectralKVLayer)

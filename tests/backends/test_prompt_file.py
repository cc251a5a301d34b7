"""Stored prompt caches: what goes in comes out, a generation goes on as if nothing had been saved, damage is refused.

`test_both_hosts.py` has files that travel from one host to the other.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hosts import SMALL, TEXT, of_families, only, tokens, without_counters
from safetensors.numpy import load_file, save_file
from test_profile import header_of, rewrite
from tolerances import assert_close, relative_rms

from spectral_kv_core.cache import prompt_cache_file as prompt_file
from spectral_kv_core.cache.file_layers import in_words
from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.codecs.chunk import AdaptedChunk, CutChunk
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.files import container as signed_file
from spectral_kv_core.planning.budget import elements_per_token
from spectral_kv_core.planning.methods import METHODS

AFFINE = replace(METHODS["affine"], group_size=16)  # some tiny heads have 16 channels
LIVE = {"identity": None, "affine": 4.5, "spectral": 3.0, "spectral-dense": 2.0}
QUESTION = tokens(9, seed=4)
sliding = of_families("llama", "gemma3")  # gemma3 has layers with a sliding window


def read(host, cache, count: int = 300, family: str = "llama"):
    """`cache` after `count` tokens, which come back too."""
    host.logits(host.model(family), tokens(count), cache)
    return cache, tokens(count)


def new(host, method="spectral", bits=3.0, family: str = "llama", **options):
    method = AFFINE if method == "affine" else method
    return host.make_prompt_cache(host.model(family), host.profile(family), bits, method=method, **options)


def plain_after(host, family: str = "llama", count: int = 300):
    return read(host, host.plain_cache(host.model(family)), count, family)


def greedy(host, cache) -> list[int]:
    return host.generate(host.model("llama"), None, QUESTION, cache, 12, True, lambda token: None).tokens


def same(host, cache, other) -> None:
    """Every array of two caches, to the bit."""
    ours, theirs = host.arrays(cache), host.arrays(other)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(host.ops.to_file(a)[0], host.ops.to_file(b)[0])


@functools.cache
def stored(host) -> bytes:
    """A file of the tiny Llama at 3 bits, `spectral`."""
    cache, ids = read(host, new(host))
    with tempfile.TemporaryDirectory() as folder:
        return host.save_prompt_cache(Path(folder) / "c", cache, ids, model=host.model("llama")).read_bytes()


@pytest.fixture
def path(host, tmp_path):
    path = tmp_path / "folder" / "cache.safetensors"
    path.parent.mkdir()
    path.write_bytes(stored(host))
    return path


def load(host, path, family: str = "llama", **options):
    return host.load_prompt_cache(path, host.model(family), host.profile(family), **options)


def refused(host, path, profile=None, model=None, kind=ValueError, **options) -> str:
    with pytest.raises(kind) as caught:
        host.load_prompt_cache(path, model or host.model("llama"), profile or host.profile("llama"), **options)
    message = str(caught.value)
    assert message.startswith("Expected") and "\n" not in message
    return message


# --- round trips


@sliding
@pytest.mark.parametrize("method", LIVE)
def test_round_trip_goes_on_as_if_nothing_had_been_saved(host, method, family, tmp_path):
    model = host.model(family)
    cache, ids = read(host, new(host, method, LIVE[method], family), family=family)
    path = host.save_prompt_cache(tmp_path / "folder" / "c", cache, ids, model=model)
    loaded, told = load(host, path, family)
    assert told == ids and type(loaded) is type(cache) and host.seen(loaded) == 300
    same(host, loaded, cache)
    file, size = PromptFile.load(path), host.cache_nbytes(loaded)
    assert file.size() == sum(file.bytes_by_kind().values()) == sum(x.nbytes for x in host.arrays(cache))
    assert file.size() == without_counters(size) or (host.NAME, family) == (
        "mlx",
        "gemma3",
    )  # whose rotating caches grow in steps
    assert file.size().dense_nbytes == size.dense_nbytes == host.cache_nbytes(cache).dense_nbytes
    follow = tokens(30, seed=5)
    expected = host.score(model, QUESTION, follow, cache)
    np.testing.assert_array_equal(host.score(model, QUESTION, follow, loaded), expected)
    same(host, loaded, cache)


@sliding
@pytest.mark.parametrize("step", [1, 50], ids=["one by one", "staged"])
def test_however_the_prompt_was_fed(host, family, step, tmp_path):
    model, cache, ids = host.model(family), new(host, bits=2.0, family=family, **SMALL), tokens(130)
    for start in range(0, 130, step):
        host.backend.feed(model, ids[start : start + step], cache)
    loaded, _ = load(host, host.save_prompt_cache(tmp_path / "c", cache, ids, model=model), family)
    same(host, loaded, cache)
    for more in (1, 5):
        expected = host.logits(model, tokens(9, seed=more), cache, more)
        assert_close("logits", host.logits(model, tokens(9, seed=more), loaded, more), expected)


@pytest.mark.parametrize("method", ["identity", "spectral"])
def test_the_host_generates_from_it(host, method, tmp_path):
    """By its own loop and by ours, both as without a file."""
    model = host.model("llama")
    cache, ids = read(host, new(host, method, LIVE[method]))
    path = host.save_prompt_cache(tmp_path / "c", cache, ids)
    expected = greedy(host, copy.deepcopy(cache))
    assert greedy(host, load(host, path)[0]) == expected and len(set(expected)) > 2
    loaded, told = load(host, path)
    assert host.greedy(model, QUESTION, loaded, 12, before=told) == expected
    if method == "identity":
        assert host.greedy(model, ids + QUESTION, host.plain_cache(model), 12) == expected


@sliding
def test_batch_with_left_padding(host, family, tmp_path):
    model, profile, padding = host.model(family), host.profile(family), [0, 75, 0]
    ids = [[2] * pad + tokens(203 - pad, seed=n) for n, pad in enumerate(padding)]
    cache = host.padded_cache(model, padding, profile, 4.0)
    host.batch_logits(model, ids, padding, cache, 0, 200)
    path = host.save_prompt_cache(tmp_path / "c", cache, [row[:200] for row in ids], model=model)
    loaded, told = load(host, path, family)
    assert told == [row[:200] for row in ids] and PromptFile.load(path).padding == padding
    same(host, loaded, cache)
    assert PromptFile.load(path).size().dense_nbytes == host.cache_nbytes(cache).dense_nbytes

    def follow(cache) -> np.ndarray:
        parts = [host.batch_logits(model, ids, padding, cache, start, start + 1) for start in range(200, 203)]
        return np.concatenate(parts, axis=1)

    others = [load(host, path, family, method=method)[0] for method in ("plain", "identity")]
    expected = follow(cache)
    np.testing.assert_array_equal(follow(loaded), expected)
    for other in others:
        assert_close("next tokens", follow(other), expected, limit=1e-4)


def test_half_precision_is_kept_to_the_bit(host, tmp_path):
    profile, model = host.profile("llama"), host.cast(host.new_model("llama"), "bfloat16")
    cache = host.make_prompt_cache(model, profile, 3.0)
    host.logits(model, tokens(300), cache)
    path = host.save_prompt_cache(tmp_path / "c", cache, tokens(300))
    loaded, _ = host.load_prompt_cache(path, model, profile)
    same(host, loaded, cache)
    assert host.dtype_of(host.stores(loaded)[0].padding_groups[0].exact_keys) == "bfloat16"
    assert load_file(path)["layers/0/padding_groups/0/keys"].dtype == np.uint16
    wider, _ = host.load_prompt_cache(path, host.cast(model, "float32"), profile)
    keys, held = (host.stores(c)[0].padding_groups[0].exact_keys for c in (wider, cache))
    assert host.dtype_of(keys) == "float32"
    np.testing.assert_array_equal(*(host.ops.to_numpy(host.ops.astype(x, host.ops.float32)) for x in (keys, held)))


def test_a_staged_prompt_is_ended_first(host, tmp_path):
    model, cache, ids = host.model("llama"), new(host, bits=2.0), tokens(700)
    for start in range(0, 600, 200):
        host.backend.feed(model, ids[start : start + 200], cache)
    assert host.leading_layers(cache)[0].store.is_staged
    path = host.save_prompt_cache(tmp_path / "c", cache)
    loaded, told = load(host, path)
    assert told is None and not host.leading_layers(cache)[0].store.is_staged
    same(host, loaded, cache)
    for start in (600, 650):  # it goes on as a prompt does
        for one in (cache, loaded):
            host.backend.feed(model, ids[start : start + 50], one)
    assert host.leading_layers(loaded)[0].store.is_staged
    same(host, loaded, cache)


def test_several_chunks_and_none(host, tmp_path, monkeypatch):
    monkeypatch.setattr("spectral_kv_core.codecs.base.Codec.chunk_tokens", 64)
    cache, _ = read(host, new(host))
    loaded, _ = load(host, host.save_prompt_cache(tmp_path / "c", cache))
    chunks = [(c.start, c.tokens) for c in host.stores(loaded)[0].padding_groups[0].chunks]
    assert chunks == [(4, 64), (68, 64), (132, 64), (196, 32)]
    same(host, loaded, cache)
    short, _ = read(host, new(host), 5)
    same(host, load(host, host.save_prompt_cache(tmp_path / "c", short))[0], short)
    bare, _ = read(host, new(host, window=0, sinks=0), 64)
    same(host, load(host, host.save_prompt_cache(tmp_path / "c", bare))[0], bare)


@pytest.mark.parametrize("method", ["spectral", "spectral-dense"])
def test_chunks_of_every_kind(host, method, tmp_path):
    """A run of one token, another text, and a crop inside a block."""
    model, ids = host.model("llama"), [*[7] * 150, *tokens(150)]
    cache = new(host, method)
    host.logits(model, ids, cache)
    host.crop(cache, 113)
    kinds = {type(chunk) for store in host.stores(cache) for chunk in store.padding_groups[0].chunks}
    assert {AdaptedChunk, CutChunk} <= kinds
    path = host.save_prompt_cache(tmp_path / "c", cache, ids[:-113])
    loaded, _ = load(host, path)
    same(host, loaded, cache)
    np.testing.assert_array_equal(host.logits(model, QUESTION, loaded), host.logits(model, QUESTION, cache))
    told = PromptFile.load(path)
    assert (
        sum(told.bytes_by_kind().values()) == int(told.size()) == sum(x.nbytes for x in told.arrays.values()) - 4 * 187
    )


@sliding
def test_plain_caches_go_in_and_come_out(host, family, tmp_path):
    model, profile = host.model(family), host.profile(family)
    plain, ids = plain_after(host, family)
    path = host.save_prompt_cache(tmp_path / "c", plain, ids, model=model)
    assert PromptFile.load(path).method.name == "identity"
    loaded, _ = host.load_prompt_cache(path, model, method="plain")
    assert type(loaded) is type(plain) and list(map(type, host.layers(loaded))) == list(map(type, host.layers(plain)))
    same(host, loaded, plain)
    for step in (9, 1):
        expected = host.logits(model, QUESTION, plain, step)
        np.testing.assert_array_equal(host.logits(model, QUESTION, loaded, step), expected)
    plain, _ = plain_after(host, family)
    host.save_prompt_cache(
        path, plain, ids, model=model, method="spectral", bits=4, profile=profile, sinks=8, window=32
    )
    loaded, _ = load(host, path, family)
    filled, fed = (new(host, bits=4.0, family=family, sinks=8, window=32) for _ in range(2))
    host.fill(filled, plain)
    same(host, loaded, filled)
    read(host, fed, family=family)  # a first call is encoded as a whole too, of keys that may differ in the last bit
    for store, other in zip(host.stores(loaded), host.stores(fed), strict=True):
        (group,), (expected,) = store.padding_groups, other.padding_groups
        assert [(c.start, c.tokens) for c in group.chunks] == [(c.start, c.tokens) for c in expected.chunks]


def vectors(host, cache, layer: int = 1) -> list[np.ndarray]:
    """Decoded keys and values of a layer."""
    return [host.ops.to_numpy(x) for x in host.layers(cache)[layer].keys_and_values()]


def test_from_one_method_to_another(host, path):
    cache, _ = load(host, path)
    held = vectors(host, cache)
    same(host, load(host, path, method="spectral", bits=3.0)[0], cache)  # nothing is coded twice
    errors = []
    for bits in (2.0, 6.0):
        other, _ = load(host, path, method="spectral-dense", bits=bits)
        row = host.leading_layers(other)[1]
        assert row.plan.method.name == "spectral-dense" and row.store.padding_groups[0].sealed == 224
        errors.append([relative_rms(a, b) for a, b in zip(vectors(host, other), held, strict=True)])
    coarse, fine = np.array(errors)
    # the plans of the tiny MLX Llama spend few bits on this layer
    assert (fine > 0).all() and (fine < coarse).all() and (host.NAME == "mlx" or (fine < 0.2).all()), errors
    plain = load(host, path, method="plain")[0]
    for a, b in zip(host.keys_and_values(host.layers(plain)[1]), held, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "among" in refused(host, path, method="nothing")
    assert "for files" in refused(host, path, method="spectral-stored")
    assert "received plain" in refused(host, path, method="plain", bits=3.0)


def test_a_method_for_files(host, tmp_path):
    model, profile = host.model("llama"), host.profile("llama")
    plain, ids = plain_after(host)
    options, path = {"model": model, "method": "spectral-stored", "profile": profile}, tmp_path / "c"
    sizes = [host.save_prompt_cache(path, plain, ids, bits=b, **options).stat().st_size for b in (4.0, 1.0)]
    loaded, told = load(host, path)
    sealed = 224 * elements_per_token(profile.shape)
    assert 0.5 < 8 * PromptFile.load(path).bytes_by_kind()["codes"] / sealed <= 1.0 and sizes[1] < sizes[0]
    assert type(loaded) is type(plain) and told == ids
    assert list(map(type, host.layers(loaded))) == list(map(type, host.layers(plain)))
    container = host.encode_cache(make_plan(profile.shape, profile, "spectral-stored", 1.0), plain, 4, 64)
    same(host, host.decode_cache(container, model), loaded)
    with pytest.raises(ValueError, match="for files"):
        host.make_prompt_cache(model, profile, method="spectral-stored")
    assert host.leading_layers(load(host, path, method="spectral", bits=3.0)[0])[0].plan.bits == 3.0
    short, _ = plain_after(host, count=20)
    host.save_prompt_cache(path, short, bits=1.0, **options)  # nothing to seal
    same(host, load(host, path)[0], short)


# --- the file


def test_pinned_header(host, path):
    shape = host.profile("llama").shape
    header = header_of(path)
    metadata = json.loads(header.pop("__metadata__")["spectralkv"])
    assert sorted(metadata) == [
        "bits", "format", "layers", "library_version", "metadata", "method", "model", "plan_hash", "profile", "seen",
        "sha256", "shape", "sinks", "version", "weights_digest", "window",
    ]  # fmt: skip
    assert (metadata["format"], metadata["version"], metadata["seen"]) == ("spectralkv-cache", 2, 300)
    assert metadata["layers"] == shape.num_layers * [
        {"dtype": "float32", "padding_groups": [{"sequences": [0], "pad": 0, "chunks": [[4, 224]]}]}
    ]
    assert sorted(metadata["method"]) == [
        "block", "codec", "group", "group_size", "name", "quantizer", "reads", "rope", "rounding", "time",
    ]  # fmt: skip
    assert header["tokens"]["dtype"] == "I32" and header["tokens"]["shape"] == [300]
    last = header[f"layers/{shape.num_layers - 1}/padding_groups/0/values"]
    assert last["shape"] == [1, shape.kv_heads, 76, shape.head_dim]
    assert all(name.startswith(("tokens", "layers/")) for name in header)


def test_file_is_the_same_twice(host, path, tmp_path):
    cache, ids = load(host, path)
    model, again = host.model("llama"), tmp_path / "again"
    assert host.save_prompt_cache(again, cache, ids, model=model).read_bytes() == path.read_bytes()
    assert PromptFile.load(path).save(again).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("keep", [0, 8, 100, 0.5, -1])
def test_truncated_file_is_refused(host, path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert "truncated" in refused(host, path) and str(path) in refused(host, path)


@pytest.mark.parametrize("place", [0.5, 0.999])
def test_altered_array_is_refused(host, path, place):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    assert "altered" in refused(host, path)


@pytest.mark.parametrize("field", [*PromptFile.PLAIN_FIELDS, "method", "shape", "sha256"])
def test_altered_header_is_refused(host, path, field):
    rewrite(path, **{field: None})
    assert "altered" in refused(host, path)


def test_other_versions_and_kinds(host, path, tmp_path):
    profile = host.profile("llama")
    rewrite(path, version=3)
    assert "version 2" in refused(host, path) and "pip install -U" in refused(host, path)
    rewrite(path, version=1)  # whose plans have hashes of another kind
    assert "received 1" in refused(host, path) and "Make it again: spectralkv cache-prompt" in refused(host, path)
    assert "cache-prompt" in refused(host, tmp_path / "none", kind=FileNotFoundError)
    assert "spectralkv-profile" in refused(host, profile.save(tmp_path / "profile"))
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other")
    assert "another safetensors file" in refused(host, tmp_path / "other")
    (tmp_path / "pickle").write_bytes(b"\x80\x04}q\x00.")
    refused(host, tmp_path / "pickle")


def test_another_model(host, path, caplog):
    model, profile, shape = host.model("llama"), host.profile("llama"), host.profile("llama").shape
    message = refused(host, path, model=host.model("gemma3"))  # of other heads on one host, of more layers on the other
    assert "cache-prompt" in message and f"the file has {shape.head_dim if host.NAME == 'torch' else 2}" in message
    rope = {"torch": ("llama3-rope", {}), "mlx": ("llama", {"rope_theta": 5e5})}[host.NAME]
    assert "RoPE" in refused(host, path, model=host.new_model(rope[0], **rope[1]))
    tuned = host.new_model("llama")
    host.tune(tuned)
    with caplog.at_level(logging.WARNING):
        host.load_prompt_cache(path, model, profile)
        assert not caplog.records
        host.load_prompt_cache(path, tuned, profile)
    assert "other weights" in caplog.text and str(path) in caplog.text


def test_another_profile(host, path, tmp_path, monkeypatch):
    model, profile = host.model("llama"), host.profile("llama")
    other = host.calibrate(model, TEXT[:1], name="a shorter text", tokens=1024, document=512)
    other.save(tmp_path / "other.safetensors")
    message = refused(host, path, type(other).load(tmp_path / "other.safetensors"))
    assert "not saved, of llama, 2,048 tokens" in message and "other.safetensors, of a shorter text" in message
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "store"))
    with pytest.raises(ValueError, match="found none"):
        host.load_prompt_cache(path, model)
    profile.save(prompt_file.find_profile.__globals__["cached_profile_path"](profile.shape))
    same(host, host.load_prompt_cache(path, model)[0], load(host, path)[0])


@pytest.mark.parametrize(
    "name,change",
    [
        ("tokens", lambda x: x[1:]),
        ("layers/1/padding_groups/0/keys", lambda x: x[:, :, 1:]),
        ("layers/1/padding_groups/0/values", lambda x: x.astype(np.float16)),
        ("layers/0/padding_groups/0/chunks/0/0", lambda x: np.concatenate([x, x], axis=1)),
        ("layers/1/padding_groups/0/chunks/0/1", lambda x: x.astype(np.uint16)),
        ("layers/0/padding_groups/0/chunks/1/0", lambda x: np.zeros(3, np.uint8)),
    ],
)
def test_arrays_must_fit_header_and_plan(host, path, name, change):
    file = PromptFile.load(path)
    file.arrays[name] = np.ascontiguousarray(change(file.arrays.get(name)))
    file.save(path)
    assert name in refused(host, path)


def test_chunks_must_not_leave_gaps(host, path):
    file = PromptFile.load(path)
    file.layers[1]["padding_groups"][0]["chunks"] = [[20, 224]]
    file.save(path)
    assert "gaps" in refused(host, path)


def test_what_cannot_be_stored(host, tmp_path):
    model, profile, path = host.model("llama"), host.profile("llama"), tmp_path / "c"
    for empty in (new(host), host.plain_cache(model)):
        with pytest.raises(ValueError, match="empty"):
            host.save_prompt_cache(path, empty, model=model)
    cache, ids = read(host, new(host), 40)
    for wrong in (ids[1:], [ids, ids], []):
        with pytest.raises(ValueError, match="ids of the 40 tokens"):
            host.save_prompt_cache(path, cache, wrong)
    with pytest.raises(ValueError, match="model="):
        host.save_prompt_cache(path, plain_after(host)[0])
    with pytest.raises(ValueError, match="method="):
        host.save_prompt_cache(path, cache, bits=2.0)
    with pytest.raises(ValueError, match="between"):
        host.save_prompt_cache(path, cache, model=model, method="spectral", bits=20, profile=profile)
    for foreign in host.foreign_layers():
        host.layers(cache)[1] = foreign
        with pytest.raises(ValueError, match=in_words(foreign)):
            host.save_prompt_cache(path, cache)
    assert not list(tmp_path.iterdir())


@only("torch", "the caches of mlx-lm are made for a window, which no configuration changes later")
def test_another_window(host, tmp_path):
    model, profile = host.model("gemma3"), host.profile("gemma3")
    path = host.save_prompt_cache(tmp_path / "c", read(host, new(host, family="gemma3"), family="gemma3")[0])
    model.config.sliding_window, before = 64, model.config.sliding_window
    try:
        assert "another window" in refused(host, path, profile, model)
    finally:
        model.config.sliding_window = before


def test_failed_write_leaves_what_was_there(host, path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(signed_file.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        PromptFile.load(path).save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_recipe_of_ones_own_travels_with_the_file(host, tmp_path):
    file = PromptFile.load(host.save_prompt_cache(tmp_path / "c", read(host, new(host, "affine", 4.5))[0]))
    assert file.method.group_size == 16 and file.method.name == "affine"
    file = replace(file, method=replace(AFFINE, name="mine"))
    file.plan_hash = make_plan(file.shape, None, file.method, 4.5).hash
    file.save(tmp_path / "c")
    assert host.is_compressed(host.layers(host.load_prompt_cache(tmp_path / "c", host.model("llama"))[0])[0])

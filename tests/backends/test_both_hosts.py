"""Both hosts on one checkpoint: stored prompt caches travel from either to the other, to the same codes and logits."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
torch = pytest.importorskip("torch")

import torch_models
from hosts import SMALL, assert_alike, codes, only
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_models import make_tokens
from tiny_checkpoint import save_tiny_checkpoint
from tolerances import assert_close, relative_rms
from transformers import Gemma3TextConfig

import spectral_kv_mlx
import spectral_kv_torch
from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.cli import main as cli
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.planning.budget import elements_per_token
from spectral_kv_mlx import generation as mlx_backend
from spectral_kv_mlx.cache import SpectralKVCache
from spectral_kv_torch import generation as torch_backend
from spectral_kv_torch.cache import SpectralKVLayer

pytestmark = only("mlx", "both hosts on one checkpoint, in the process of MLX")
BITS = {"identity": None, "spectral": 3.0, "spectral-dense": 2.0}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]  # mlx-lm wants them to alternate
WINDOW = 32


def alternating_gemma3():
    return Gemma3TextConfig(**torch_models.SIZES, head_dim=32, sliding_window=WINDOW, layer_types=LAYERS)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request, tmp_path_factory):
    """One tiny checkpoint in both hosts, with a profile."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch_models.CONFIGS, "gemma3", alternating_gemma3)
        save_tiny_checkpoint(folder, request.param)
    theirs, tokenizer = spectral_kv_torch.load_model(folder, "float32")
    ours, _ = spectral_kv_mlx.load_model(folder)
    texts = ["".join(map(chr, (t % 95 + 32 for t in make_tokens(700, seed=100 + n)))) for n in range(2)]
    pairs = request.param == "llama"  # the full-attention layers of Gemma 3 have no neighbors
    profiler = spectral_kv_torch.SpectralProfiler(tokens=1024, document=512, progress=False, pairs=pairs)
    profile = profiler.profile_from_model(theirs, tokenizer, texts)
    return SimpleNamespace(name=request.param, torch=theirs, mlx=ours, profile=profile, folder=folder)


def stores(cache) -> list:
    layers = getattr(cache, "layers", cache)
    return [layer.store for layer in layers if isinstance(layer, (SpectralKVLayer, SpectralKVCache))]


def follow(backend, model, cache) -> np.ndarray:
    """Logits of a piece of five tokens and of four more, one at a time: both ways through a sliding window."""
    logits = [backend.feed(model, make_tokens(5, seed=7), cache, 5)]
    return np.concatenate(logits + [backend.feed(model, [t], cache) for t in make_tokens(4, seed=8)])


def plain_after(pair, tokens):
    """A plain cache of torch after `tokens`."""
    cache = torch_backend.plain_cache(pair.torch)
    torch_backend.feed(pair.torch, tokens, cache)
    return cache


def check_followed(pair, tokens, on_torch, on_mlx) -> None:
    """Two caches with the same codes go on alike; each host codes what is sealed on the way, where a code may move."""
    got, expected = follow(mlx_backend, pair.mlx, on_mlx), follow(torch_backend, pair.torch, on_torch)
    exact = follow(torch_backend, pair.torch, plain_after(pair, tokens))
    pairs = zip(stores(on_torch), stores(on_mlx), strict=True)
    moved = any(not np.array_equal(a, b) for held in pairs for a, b in zip(*map(codes, held), strict=True))
    assert_alike(got, expected, exact, moved)


def exact_arrays(cache) -> list:
    """(keys, values) of every layer of a plain cache."""
    return [tuple(np.array(x[:, :, :200]) for x in (c.keys, c.values)) for c in getattr(cache, "layers", cache)]


@pytest.mark.parametrize("count", [20, WINDOW - 1, WINDOW, 130])
@pytest.mark.parametrize("method", BITS)
def test_from_torch_to_mlx_and_back(pair, method, count, tmp_path):
    """Codes are the same bytes, decoded vectors agree to 1e-5, and both go on with the same logits."""
    tokens, sizes = make_tokens(count), {"method": method, **SMALL}
    by_torch = spectral_kv_torch.make_prompt_cache(pair.torch, pair.profile, BITS[method], **sizes)
    by_mlx = spectral_kv_mlx.make_prompt_cache(pair.mlx, pair.profile, BITS[method], **sizes)
    torch_backend.feed(pair.torch, tokens, by_torch)
    mlx_backend.feed(pair.mlx, tokens, by_mlx)
    spectral_kv_torch.save_prompt_cache(tmp_path / "torch", by_torch, tokens, model=pair.torch)
    spectral_kv_mlx.save_prompt_cache(tmp_path / "mlx", by_mlx, tokens, model=pair.mlx)
    on_mlx, told_mlx = spectral_kv_mlx.load_prompt_cache(tmp_path / "torch", pair.mlx, pair.profile)
    on_torch, told_torch = spectral_kv_torch.load_prompt_cache(tmp_path / "mlx", pair.torch, pair.profile)
    assert told_mlx == told_torch == tokens
    for source, target in ((by_torch, on_mlx), (by_mlx, on_torch)):
        for made, loaded in zip(stores(source), stores(target), strict=True):
            for a, b in zip(codes(made), codes(loaded), strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(made.dense(), loaded.dense()):
                assert_close("decoded", loaded.xp.to_numpy(b), made.xp.to_numpy(a))
    assert bool(codes(stores(on_mlx)[0])) == (method != "identity" and count > 50)
    check_followed(pair, tokens, by_torch, on_mlx)
    check_followed(pair, tokens, on_torch, by_mlx)


def test_both_make_one_plan(pair):
    for method in ("spectral", "spectral-dense", "turboquant"):
        theirs = torch_backend.make_prompt_cache(pair.torch, pair.profile, method=method)
        ours = mlx_backend.make_prompt_cache(pair.mlx, pair.profile, method=method)
        assert {layer.plan.hash for layer in ours if isinstance(layer, SpectralKVCache)} == {theirs.plan.hash}


def test_a_file_for_both_is_decoded_alike(pair, tmp_path):
    tokens = make_tokens(130)
    plain = torch_backend.plain_cache(pair.torch)
    torch_backend.feed(pair.torch, tokens, plain)
    options = {"model": pair.torch, "profile": pair.profile, "bits": 2.0, **SMALL}
    spectral_kv_torch.save_prompt_cache(tmp_path / "c", plain, tokens, method="spectral-stored", **options)
    on_mlx, _ = spectral_kv_mlx.load_prompt_cache(tmp_path / "c", pair.mlx, pair.profile)
    on_torch, _ = spectral_kv_torch.load_prompt_cache(tmp_path / "c", pair.torch, pair.profile)
    assert {type(layer) for layer in on_mlx} <= {KVCache, RotatingKVCache}
    assert_close("keys", np.array(on_mlx[1].keys), on_torch.layers[1].keys.numpy())
    expected = follow(torch_backend, pair.torch, on_torch)
    assert_close("logits", follow(mlx_backend, pair.mlx, on_mlx), expected, limit=1e-3)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.usefixtures("text_is_known")
def test_two_layer_groups_from_each_to_both(pair, tmp_path):
    """Three layers: a pair and a lone one."""
    tokens, sides = make_tokens(200), ((torch_backend, pair.torch), (mlx_backend, pair.mlx))
    sealed, decoded = 176 * elements_per_token(pair.profile.shape), []
    for first, model in sides:
        plain = first.plain_cache(model)
        first.feed(model, tokens, plain)
        options = {"model": model, "profile": pair.profile, "bits": 5.0, **SMALL}
        path = first.save_prompt_cache(tmp_path / "c", plain, tokens, method="spectral-stored-pairs", **options)
        assert 0.8 * 5 < 8 * PromptFile.load(path).bytes_by_kind()["codes"] / sealed <= 5
        container = first.encode_cache(
            make_plan(pair.profile.shape, pair.profile, "spectral-stored-pairs", 5), plain, 4, 16
        )
        assert PromptFile.load(path).size() == first.cache_nbytes(container)
        assert PromptFile.load(path).size().dense_nbytes == first.cache_nbytes(container).dense_nbytes
        loaded = [backend.load_prompt_cache(path, m, pair.profile) for backend, m in sides]
        assert [told for _, told in loaded] == [tokens, tokens]
        decoded += [exact_arrays(cache) for cache, _ in loaded]
        expected = follow(torch_backend, pair.torch, loaded[0][0])
        assert_close("logits", follow(mlx_backend, pair.mlx, loaded[1][0]), expected, limit=1e-3)
        live, _ = first.load_prompt_cache(path, model, pair.profile, method="spectral", bits=4.0)
        assert all(codes(store) for store in stores(live)) and len(stores(live)) == 3
        again = [store.xp.to_numpy(store.dense()[0]) for store in stores(live)]
        assert_close("keys, coded again", again, [keys for keys, _ in decoded[-1]], limit=0.2)
    own = exact_arrays(plain)
    for other in decoded[1:]:
        # each host codes keys of its own, which differ in the last bit: codes in a thousand may move
        assert_close("decoded", other, decoded[0], limit=relative_rms(decoded[0], own) / 4)
    for got, expected in zip(decoded[-1], own, strict=True):
        assert_close("layer", got, expected, limit=0.2)
        np.testing.assert_array_equal(np.array(got)[:, :, :, -16:], np.array(expected)[:, :, :, -16:])


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
@pytest.mark.usefixtures("text_is_known")
def test_two_layer_groups_of_a_left_padded_batch(pair, tmp_path):
    rows = [make_tokens(n, seed=n) for n in (90, 41)]
    padding = [90 - len(row) for row in rows]
    cache = spectral_kv_mlx.make_prompt_cache(pair.mlx, pair.profile, 6.0, left_padding=padding, **SMALL)
    pair.mlx(mx.array([[0] * p + row for p, row in zip(padding, rows)]), cache=cache)
    options = {"model": pair.mlx, "profile": pair.profile, "bits": 6.0, **SMALL}
    path = spectral_kv_mlx.save_prompt_cache(tmp_path / "c", cache, method="spectral-stored-pairs", **options)
    assert PromptFile.load(path).padding == padding
    loaded, _ = spectral_kv_mlx.load_prompt_cache(path, pair.mlx, pair.profile)
    more = mx.array([[7], [8]])
    assert_close("next", np.array(pair.mlx(more, cache=loaded)), np.array(pair.mlx(more, cache=cache)), limit=0.05)


def test_profiles_of_mlx_have_pairs_on_request(pair):
    profiler = spectral_kv_mlx.SpectralProfiler(tokens=256, document=256, gradients=False, progress=False, pairs=True)
    tokenizer = SimpleNamespace(encode=lambda text: [ord(c) for c in text])
    text = ["".join(map(chr, make_tokens(256)))]
    if pair.name == "gemma3":
        with pytest.raises(ValueError, match="compressible layers 1. Use spectral-dense or spectral-stored"):
            profiler.profile_from_model(pair.mlx, tokenizer, text)
    else:
        made = profiler.profile_from_model(pair.mlx, tokenizer, text)
        assert made.basis_sets["layer2.pre"].mean.shape == (2, 1, 8 * 16)


def test_bfloat16_travels_to_the_bit(pair, tmp_path):
    theirs, _ = spectral_kv_torch.load_model(pair.folder, "bfloat16")
    ours, _ = spectral_kv_mlx.load_model(pair.folder, "bfloat16")
    cache = spectral_kv_torch.make_prompt_cache(theirs, pair.profile, **SMALL)
    torch_backend.feed(theirs, make_tokens(130), cache)
    path = spectral_kv_torch.save_prompt_cache(tmp_path / "c", cache)
    loaded, _ = spectral_kv_mlx.load_prompt_cache(path, ours, pair.profile)
    for made, held in zip(stores(cache), stores(loaded), strict=True):
        assert held.padding_groups[0].exact_keys.dtype == mx.bfloat16
        for a, b in zip(made.arrays(), held.arrays()):
            np.testing.assert_array_equal(made.xp.to_file(a)[0], held.xp.to_file(b)[0])
    path = spectral_kv_mlx.save_prompt_cache(tmp_path / "d", loaded)
    back, _ = spectral_kv_torch.load_prompt_cache(path, theirs, pair.profile)
    for made, held in zip(cache.layers, back.layers, strict=True):
        both = (made.arrays(), held.arrays()) if hasattr(made, "arrays") else ((made.keys,), (held.keys,))
        assert all(torch.equal(a, b) for a, b in zip(*both))


def test_left_padding(pair, tmp_path):
    rows = [make_tokens(n, seed=n) for n in (90, 41, 90)]
    padding = [90 - len(row) for row in rows]
    batch = [[0] * p + row for p, row in zip(padding, rows)]
    more = mx.array([make_tokens(3, seed=n) for n in range(3)])
    cache = spectral_kv_mlx.make_prompt_cache(pair.mlx, pair.profile, 4.0, left_padding=padding, **SMALL)
    pair.mlx(mx.array(batch), cache=cache)
    path = spectral_kv_mlx.save_prompt_cache(tmp_path / "c", cache, batch, model=pair.mlx)
    loaded, told = spectral_kv_torch.load_prompt_cache(path, pair.torch, pair.profile)
    assert told == batch and PromptFile.load(path).padding == padding
    expected = [np.array(pair.mlx(more[:, i : i + 1], cache=cache)) for i in range(3)]
    mask = (torch.arange(93)[None] >= torch.tensor(padding)[:, None]).long()
    position = (mask.cumsum(-1) - 1)[:, 90:]
    with torch.no_grad():
        got = pair.torch(
            torch.tensor(np.array(more)), attention_mask=mask, position_ids=position, past_key_values=loaded
        ).logits
    assert_close("torch", got.numpy(), np.concatenate(expected, axis=1), limit=1e-3)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_the_command_line_on_both(pair, tmp_path, capsys):
    """One backend stores, the other goes on, with the text of the two in one piece."""
    document, question = "There was a table, and on it stood 23 cups. " * 5, "How many cups?"
    common = ["--model", str(pair.folder), "--dtype", "float32", "--json", "--prompt"]
    after = ["--max-tokens", "8", "--ignore-eos"]
    for first, second in (("torch", "mlx"), ("mlx", "torch")):
        path = str(tmp_path / first)
        commands = [
            ["cache-prompt", *common, document, "--backend", first, "--method", "identity", "--output", path],
            ["generate", *common, question, "--backend", second, "--prompt-cache-file", path, "--compare", *after],
            ["generate", *common, document + question, "--backend", second, "--method", "identity", *after],
        ]
        results = []
        for command in commands:
            assert cli.main(command) == 0
            results.append(json.loads(capsys.readouterr().out))
        assert results[1]["text"] == results[2]["text"] and results[1]["kl"] < 1e-6
        assert results[1]["prompt_tokens"] == results[2]["prompt_tokens"] > results[0]["prompt_tokens"]
        assert results[0]["backend"] == first and results[1]["backend"] == second

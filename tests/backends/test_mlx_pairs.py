"""Two layers coded together: MLX against the torch backend, and what only mlx-lm asks of a live cache."""

# ruff: noqa: E402 (without MLX the whole file is skipped before its imports)
from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
torch = pytest.importorskip("torch")

from hosts import SMALL, assert_alike, only
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_models import make_tokens
from tiny_checkpoint import save_tiny_checkpoint
from tolerances import assert_close

import spectral_kv_mlx
import spectral_kv_torch
from spectral_kv_core.cache.compressed_layer import leading_layers
from spectral_kv_mlx import bench
from spectral_kv_mlx import generation as mlx_backend
from spectral_kv_torch import generation as torch_backend

METHOD = "spectral-dense-pairs"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One tiny checkpoint of three layers in both hosts, with a profile: a pair and a lone layer."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_checkpoint(folder, "llama")
    theirs, tokenizer = spectral_kv_torch.load_model(folder, "float32")
    ours, _ = spectral_kv_mlx.load_model(folder)
    texts = ["".join(map(chr, (t % 95 + 32 for t in make_tokens(700, seed=100 + n)))) for n in range(2)]
    profiler = spectral_kv_torch.SpectralProfiler(tokens=1024, document=512, progress=False, pairs=True)
    return SimpleNamespace(torch=theirs, mlx=ours, profile=profiler.profile_from_model(theirs, tokenizer, texts))


def live(tiny, bits: float = 3.0, **options) -> list:
    return spectral_kv_mlx.make_prompt_cache(tiny.mlx, tiny.profile, bits, method=METHOD, **SMALL, **options)


def follow(backend, model, cache, tokens, step: int = 1) -> np.ndarray:
    return np.concatenate([backend.feed(model, tokens[i : i + step], cache, step) for i in range(0, len(tokens), step)])


def codes(layers) -> list[np.ndarray]:
    held = [layer.store for layer in layers]
    return [s.xp.to_numpy(x) for s in held for group in s.padding_groups for c in group.chunks for x in c.arrays]


def moved_share(by_torch, by_mlx) -> float:
    """Share of the bytes of codes that differ."""
    both = leading_layers(by_torch.layers), leading_layers(by_mlx)
    for layer in both[0]:
        layer.finalize()
    held = [np.concatenate([x.reshape(-1) for x in codes(layers)]) for layers in both]
    return float(np.mean(np.not_equal(*held)))


@only("mlx", "both hosts on one checkpoint, in the process of MLX")
@pytest.mark.parametrize("step", [200, 1, 50], ids=["at once", "one by one", "staged"])
@pytest.mark.usefixtures("text_is_known")
def test_the_hosts_agree_and_go_on_with_each_other(tiny, step, tmp_path):
    tokens, more = make_tokens(200), make_tokens(20, seed=6)
    ours, plain = live(tiny), torch_backend.plain_cache(tiny.torch)
    theirs = spectral_kv_torch.make_prompt_cache(tiny.torch, tiny.profile, 3.0, method=METHOD, **SMALL)
    got = follow(mlx_backend, tiny.mlx, ours, tokens, step)
    expected, exact = (follow(torch_backend, tiny.torch, cache, tokens, step) for cache in (theirs, plain))
    path = spectral_kv_mlx.save_prompt_cache(tmp_path / "c", ours, tokens, model=tiny.mlx)  # ends a prompt
    moved = moved_share(theirs, ours)
    assert_alike(got, expected, exact, moved > 0 and step < 200)  # a first call attends exactly
    loaded, told = spectral_kv_torch.load_prompt_cache(path, tiny.torch, tiny.profile)
    assert told == tokens
    if step == 200:
        assert moved_share(loaded, ours) == 0 and moved < 1e-3  # a coefficient on the edge of its cell
    assert spectral_kv_torch.cache_nbytes(loaded) == spectral_kv_mlx.cache_nbytes(ours)
    got, expected, exact = (
        follow(backend, model, cache, more)
        for backend, model, cache in (
            (mlx_backend, tiny.mlx, ours), (torch_backend, tiny.torch, loaded), (torch_backend, tiny.torch, plain)
        )
    )  # fmt: skip
    assert_alike(got, expected, exact, moved_share(loaded, ours) > 0)  # each host codes what is sealed on the way


@only("mlx", "caches of transformers have no state to read and set")
@pytest.mark.usefixtures("text_is_known")
def test_trim_copy_and_state(tiny):
    cache, tail = live(tiny, 8.0), make_tokens(6, seed=3)
    mlx_backend.feed(tiny.mlx, make_tokens(150), cache)
    other, restored, whole = copy.deepcopy(cache), live(tiny, 8.0), mlx_backend.decode_cache(cache, tiny.mlx)
    assert other[1].first is other[0] and spectral_kv_mlx.cache_nbytes(other) == spectral_kv_mlx.cache_nbytes(cache)
    for new, old in zip(restored, cache):
        new.state = old.state
    mlx_backend.feed(tiny.mlx, make_tokens(30, seed=9), cache)
    assert can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 30) == 30
    assert [layer.offset for layer in cache] == [150, 150, 150]
    expected = follow(mlx_backend, tiny.mlx, other, tail)
    np.testing.assert_array_equal(follow(mlx_backend, tiny.mlx, restored, tail), expected)
    assert_close("trimmed", follow(mlx_backend, tiny.mlx, cache, tail), expected, limit=0.03)
    assert_close("decoded", follow(mlx_backend, tiny.mlx, whole, tail), expected, limit=0.03)


@only("mlx", "test_bench.py has the clock of PyTorch")
def test_the_clock_of_a_benchmark_counts_both_layers(tiny):
    cache = live(tiny)
    mlx_backend.feed(tiny.mlx, make_tokens(100), cache)
    with bench.attention_clock(tiny.mlx, cache, (0, 1, 2)) as clock:
        mlx_backend.feed(tiny.mlx, [7], cache)
    assert clock.calls == 3 and clock.seconds > 0

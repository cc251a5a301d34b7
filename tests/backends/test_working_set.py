"""Decoded chunks that stay: what they are worth, what they weigh, and when they go."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
from cases import ToyModel, plan_of
from tolerances import assert_close

from spectral_kv_core.cache.decoded_chunks import bytes_per_layer
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.codecs.registry import make_codec
from spectral_kv_core.planning.budget import CHUNK_TOKENS

MODEL, SCALE = ToyModel(layers=1), 0.125
pytestmark = pytest.mark.usefixtures("text_is_known")
CHUNK = CHUNK_TOKENS * 2 * 2 * 2 * MODEL.head_dim  # bytes of a decoded chunk in 16 bits
TOKENS = 2 * CHUNK_TOKENS + 200
LIMIT = {"float32": 5e-4, "float16": 2e-3, "bfloat16": 1.6e-2}  # of keys and values in float16, or in the dtype itself


class Reader:
    """A cache with `working_set` that has read `TOKENS` tokens, and the same without."""

    def __init__(self, xp, working_set: int, dtype: str = "float32", batch: int = 1):
        self.xp, self.dtype = xp, dtype
        codec = make_codec(xp, plan_of(MODEL, 3, "layer", "pre"), 0)
        self.cache, self.plain = (LayerCache(xp, codec, 4, 60, working_set=n) for n in (working_set, 0))
        self.vectors = [
            self.cast(x) for x in (MODEL.queries(1, TOKENS + 400, batch), *MODEL.sample(1, TOKENS + 400, batch))
        ]
        if batch > 1:
            for cache in (self.cache, self.plain):
                cache.start(batch, [0, *[30] * (batch - 1)])
        for cache in (self.cache, self.plain):
            cache.append(*(x[:, :, :TOKENS] for x in self.vectors[1:]))
        self.decoded = 0

    def cast(self, x):
        x = self.xp.asarray(x)
        if self.dtype == "float32":
            return x
        libraries = {
            "spectral_kv_core.arrays.ops": "numpy",
            "spectral_kv_torch.ops": "torch",
            "spectral_kv_mlx.ops": "mlx.core",
        }
        return self.xp.astype(x, getattr(import_module(libraries[self.xp.__name__]), self.dtype))

    def step(self, monkeypatch) -> int:
        """Chunks that a step of both caches decodes in the one with a working set; outputs are compared."""
        codec, calls = self.cache.codec, []
        at = slice(self.cache.seen, self.cache.seen + 1)
        tokens = [x[:, :, at] for x in self.vectors]
        expected = self.plain.attend(*tokens, SCALE, None)
        with monkeypatch.context() as patch:
            for name in ("attend", "decode"):
                real = getattr(codec, name)
                patch.setattr(codec, name, lambda *a, real=real: calls.append(1) or real(*a))
            got = self.cache.attend(*tokens, SCALE, None)
        assert_close("output", self.xp.to_numpy(got), self.xp.to_numpy(expected), limit=LIMIT[self.dtype])
        return len(calls)

    def bytes(self) -> int:
        return sum(x.nbytes for x in self.cache.arrays()) - sum(x.nbytes for x in self.cache.state_arrays())


def test_chunks_are_decoded_once_and_counted(xp, monkeypatch):
    reader = Reader(xp, 10 * CHUNK)
    assert reader.bytes() == 0
    assert [reader.step(monkeypatch) for _ in range(3)] == [3, 0, 0]
    sealed = reader.cache.padding_groups[0].sealed
    assert reader.bytes() == sealed * CHUNK // CHUNK_TOKENS
    assert sum(x.nbytes for x in reader.plain.arrays()) == sum(x.nbytes for x in reader.cache.state_arrays())


def test_what_came_first_stays_within_the_limit(xp, monkeypatch):
    reader = Reader(xp, int(1.9 * CHUNK))
    assert [reader.step(monkeypatch) for _ in range(3)] == [3, 1, 1]  # the last chunk is short and fits too
    first, *_, last = reader.cache.padding_groups[0].chunks
    assert (
        list(reader.cache.padding_groups[0].decoded) == [(first, 0), (last, 0)]
        and CHUNK < reader.bytes() <= 1.9 * CHUNK
    )


def test_a_chunk_that_has_grown_is_decoded_again(xp, monkeypatch):
    reader = Reader(xp, 10 * CHUNK)
    assert [reader.step(monkeypatch) for _ in range(40)].count(1) == 2  # of 16 tokens each
    assert [chunk for chunk, _ in reader.cache.padding_groups[0].decoded][:2] == reader.cache.padding_groups[0].chunks[
        :2
    ]
    assert len(reader.cache.padding_groups[0].decoded) == 3


def test_cropped_selected_and_copied_caches(xp, monkeypatch):
    reader = Reader(xp, 10 * CHUNK, batch=2)
    reader.step(monkeypatch)
    other = copy.deepcopy(reader.cache)
    for cache in (reader.cache, reader.plain):
        cache.crop(300)
    assert reader.bytes() == 0
    reader.step(monkeypatch)
    held = reader.bytes()
    plain = [chunk for group in reader.cache.padding_groups for chunk in group.chunks if chunk.is_plain]
    assert held == sum(chunk.tokens for chunk in plain) * CHUNK // CHUNK_TOKENS  # a cut block is decoded for every step
    for cache in (reader.cache, reader.plain):
        cache.select([1, 0])
    assert reader.bytes() == 0
    reader.step(monkeypatch)
    assert reader.bytes() == held
    assert sum(len(group.decoded) for group in other.padding_groups) == 6  # which the copy still has


def test_the_limit_is_that_of_all_lanes(xp, monkeypatch):
    reader = Reader(xp, 3 * CHUNK, batch=2)
    for _ in range(2):
        reader.step(monkeypatch)
        assert 2 * CHUNK < reader.bytes() <= 3 * CHUNK


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_as_it_is(xp, monkeypatch, dtype):
    if xp.__name__ == "spectral_kv_core.arrays.ops":
        dtype = "float16"  # NumPy has no bfloat16
    reader = Reader(xp, 10 * CHUNK, dtype)
    assert [reader.step(monkeypatch) for _ in range(2)] == [3, 0]
    keys, _ = next(iter(reader.cache.padding_groups[0].decoded.values()))
    assert keys.dtype == reader.vectors[0].dtype


def test_methods_that_never_decode_have_no_use_for_it():
    decoding, latent = plan_of(MODEL, 3, "layer", "pre"), plan_of(MODEL, 3)
    assert bytes_per_layer(decoding, 1000) == 1000 and bytes_per_layer(latent, 0) == 0
    for plan, limit in ((latent, 1000), (decoding, -1)):
        with pytest.raises(ValueError, match="spectral-dense"):
            bytes_per_layer(plan, limit)

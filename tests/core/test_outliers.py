"""Tokens outside what the profile knows: which are found, what they are held as, and that nothing is coded twice."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from cases import ToyModel, attention, codes_of, plan_of
from tolerances import ATTENTION_RMS, assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import rotate
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.size import arrays_by_kind, exact_tokens
from spectral_kv_core.codecs import outliers
from spectral_kv_core.codecs.chunk import AdaptedChunk, Chunk, CutChunk, ExactChunk
from spectral_kv_core.codecs.registry import make_codec

MODEL = ToyModel()
SCALE = 0.125


def make_cache(xp, bits: float = 3, window: int = 0, sinks: int = 0, **recipe) -> LayerCache:
    return LayerCache(xp, make_codec(xp, plan_of(MODEL, bits, **recipe), 0), sinks, window)


def append(cache, keys, values) -> None:
    cache.append(cache.xp.asarray(keys), cache.xp.asarray(values))


def dense(cache) -> tuple[np.ndarray, np.ndarray]:
    return tuple(map(cache.xp.to_numpy, cache.dense()))


def chunks_of(cache) -> list[Chunk]:
    return cache.padding_groups[0].chunks


def kinds(cache) -> list[tuple[type, int]]:
    return [(type(chunk), chunk.tokens) for chunk in chunks_of(cache)]


def of_one_token(tokens: int, size: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [1, 2, T, 64] of a run of one token: far from the mean, and all but equal."""
    rng = np.random.default_rng(5)
    sides = (
        size * rng.standard_normal((1, 2, 1, 64)) + 0.01 * rng.standard_normal((1, 2, tokens, 64)) for _ in range(2)
    )
    return tuple(x.astype(np.float32) for x in sides)


def joined(*parts) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate(side, axis=2) for side in zip(*parts))


def wild(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of tokens that have nothing in common with the profile, nor with one another."""
    rng = np.random.default_rng(seed)
    return tuple((20 * rng.standard_normal((1, 2, tokens, 64))).astype(np.float32) for _ in range(2))


def test_what_the_profile_knows_is_coded_as_ever(xp):
    ordinary = MODEL.sample(1, 320)
    cache, codec = make_cache(xp), make_codec(xp, plan_of(MODEL, 3), 0)
    append(cache, *ordinary)
    assert kinds(cache) == [(Chunk, 320)]
    (expected,) = codec.extend([], *map(xp.asarray, ordinary), 0)
    np.testing.assert_array_equal(codes_of(codec, chunks_of(cache)[0]), codes_of(codec, expected))


def test_exact_blocks_count_as_exact(xp):
    cache = make_cache(xp, window=16)
    append(cache, *joined(MODEL.sample(1, 320), wild(16), MODEL.sample(2, 320)))
    held = [chunk.tokens for chunk in chunks_of(cache) if isinstance(chunk, ExactChunk)]
    group = cache.padding_groups[0]
    assert held and exact_tokens(cache) == sum(held) + group.exact
    kinds = {kind: sum(x.nbytes for x in arrays) for kind, arrays in arrays_by_kind(cache).items()}
    assert kinds["exact"] == exact_tokens(cache) * 2 * group.exact_keys.nbytes // group.exact
    assert sum(kinds.values()) == sum(x.nbytes for x in cache.arrays())


@pytest.mark.parametrize("recipe", [{}, {"group": "layer", "rope": "pre"}], ids=["spectral", "dense"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_run_of_one_token_is_coded_about_its_mean(xp, bits, recipe):
    """Its error is that of its small differences, at the bytes of its codes and two vectors per head."""
    cache, clipped = make_cache(xp, bits, **recipe), make_codec(xp, plan_of(MODEL, bits, **recipe), 0)
    run = of_one_token(320)
    if recipe:
        run = rotate(ops, run[0], MODEL.rope, 0), run[1]
    append(cache, *run)
    assert kinds(cache) == [(AdaptedChunk, 320)]
    for got, expected in zip(dense(cache), run):
        assert np.abs(got - expected).max() < 0.1
    assert [x.nbytes for x in chunks_of(cache)[0].adaptation.arrays][:2] == [4 * 2 * 64] * 2
    (chunk,) = clipped.extend([], *map(xp.asarray, run), 0)
    assert sum(x.nbytes for x in chunks_of(cache)[0].arrays) <= sum(x.nbytes for x in chunk.arrays)
    without = [xp.to_numpy(x) for x in clipped.decode(chunk)]
    for got, bad, expected in zip(dense(cache), without, run):
        assert relative_rms(got, expected) < relative_rms(bad, expected) / 3


def test_a_wild_block_is_kept_exactly(xp):
    before, outlier, after = MODEL.sample(1, 160), wild(16), MODEL.sample(2, 144)
    cache = make_cache(xp)
    append(cache, *joined(before, outlier, after))
    assert kinds(cache) == [(Chunk, 160), (ExactChunk, 16), (Chunk, 144)]
    for got, expected in zip(dense(cache), outlier):
        np.testing.assert_array_equal(got[:, :, 160:176], expected)


def test_exact_blocks_are_few_and_the_others_lose_less_than_by_clipping(xp):
    """Where all is wild a share of the blocks is exact; gains serve the others, the better the more bits there are."""
    tokens, errors = 2048, []
    for bits in (2, 4, 8):
        cache = make_cache(xp, bits)
        append(cache, *wild(tokens))
        exact = sum(size for kind, size in kinds(cache) if kind is ExactChunk)
        assert exact <= tokens * outliers.EXACT_SHARE + 16 * outliers.EXACT_BLOCKS
        errors.append([relative_rms(got, expected) for got, expected in zip(dense(cache), wild(tokens))])
    assert (np.diff(errors, axis=0) < 0).all() and max(errors[-1]) < 0.2, errors


def test_attention_is_attention_over_what_the_cache_holds(xp):
    """Plain, adapted, exact and cut chunks together, of a prompt, of single tokens and of further pieces."""

    def fused(q, k, v, scale):
        return xp.asarray(attention(*map(xp.to_numpy, (q, k, v)), scale).astype(np.float32))

    cache = make_cache(xp, window=16, sinks=4)
    append(cache, *joined(MODEL.sample(1, 164), of_one_token(96), MODEL.sample(2, 64), wild(16), MODEL.sample(3, 100)))
    cache.crop(57)
    append(cache, *MODEL.sample(4, 71))
    assert {kind for kind, _ in kinds(cache)} == {Chunk, AdaptedChunk, ExactChunk, CutChunk}
    for number, length in enumerate((1, 5, 40, 1)):
        queries, (keys, values) = MODEL.queries(number, length), MODEL.sample(5 + number, length)
        held = dense(cache)
        expected = attention(queries, *joined(held, (keys, values)), SCALE)
        got = cache.attend(*map(xp.asarray, (queries, keys, values)), SCALE, fused)
        assert_close("output", xp.to_numpy(got), expected, limit=ATTENTION_RMS)


def test_a_run_goes_on_token_by_token(xp):
    """Blocks that come in later take the offset that is there, and ordinary ones end the chunk."""
    run = of_one_token(400)
    cache = make_cache(xp)
    append(cache, *(x[:, :, :160] for x in run))
    for start in range(160, 400, 8):
        append(cache, *(x[:, :, start : start + 8] for x in run))
    append(cache, *MODEL.sample(1, 64))
    assert kinds(cache) == [(AdaptedChunk, 400), (Chunk, 64)]
    for got, expected in zip(dense(cache), run):
        assert np.abs(got[:, :, :400] - expected).max() < 0.1


def test_nothing_is_coded_twice(xp):
    """Ten times: tokens come in, and all are forgotten but a prefix that ends inside a block."""
    keys, values = MODEL.sample(1, 441)
    cache = make_cache(xp, 2, window=64, sinks=4)
    append(cache, keys, values)
    append(cache, *MODEL.sample(2, 112))
    cache.crop(112)
    before = dense(cache)
    for number in range(10):
        append(cache, *MODEL.sample(3 + number, 112))
        cache.crop(112)
    for got, expected in zip(dense(cache), before):
        np.testing.assert_array_equal(got, expected)
    assert cache.seen == 441 and [kind for kind, _ in kinds(cache)] == [Chunk, CutChunk]


def test_crop_inside_every_kind_of_chunk(xp):
    cache = make_cache(xp)
    append(cache, *joined(MODEL.sample(1, 160), of_one_token(64), wild(16), MODEL.sample(2, 80)))
    whole = dense(cache)
    for keep in (300, 245, 233, 230, 201, 170, 161, 150, 7):
        cropped = copy.deepcopy(cache)
        cropped.crop(cropped.seen - keep)
        for got, expected in zip(dense(cropped), whole):
            np.testing.assert_allclose(got, expected[:, :, :keep], rtol=1e-5, atol=1e-5)
        cropped.crop(3)
        for got, expected in zip(dense(cropped), whole):
            np.testing.assert_allclose(got, expected[:, :, : keep - 3], rtol=1e-5, atol=1e-5)
        append(cropped, *MODEL.sample(9, 40))
        assert cropped.seen == keep + 37


def test_sequences_of_a_batch_are_chosen_in_every_kind(xp):
    parts = joined(MODEL.sample(1, 160), of_one_token(64), wild(16), MODEL.sample(2, 80))
    other = tuple(np.roll(x, 1, axis=1) for x in parts)
    cache = make_cache(xp)
    append(cache, *(np.concatenate([a, b]) for a, b in zip(parts, other)))
    cache.crop(50)
    held = dense(cache)
    cache.select([1, 1, 0])
    for got, expected in zip(dense(cache), held):
        np.testing.assert_array_equal(got, expected[[1, 1, 0]])


def test_bytes_count_offsets_and_exact_blocks(xp):
    cache = make_cache(xp)
    append(cache, *joined(of_one_token(64), wild(16)))
    adapted, exact = chunks_of(cache)
    assert sum(x.nbytes for x in exact.held) == 2 * 2 * 16 * 64 * 4
    held = {id(x) for x in cache.arrays()}
    assert {id(x) for x in (*adapted.arrays, *adapted.adaptation.arrays, *exact.arrays)} <= held

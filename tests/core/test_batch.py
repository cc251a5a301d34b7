"""Rows that join a batch, leave it and are padded on the right: each comes out as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ToyModel, plan_of
from test_cache import MODEL, append, attend, dense, make_cache, pieces
from tolerances import assert_close

from spectral_kv_core.arrays import ops
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.codecs.registry import make_codec

LENGTHS = [250, 61, 250, 7]  # of what every row brings, padded on the right


def staged_cache(xp) -> LayerCache:
    """Cache of a plan at 2 bits with the codec that holds a prompt at 4."""
    plan = plan_of(ToyModel(), 2)
    return LayerCache(xp, make_codec(xp, plan, 0), 4, 64, lambda: make_codec(xp, plan.staging, 0))


def sample(seed: int, tokens: int, batch: int = 1) -> tuple:
    """Queries, keys and values."""
    return MODEL.queries(seed, tokens, batch), *MODEL.sample(seed, tokens, batch)


def row_of(parts, row: int, start: int = 0, stop: int | None = None) -> tuple:
    return tuple(x[row : row + 1, :, start:stop] for x in parts)


def read(cache, parts, sizes) -> np.ndarray:
    """Attention of `parts`, in calls of `sizes` tokens."""
    return np.concatenate([attend(cache, *piece) for piece in pieces(parts, sizes)], axis=2)


def calls(length: int, sizes) -> list[int]:
    """What a row of so many tokens brings in calls of `sizes` slots, padded on the right."""
    ends = np.minimum(np.cumsum(sizes), length)
    return [size for size in np.diff(ends, prepend=0).tolist() if size]


def assert_same(row: int, batch: LayerCache, alone: LayerCache) -> None:
    """Row `row` of `batch` holds what `alone` does, bit by bit."""
    (group,), (expected,) = ([g for g in batch.padding_groups if row in g.sequences], alone.padding_groups)
    place, xp = group.sequences.index(row), batch.xp
    assert batch.seen - batch.padding[row] == alone.seen == group.seen
    for got, wanted in zip((group.exact_keys, group.exact_values), (expected.exact_keys, expected.exact_values)):
        np.testing.assert_array_equal(xp.to_numpy(got)[place], xp.to_numpy(wanted)[0])
    for got, wanted in ((group.chunks, expected.chunks), (group.staged, expected.staged)):
        for a, b in zip(got, wanted, strict=True):
            assert (a.start, a.tokens) == (b.start, b.tokens)
            for x, y in zip(a.arrays, b.arrays, strict=True):
                np.testing.assert_array_equal(xp.to_numpy(x)[place], xp.to_numpy(y)[0])


@pytest.mark.parametrize("sizes", [(250,), (100, 150), (64, 64, 64, 58)])
def test_a_row_that_is_padded_on_the_right_comes_out_as_if_alone(xp, sizes):
    prompt, more = sample(1, 250, 4), sample(2, 120, 4)
    batch = staged_cache(xp)
    batch.start(4)
    batch.expect(LENGTHS)
    assert batch.expects_padding
    first = read(batch, prompt, sizes)
    batch.settle()
    assert not batch.expects_padding and batch.padding == [0, 189, 0, 243] and batch.tokens() == sum(LENGTHS)
    then = read(batch, more, (60, 57, 1, 1, 1))
    for row, length in enumerate(LENGTHS):
        alone = staged_cache(xp)
        expected = read(alone, row_of(prompt, row, 0, length), calls(length, sizes))
        assert_close(f"prompt of row {row}", first[row : row + 1, :, :length], expected)
        assert not first[row, :, length:].any()
        expected = read(alone, row_of(more, row), (60, 57, 1, 1, 1))
        assert_close(f"steps of row {row}", then[row : row + 1], expected)
        assert_same(row, batch, alone)
        held = row_of(dense(batch), row, batch.padding[row])
        for got, wanted in zip(held, dense(alone)):
            np.testing.assert_array_equal(got, wanted)


def test_a_prompt_goes_on_while_other_rows_bring_nothing(xp):
    """A call without a token of a row, or with few of another, does not end its prompt."""
    prompt = sample(1, 320, 2)
    batch, alone = staged_cache(xp), staged_cache(xp)
    batch.start(2)
    for start, stop in ((0, 100), (100, 200)):
        read(batch, [x[:, :, start:stop] for x in prompt], [100])
        read(alone, row_of(prompt, 0, start, stop), [100])
    batch.expect([0, 5])
    read(batch, [x[:, :, 200:205] for x in prompt], [5])
    batch.settle()
    assert batch.is_staged and [bool(group.staged) for group in batch.padding_groups] == [True, False]
    read(batch, [x[:, :, 200:] for x in prompt], [120])
    read(alone, row_of(prompt, 0, 200), [120])
    assert_same(0, batch, alone)


def test_while_padding_is_expected_rows_with_tokens_to_come_are_where_masks_expect_them(xp):
    keys, values = MODEL.sample(1, 90, 2)
    batch = make_cache(xp, None)
    batch.start(2)
    batch.expect([90, 30])
    append(batch, keys[:, :, :50], values[:, :, :50])
    held, _ = dense(batch)
    np.testing.assert_array_equal(held[0], keys[0, :, :50])
    np.testing.assert_array_equal(held[1, :, :30], keys[1, :, :30])
    assert not held[1, :, 30:].any()


def test_left_padding_that_is_still_to_come_stays(xp):
    keys, values = MODEL.sample(1, 60, 3)
    batch = make_cache(xp, None)
    batch.start(3, [0, 20, 20])
    batch.expect([60, 50, 10])  # 20 slots before and 10 behind; 10 of the slots before alone
    append(batch, keys, values)
    batch.settle()
    assert batch.padding == [0, 30, 70] and batch.tokens() == 60 + 30
    np.testing.assert_array_equal(dense(batch)[0][1, :, 30:], keys[1, :, 20:50])


def test_caches_join_and_share_their_arrays(xp):
    """One read in pieces, one at once, one with tokens still staged, one without any."""
    histories = ((150, (150,)), (40, (30, 5, 5)), (260, (100, 100, 60)), (0, ()))
    alone = [staged_cache(xp) for _ in histories]
    for seed, (cache, (tokens, sizes)) in enumerate(zip(alone, histories)):
        if tokens:
            read(cache, sample(seed, tokens), sizes)
    before = [[id(x) for x in cache.arrays()] for cache in alone]
    batch = alone[0].share()
    for cache in alone[1:]:
        other = cache.share()
        if not other.padding_groups:
            other.start(1)
        batch.extend(other)
    assert batch.seen == 260 and batch.padding == [110, 220, 0, 260]
    assert sorted(map(id, batch.arrays())) == sorted(array for arrays in before for array in arrays)
    more = sample(9, 80, 4)
    together = read(batch, more, (78, 1, 1))
    for row, cache in enumerate(alone):
        assert [id(x) for x in cache.arrays()] == before[row], "a cache that was joined stays as it was"
        expected = read(cache, row_of(more, row), (78, 1, 1))
        assert_close(f"row {row}", together[row : row + 1], expected)
        assert_same(row, batch, cache)


def test_a_row_is_extracted_without_its_padding(xp):
    queries, keys, values = sample(1, 200, 3)
    batch = make_cache(xp, 3)
    batch.start(3, [0, 70, 0])
    attend(batch, queries, keys, values)
    more = sample(2, 40)
    for row, padding in enumerate([0, 70, 0]):
        got, alone = batch.extract(row), make_cache(xp, 3)
        attend(alone, *row_of((queries, keys, values), row, padding))
        assert got.padding == [0] and got.batch == 1
        assert_same(0, got, alone)
        assert_close("steps", read(got, more, (38, 1, 1)), read(alone, more, (38, 1, 1)))
    assert batch.seen == 200 and batch.padding == [0, 70, 0] and batch.tokens() == 530
    (whole,) = [group for group in batch.padding_groups if group.sequences == [1]]
    kept = batch.extract(1).padding_groups[0]
    assert kept.exact_keys is whole.exact_keys, "a group that is taken whole is not copied"
    assert all(a is b for a, b in zip(kept.chunks, whole.chunks, strict=True))


def test_padding_that_all_rows_have_is_stripped(xp):
    batch = make_cache(xp, 3)
    batch.start(3, [0, 30, 50])
    append(batch, *MODEL.sample(1, 120, 3))
    held = dense(batch)
    batch.select([2, 1])
    batch.strip()
    assert batch.seen == 90 and batch.padding == [20, 0]
    for got, before in zip(dense(batch), held):
        np.testing.assert_array_equal(got, before[[2, 1], :, 30:])


def test_rows_without_a_token_share_a_padding_group():
    batch = make_cache(ops)
    batch.start(1)
    for _ in range(3):
        other = make_cache(ops)
        other.start(1)
        batch.extend(other)
    assert [group.sequences for group in batch.padding_groups] == [[0, 1, 2, 3]]


def test_rows_that_hold_codes_alone_are_not_taken_for_empty(xp):
    """Without window and sinks every token is sealed, and none is exact."""
    caches = [make_cache(xp, 3, window=0, sinks=0) for _ in range(2)]
    for seed, cache in enumerate(caches):
        append(cache, *MODEL.sample(seed, 64))
        assert cache.padding_groups[0].exact == 0
    expected = [dense(cache) for cache in caches]
    caches[0].extend(caches[1])
    for got, wanted in zip(dense(caches[0]), zip(*expected)):
        np.testing.assert_array_equal(got, np.concatenate(wanted))

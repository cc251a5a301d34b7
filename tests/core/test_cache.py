"""The live cache of a layer: what it holds, what it gives back, and what it costs."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from cases import ToyModel, attention, codes_of, every_case, plan_of
from tolerances import ATTENTION_RMS, assert_close, assert_codes_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.size import KINDS, CacheSize
from spectral_kv_core.codecs.registry import make_codec
from spectral_kv_core.planning.budget import CHUNK_TOKENS

MODEL = ToyModel()
SCALE = 0.125


def make_cache(xp, bits: float | None = 3, model: ToyModel = MODEL, window: int = 64, sinks: int = 4, **recipe):
    codec = None if bits is None else make_codec(xp, plan_of(model, bits, **recipe), 0)
    return LayerCache(xp, codec, sinks, window)


def append(cache, keys, values) -> None:
    cache.append(cache.xp.asarray(keys), cache.xp.asarray(values))


def attend(cache, queries, keys, values) -> np.ndarray:
    xp = cache.xp

    def fused(q, k, v, scale):
        return xp.asarray(attention(*map(xp.to_numpy, (q, k, v)), scale).astype(np.float32))

    return xp.to_numpy(cache.attend(*map(xp.asarray, (queries, keys, values)), SCALE, fused))


def dense(cache) -> tuple[np.ndarray, np.ndarray]:
    return tuple(map(cache.xp.to_numpy, cache.dense()))


def all_codes(cache, group: int = 0) -> np.ndarray:
    return np.concatenate([codes_of(cache.codec, chunk) for chunk in cache.padding_groups[group].chunks], axis=2)


def pieces(parts, sizes):
    """Slices of `sizes` tokens of all arrays in `parts`."""
    start = 0
    for size in sizes:
        yield tuple(x[:, :, start : start + size] for x in parts)
        start += size


@every_case
@pytest.mark.parametrize("bits", [None, 8])
def test_everything_that_went_in_comes_out(xp, case, bits):
    cache = make_cache(xp, bits, case.model)
    keys, values = case.model.sample(1, case.tokens, case.batch)
    append(cache, keys, values)
    got_keys, got_values = dense(cache)
    sealed = 0 if bits is None else max(case.tokens - 68, 0) // 16 * 16
    assert cache.seen == case.tokens and cache.tokens() == case.tokens * case.batch
    assert cache.padding_groups[0].sealed == sealed
    for got, expected in ((got_keys, keys), (got_values, values)):
        np.testing.assert_array_equal(got[:, :, :4], expected[:, :, :4])
        np.testing.assert_array_equal(got[:, :, 4 + sealed :], expected[:, :, 4 + sealed :])
        assert relative_rms(got, expected) < 0.01
    exact = 2 * (case.tokens - sealed) * case.kv_heads * case.head_dim * 4 * case.batch
    held = sum(a.nbytes for a in cache.arrays())
    assert held == exact if bits is None else held <= exact + sealed * 2 * case.kv_heads * case.head_dim * case.batch


STEPS = (700, 1, 1, 5, 16, 17, 100, 1, 400, 15, 1)


@pytest.mark.parametrize("bits, group, rope", [(None, "head", "post"), (2, "head", "post"), (2, "layer", "pre")])
def test_attention_is_attention_over_what_the_cache_holds(xp, bits, group, rope):
    cache = make_cache(xp, bits, group=group, rope=rope)
    parts = MODEL.queries(1, sum(STEPS)), *MODEL.sample(1, sum(STEPS))
    for queries, keys, values in pieces(parts, STEPS):
        held = dense(cache) if cache.seen else (keys[:, :, :0], values[:, :, :0])
        expected = attention(queries, np.concatenate([held[0], keys], 2), np.concatenate([held[1], values], 2), SCALE)
        got = attend(cache, queries, keys, values)
        assert_close(f"output at {cache.seen}", got, expected, limit=ATTENTION_RMS)
    assert cache.padding_groups[0].sealed > CHUNK_TOKENS or bits is None


def test_a_step_joins_exact_tokens_once(xp, monkeypatch):
    cache = make_cache(xp, 2)
    append(cache, *MODEL.sample(1, 200))
    queries, keys, values = (xp.asarray(x) for x in (MODEL.queries(2, 1), *MODEL.sample(2, 1)))
    joined, concat = [], xp.concat

    def recorded(arrays, axis):
        joined.extend(x for x in arrays if x is keys or x is values)
        return concat(arrays, axis=axis)

    monkeypatch.setattr(xp, "concat", recorded)
    cache.attend(queries, keys, values, 0.125, None)
    assert len(joined) == 2


def test_no_codec_is_the_plain_cache(xp):
    cache = make_cache(xp, None)
    parts = MODEL.queries(1, sum(STEPS)), *MODEL.sample(1, sum(STEPS))
    got = [attend(cache, *piece) for piece in pieces(parts, STEPS)]
    assert_close("outputs", np.concatenate(got, axis=2), attention(*parts, SCALE))


@pytest.mark.parametrize("sizes", [(1,) * 300, (7,) * 40 + (20,), (100, 200), (299, 1), (68, 1, 15, 1, 215)])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_codes_do_not_depend_on_how_tokens_came(xp, sizes, rope):
    model = ToyModel(layers=1)
    parts = model.sample(1, 300)
    at_once, cache = (make_cache(xp, 3, model, rope=rope) for _ in range(2))
    append(at_once, *parts)
    for piece in pieces(parts, sizes):
        append(cache, *piece)
    assert_codes_close("codes", all_codes(cache), all_codes(at_once))
    np.testing.assert_array_equal(dense(cache)[0][:, :, -64:], parts[0][:, :, -64:])
    assert cache.padding_groups[0].exact == at_once.padding_groups[0].exact


def test_a_token_is_quantized_once(xp):
    cache = make_cache(xp, 3)
    parts = MODEL.sample(1, 1300)
    before = np.zeros((1, 0, 0))
    for piece in pieces(parts, (90, 1, 40, 7, 800, 60, 200, 102)):
        append(cache, *piece)
        codes = all_codes(cache)
        if before.size:
            np.testing.assert_array_equal(codes[:, :, : before.shape[2]], before)
        before = codes
    assert before.shape[2] == (1300 - 68) // 16
    assert [chunk.start for chunk in cache.padding_groups[0].chunks] == [4, 4 + CHUNK_TOKENS]


LAYERS = 2


def sealed_bits(bits: float, lengths) -> dict[int, float]:
    """Stored bits per element of the sealed region of all layers, by its length in tokens."""
    longest = max(lengths)
    caches = [LayerCache(ops, make_codec(ops, plan_of(MODEL, bits), row), 0, 0) for row in range(LAYERS)]
    data = [MODEL.sample(1, longest, layer=row) for row in range(LAYERS)]
    stored = {}
    for length in range(16, longest + 1, 16):
        for cache, parts in zip(caches, data):
            cache.append(*(x[:, :, length - 16 : length] for x in parts))
            assert cache.padding_groups[0].sealed == length and cache.padding_groups[0].exact == 0
        if length in lengths:
            held = sum(a.nbytes for cache in caches for a in cache.arrays())
            stored[length] = held * 8 / (length * LAYERS * 2 * MODEL.kv_heads * MODEL.head_dim)
    return stored


@pytest.mark.parametrize("bits", [0.25, 0.5, 1, 2, 3, 4, 6, 8])
def test_stored_bits_stay_under_the_ceiling(bits):
    lengths = range(64, 3001, 16)
    over = {length: stored for length, stored in sealed_bits(bits, lengths).items() if stored > bits}
    assert max(over, default=0) < 1024 and max(over.values(), default=0) < 1.02 * bits, over
    if over:
        pytest.xfail(f"partly filled units: above the ceiling at {len(over)} lengths up to {max(over)} tokens")


CROPS = (0, 1, 64, 79, 80, 200, 473, 1195, 1197, 1199)


@pytest.mark.parametrize("forget", CROPS)
def test_crop_keeps_the_prefix_and_goes_on(xp, forget):
    model = ToyModel(64, 1, 2, layers=1)
    cache = make_cache(xp, 8, model)
    queries, (keys, values) = model.queries(1, 1200), model.sample(1, 1200)
    append(cache, keys, values)
    before = dense(cache)
    cache.crop(forget)
    left = 1200 - forget
    assert cache.seen == cache.tokens() == left
    for name, old, new in zip(("keys", "values"), before, dense(cache)):
        assert_close(name, new, old[:, :, :left], limit=1e-6)
    for size in (1, 20, 79):  # grow again with what was there
        held, piece = dense(cache), slice(left, left + size)
        if left + size > 1200:
            break
        expected = attention(
            queries[:, :, piece], *(np.concatenate([h, x[:, :, piece]], 2) for h, x in zip(held, (keys, values))), SCALE
        )
        got = attend(cache, queries[:, :, piece], keys[:, :, piece], values[:, :, piece])
        assert_close("output", got, expected, limit=ATTENTION_RMS)
        left += size
    assert_close("keys", dense(cache)[0], keys[:, :, :left], limit=0.015)
    assert cache.padding_groups[0].exact < 68 + 16


@pytest.mark.parametrize("forget", [300, 1000])
def test_crop_to_nothing_starts_anew(xp, forget):
    cache = make_cache(xp, 8)
    append(cache, *MODEL.sample(1, 300))
    cache.crop(forget)
    assert cache.seen == 0 and cache.arrays() == [] and cache.dense() is None
    keys, values = MODEL.sample(2, 200, batch=2)
    append(cache, keys, values)
    assert_close("keys", dense(cache)[0], keys, limit=0.01)


def test_crop_frees_bytes(xp):
    cache = make_cache(xp, 3)
    append(cache, *MODEL.sample(1, 1500))
    full = sum(a.nbytes for a in cache.arrays())
    cache.crop(1000)
    fresh = make_cache(xp, 3)
    append(fresh, *MODEL.sample(1, 500))
    assert sum(a.nbytes for a in cache.arrays()) <= sum(a.nbytes for a in fresh.arrays()) < full


PADDING = [0, 5, 40]


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1, 2, 2], [0, 1, 2]])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_selected_rows_go_on_as_before(xp, rows, padding):
    cache = make_cache(xp, 3)
    cache.start(3, padding)
    append(cache, *MODEL.sample(1, 300, batch=3))
    before = dense(cache)
    cache.select(rows)
    for old, new in zip(before, dense(cache)):
        np.testing.assert_array_equal(new, old[rows])
    assert cache.tokens() == sum(300 - (padding or [0] * 3)[row] for row in rows)
    held = dense(cache)
    queries, (keys, values) = MODEL.queries(5, 1, len(rows)), MODEL.sample(5, 1, len(rows))
    got = attend(cache, queries, keys, values)
    for i, row in enumerate(rows):
        start = (padding or [0] * 3)[row]
        tokens = [np.concatenate([h[i : i + 1, :, start:], x[i : i + 1]], 2) for h, x in zip(held, (keys, values))]
        assert_close("output", got[i : i + 1], attention(queries[i : i + 1], *tokens, SCALE), limit=ATTENTION_RMS)


@pytest.mark.parametrize("row", [3, -1])
def test_selecting_a_row_that_is_not_there_is_refused(row):
    cache = make_cache(ops, 3)
    append(cache, *MODEL.sample(1, 20, batch=3))
    with pytest.raises(ValueError, match="rows"):
        cache.select([0, row])


@pytest.mark.parametrize("sizes", [(250,), (32, 100, 118), (3, 20, 227), (249, 1), (40, 1, 1, 208)])
@pytest.mark.parametrize("rope", ["post", "pre"])
def test_a_padded_row_comes_out_as_if_alone(xp, sizes, rope):
    queries, (keys, values) = MODEL.queries(1, 256, 3), MODEL.sample(1, 256, 3)
    batch = make_cache(xp, 3, rope=rope)
    batch.start(3, PADDING)
    together = [attend(batch, *piece) for piece in pieces((queries, keys, values), (*sizes, 1, 5))]
    assert batch.seen == 256 and batch.tokens() == 3 * 256 - sum(PADDING)
    together = np.concatenate(together, axis=2)
    held = dense(batch)
    for row, padding in enumerate(PADDING):
        alone = make_cache(xp, 3, rope=rope)
        mine = tuple(x[row : row + 1, :, padding:] for x in (queries, keys, values))
        ends = np.maximum(np.cumsum((*sizes, 1, 5)) - padding, 0)
        own_sizes = [size for size in np.diff(ends, prepend=0) if size]
        expected = np.concatenate([attend(alone, *piece) for piece in pieces(mine, own_sizes)], axis=2)
        group = next(group for group in batch.padding_groups if row in group.sequences)
        for got, wanted in zip(
            (group.exact_keys, group.exact_values),
            (alone.padding_groups[0].exact_keys, alone.padding_groups[0].exact_values),
        ):
            np.testing.assert_array_equal(xp.to_numpy(got), xp.to_numpy(wanted))
        for got, wanted in zip(group.chunks, alone.padding_groups[0].chunks, strict=True):
            assert (got.start, got.tokens) == (wanted.start, wanted.tokens)
            for a, b in zip(got.arrays, wanted.arrays):
                np.testing.assert_array_equal(xp.to_numpy(a), xp.to_numpy(b))
        assert_close(f"output of row {row}", together[row : row + 1, :, padding:], expected)
        assert not together[row, :, :padding].any() and not held[0][row, :, :padding].any()


def test_rows_of_equal_padding_share_a_padding_group(xp):
    queries, (keys, values) = MODEL.queries(1, 120, 4), MODEL.sample(1, 120, 4)
    cache = make_cache(xp, 3)
    cache.start(4, [7, 0, 7, 0])
    got = attend(cache, queries, keys, values)
    assert [group.sequences for group in cache.padding_groups] == [[1, 3], [0, 2]]
    for row, padding in enumerate([7, 0, 7, 0]):
        mine = (x[row : row + 1, :, padding:] for x in (queries, keys, values))
        assert_close("output", got[row : row + 1, :, padding:], attention(*mine, SCALE))


def test_padding_of_a_sequence_without_tokens_is_still_to_be_told():
    cache = make_cache(ops)
    assert cache.awaits_tokens
    cache.start(2, [0, 50])
    keys, values = MODEL.sample(1, 80, 2)
    append(cache, keys[:, :, :50], values[:, :, :50])
    assert cache.awaits_tokens
    cache.repad([0, 70])  # told by a call that went on inside it
    append(cache, keys[:, :, 50:], values[:, :, 50:])
    assert not cache.awaits_tokens
    assert cache.padding == [0, 70] and [group.exact for group in cache.padding_groups] == [80, 10]


@pytest.mark.parametrize("tokens", [1, 60, 300])
def test_what_is_held_keeps_no_more_alive(tokens):
    """What comes in may be a view of the projection of all heads."""
    all_heads = np.concatenate(MODEL.sample(1, tokens), axis=1)
    keys, values = all_heads[:, : MODEL.kv_heads], all_heads[:, MODEL.kv_heads :]
    cache = make_cache(ops)
    append(cache, keys, values)
    assert not any(np.shares_memory(x, all_heads) for x in cache.arrays())


def test_dense_while_a_row_is_still_all_padding(xp):
    cache = make_cache(xp, 8)
    cache.start(2, [0, 100])
    keys, values = MODEL.sample(1, 90, 2)
    append(cache, keys, values)
    got_keys, got_values = dense(cache)
    assert_close("keys", got_keys[:1], keys[:1], limit=0.01)
    assert_close("values", got_values[:1], values[:1], limit=0.01)
    assert not got_keys[1].any() and not got_values[1].any()


def test_padding_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="left padding for 2 rows, received 3"):
        make_cache(ops).start(2, [0, 1, 2])


@pytest.mark.parametrize("window, sinks", [(0, 0), (0, 4), (64, 0), (1, 1)])
@pytest.mark.parametrize("tokens", [16, 160, 161])
def test_no_window_and_no_sinks(xp, window, sinks, tokens):
    cache = make_cache(xp, 8, window=window, sinks=sinks)
    queries, (keys, values) = MODEL.queries(1, tokens + 3), MODEL.sample(1, tokens + 3)
    append(cache, keys[:, :, :tokens], values[:, :, :tokens])
    assert cache.padding_groups[0].sealed == max(tokens - window - sinks, 0) // 16 * 16
    for size in (1, 2):
        part = slice(cache.seen, cache.seen + size)
        held = dense(cache)
        assert_close("keys", held[0], keys[:, :, : part.start], limit=0.01)
        expected = attention(
            queries[:, :, part], *(np.concatenate([h, x[:, :, part]], 2) for h, x in zip(held, (keys, values))), SCALE
        )
        got = attend(cache, queries[:, :, part], keys[:, :, part], values[:, :, part])
        assert_close("output", got, expected, limit=ATTENTION_RMS)
    cache.crop(3)
    assert_close("keys", dense(cache)[0], keys[:, :, :tokens], limit=0.01)


def test_few_bits_work_in_a_batch(xp):
    """At a quarter of a bit most coefficients have no code at all."""
    cache = make_cache(xp, 0.25)
    append(cache, *MODEL.sample(1, 300, batch=2))
    got = attend(cache, MODEL.queries(1, 1, 2), *MODEL.sample(2, 1, 2))
    assert got.shape == (2, 4, 1, 64) and np.isfinite(got).all()
    cache.select([1])
    assert dense(cache)[0].shape == (1, 2, 301, 64)


@pytest.mark.parametrize("way", ["append", "attend"])
def test_nan_is_refused_when_it_is_sealed(xp, way):
    cache = make_cache(xp, 3)
    keys, values = MODEL.sample(1, 200)
    keys[0, 0, 100, 5] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        if way == "append":
            append(cache, keys, values)
        else:
            attend(cache, MODEL.queries(1, 200), keys, values)


def test_exact_tokens_keep_their_dtype(xp):
    cache = make_cache(xp, 3)
    keys, values = (xp.astype(xp.asarray(x), xp.float16) for x in MODEL.sample(1, 300))
    cache.append(keys, values)
    assert cache.padding_groups[0].exact_keys.dtype == xp.float16
    assert cache.dense()[0].dtype == xp.float16 and cache.dense(xp.float32)[0].dtype == xp.float32


def test_arrays_do_not_keep_their_parent_alive():
    """A slice that stays must be a copy: else the projection of a whole prompt would stay in memory."""
    cache = make_cache(ops, 3)
    keys, values = MODEL.sample(1, 2000)
    append(cache, keys[:, :, :20], values[:, :, :20])
    append(cache, keys[:, :, 20:], values[:, :, 20:])
    cache.crop(33)
    for array in cache.arrays():
        base = array if array.base is None else array.base
        assert base.nbytes <= 2 * array.nbytes


SIZE = {"codes": 600, "exact": 400}


def test_cache_size_reports_compression():
    size = CacheSize(SIZE, 68.5, 8000, 55)
    assert (size, size.dense_nbytes, size.table_nbytes, size.exact_tokens) == (1000, 8000, 55, 68.5)
    assert size.compression == 8 and size.bits_per_element == 2
    assert size.by_kind == dict.fromkeys(KINDS, 0) | SIZE and list(size.by_kind) == list(KINDS)
    assert CacheSize({}, 0, 0, 0).compression == 1


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_cache_size_can_be_copied_and_pickled(again):
    size = again(CacheSize(SIZE, 68.5, 8000, 55))
    assert type(size) is CacheSize
    assert (size, size.dense_nbytes, size.table_nbytes, size.compression) == (1000, 8000, 55, 8)
    assert size.by_kind["codes"] == 600 and size.exact_tokens == 68.5


@pytest.fixture
def staged_cache(xp):
    """Cache of a plan at 2 bits with the codec that holds a prompt at 4."""
    plan = plan_of(ToyModel(), 2)
    return LayerCache(xp, make_codec(xp, plan, 0), 4, 64, lambda: make_codec(xp, plan.staging, 0))


def held_bits(cache) -> float:
    chunks = [c for group in cache.padding_groups for c in (*group.chunks, *group.staged)]
    return sum(a.nbytes for c in chunks for a in c.arrays) * 8 / (sum(c.tokens for c in chunks) * 2 * 2 * 64)


def test_a_prompt_in_pieces_is_staged_until_it_ends(xp, staged_cache):
    keys, values = map(xp.asarray, ToyModel().sample(1, 900))
    staged_cache.append(keys[:, :, :300], values[:, :, :300])
    assert not staged_cache.is_staged and held_bits(staged_cache) < 2.01  # the first call is encoded for good
    staged_cache.append(keys[:, :, 300:600], values[:, :, 300:600])
    staged_cache.append(keys[:, :, 600:880], values[:, :, 600:880])
    group = staged_cache.padding_groups[0]
    assert staged_cache.is_staged and (group.exact, group.sealed, staged_cache.tokens()) == (80, 800, 880)
    staged_bits = sum(a.nbytes for c in group.staged for a in c.arrays) * 8 / (576 * 256)
    assert 3.9 < staged_bits < 4.01
    staged = [xp.to_numpy(x) for x in staged_cache.dense()]
    staged_cache.append(keys[:, :, 880:881], values[:, :, 880:881])
    assert not staged_cache.is_staged and held_bits(staged_cache) < 2.01
    assert staged_cache.padding_groups[0].sealed == 800
    final = [xp.to_numpy(x)[:, :, :880] for x in staged_cache.dense()]
    for exact, before, after in zip((keys, values), staged, final):
        exact = xp.to_numpy(exact)[:, :, 228:804]
        assert relative_rms(before[:, :, 228:804], exact) < 0.7 * relative_rms(after[:, :, 228:804], exact)


def test_ending_a_prompt_is_encoding_what_was_staged(xp, staged_cache):
    """finalize, crop and a short call all end it; batch selection keeps it."""
    keys, values = map(xp.asarray, ToyModel().sample(1, 700, batch=2))
    for start, stop in ((0, 300), (300, 700)):
        staged_cache.append(keys[:, :, start:stop], values[:, :, start:stop])
    staged_cache.select([1, 0, 1])
    assert staged_cache.is_staged and staged_cache.tokens() == 3 * 700
    group = staged_cache.padding_groups[0]
    (first,), (second,) = group.chunks, group.staged
    expected = staged_cache.codec.append(first, *staged_cache.staging.decode(second))
    staged_cache.crop(1)
    (got,) = staged_cache.padding_groups[0].chunks
    np.testing.assert_array_equal(codes_of(staged_cache.codec, got), codes_of(staged_cache.codec, expected))
    assert staged_cache.tokens() == 3 * 699 and not staged_cache.is_staged


def test_no_staging_where_the_plan_has_as_many_bits():
    assert plan_of(ToyModel(), 4).staging is None
    assert plan_of(ToyModel(), 3.9).staging.bits == 4

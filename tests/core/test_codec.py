"""Codecs: error against bits, latent attention, parity of the array libraries, appending and cutting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from cases import Case, ToyModel, attention, codes_of, every_case, plan_of, toy_profile_of
from tolerances import ATTENTION_RMS, assert_close, assert_codes_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.attention import group_queries, merge_partials
from spectral_kv_core.arrays.rope import rotate, unrotate
from spectral_kv_core.codecs.chunk import split_by_chunk
from spectral_kv_core.codecs.registry import make_codec, make_plan
from spectral_kv_core.planning.methods import METHODS, ROUNDINGS
from spectral_kv_core.quantization.time_rounding import round_in_time

MODEL = ToyModel()
RECIPES = [("head", "post"), ("head", "pre"), ("side", "pre"), ("layer", "pre"), ("layer", "post")]
every_recipe = pytest.mark.parametrize("group, rope", RECIPES)


def arrays(xp, *parts):
    return tuple(map(xp.asarray, parts))


def decoded(codec, chunk) -> tuple[np.ndarray, np.ndarray]:
    keys, values = codec.decode(chunk)
    return codec.xp.to_numpy(keys), codec.xp.to_numpy(values)


def whole_blocks(case) -> int:
    return max(case.tokens // 16 * 16, 16)


@every_case
def test_error_falls_with_bits_and_ends_below_one_percent(xp, case):
    keys, values = case.model.sample(1, whole_blocks(case), case.batch)
    errors = []
    for bits in (0.5, 1, 2, 4, 8):
        codec = make_codec(xp, plan_of(case.model, bits), 0)
        got = decoded(codec, codec.encode(*arrays(xp, keys, values), 4))
        errors.append([relative_rms(got[0], keys), relative_rms(got[1], values)])
    assert np.all(np.diff(errors, axis=0) < 0), errors
    assert np.max(errors[-1]) < 0.01


@every_recipe
def test_every_recipe_decodes_rotated_keys(xp, group, rope):
    model = ToyModel(rotated=rope == "pre")
    codec = make_codec(xp, plan_of(model, 8, group, rope), 1)
    keys, values = model.sample(2, 512, layer=1)
    start = 36  # a chunk in the middle of a text: its keys stand at their own positions
    chunk = codec.encode(*arrays(xp, keys[:, :, start : start + 256], values[:, :, start : start + 256]), start)
    got_keys, got_values = decoded(codec, chunk)
    assert_close("keys", got_keys, keys[:, :, start : start + 256], limit=0.015)
    assert_close("values", got_values, values[:, :, start : start + 256], limit=0.015)


def test_rotation_before_the_codec_pays_for_rotated_keys():
    model = ToyModel(rotated=True)
    keys, values = model.sample(3, 512)
    errors = []
    for rope in ("pre", "post"):
        codec = make_codec(ops, plan_of(model, 1, "head", rope), 0)
        errors.append(relative_rms(decoded(codec, codec.encode(keys, values, 0))[0], keys))
    assert errors[0] < 0.5 * errors[1]


@every_case
@pytest.mark.parametrize("bits", [0.25, 3])
def test_latent_attention_is_attention_over_decoded_vectors(xp, case, bits):
    codec = make_codec(xp, plan_of(case.model, bits), 0)
    assert codec.method.latent
    chunk = codec.encode(*arrays(xp, *case.model.sample(1, whole_blocks(case), case.batch)), 4)
    queries, scale = case.model.queries(1, 3, case.batch), case.head_dim**-0.5
    rows = group_queries(xp.asarray(queries), case.kv_heads)
    got = xp.to_numpy(merge_partials(xp, [codec.attend(chunk, rows, scale)])).reshape(queries.shape)
    keys, values = decoded(codec, chunk)
    expected = [attention(queries[:, :, i : i + 1], keys, values, scale) for i in range(3)]
    assert_close("output", got, np.concatenate(expected, axis=2), limit=ATTENTION_RMS)


@pytest.mark.parametrize("group, rope", [("layer", "pre"), ("side", "pre"), ("head", "pre"), ("side", "post")])
def test_attention_with_rebuilt_keys_is_attention_over_decoded_vectors(xp, group, rope):
    """Values are pooled before they are rebuilt."""
    case = Case(400, 64, 2, 6, batch=2)
    codec = make_codec(xp, plan_of(case.model, 3, group, rope), 0)
    assert not codec.method.latent and (codec.weight is None) == (group == "head")
    chunk = codec.encode(*arrays(xp, *case.model.sample(1, 400, case.batch)), 4)
    queries = case.model.queries(1, 3, case.batch)
    got = merge_partials(xp, [codec.attend(chunk, group_queries(xp.asarray(queries), case.kv_heads), 0.125)])
    expected = [attention(queries[:, :, i : i + 1], *decoded(codec, chunk), 0.125) for i in range(3)]
    assert_close(
        "output", xp.to_numpy(got).reshape(queries.shape), np.concatenate(expected, axis=2), limit=ATTENTION_RMS
    )


def test_identical_coefficients_give_identical_bytes(xp):
    codec, reference = (make_codec(x, plan_of(MODEL, 3), 0) for x in (xp, ops))
    z, _ = reference.coefficients(*MODEL.sample(1, 512), 0)
    for got, expected in zip(codec.quantize(xp.asarray(z)), reference.quantize(z)):
        np.testing.assert_array_equal(xp.to_numpy(got), expected)


@every_recipe
def test_time_rounding_gives_the_reference_codes(xp, group, rope):
    plan = plan_of(MODEL, 2, group, rope, "expected-attention")
    reference, codec = make_codec(ops, plan, 0), make_codec(xp, plan, 0)
    sample = MODEL.sample(1, 2048)
    expected, got = reference.encode(*sample, 4), codec.encode(*arrays(xp, *sample), 4)
    differing = np.count_nonzero(codes_of(codec, got) != codes_of(reference, expected))
    assert differing <= max(1, codes_of(reference, expected).size // 10_000)


@every_recipe
def test_time_rounding_lowers_the_weighted_error(group, rope):
    """The error that it minimizes, and with it the error of the tokens that weigh most; the plain error may grow."""
    model = ToyModel(rotated=rope == "pre")
    keys, values = model.sample(1, 2048)
    plain, weighted = (
        make_codec(ops, plan_of(model, 4, group, rope, rounding), 0) for rounding in ("nearest", "expected-attention")
    )
    z, weights = weighted.coefficients(keys, values, 0)
    loss, worst = [], []
    heavy = weights > np.quantile(weights, 0.9)
    tables = weighted.quantizers
    coded = tables.slots.max(2, keepdims=True) > 0  # components without any bit have nothing to round
    for codes in (
        tables.quantize(z),
        round_in_time(ops, z, weights, weighted.gain, weighted.time, tables),
    ):
        error = weighted.time.T @ np.where(coded, (z - tables.dequantize(codes)) * weighted.gain, 0)  # over tokens
        loss.append(float((np.square(error) * weights[..., None]).sum()))
        worst.append(float(np.square(error)[heavy].mean()))
    assert loss[1] < loss[0] and worst[1] < 0.85 * worst[0], (loss, worst)
    assert len(plain.tables()) < len(weighted.tables())


def test_token_weights_follow_the_queries():
    """A token whose key points to the mean query weighs most in its block, wherever the chunk starts."""
    model = ToyModel(rotated=True)
    codec = make_codec(ops, plan_of(model, 2, "head", "post", "expected-attention"), 0)
    keys, values = model.sample(1, 64)
    keys = unrotate(ops, keys, model.rope, 0)
    linear = codec.weigh.tables[0]
    keys[:, :, 21] += 40 * linear.mean(-1) / np.linalg.norm(linear.mean(-1), axis=-1, keepdims=True)
    for start in (4, 500):
        _, weights = codec.coefficients(rotate(ops, keys, model.rope, start), values, start)
        assert weights.shape == (1, 4, 4, 16)
        np.testing.assert_allclose(weights.mean(-1), 1, rtol=1e-5)
        assert np.all(weights[:, :, 1].argmax(-1) == 5) and weights.max() > 2


@pytest.mark.parametrize("scorer", ROUNDINGS[1:])
def test_any_scorer_can_weigh_tokens(xp, scorer):
    """Weights are of the block alone, wherever it stands and whatever comes with it, and codes are those of the reference."""
    model = ToyModel(rotated=True)
    plans = plan_of(model, 2, "head", "post", scorer), plan_of(model, 2, "layer", "pre", scorer)
    keys, values = model.sample(1, 96)
    for plan in plans:
        codec, reference = make_codec(xp, plan, 0), make_codec(ops, plan, 0)
        _, weights = codec.coefficients(*arrays(xp, keys, values), 0)
        weights = xp.to_numpy(weights)
        np.testing.assert_allclose(weights.mean(-1), 1, rtol=1e-5)
        assert weights.std() > 0.1
        moved = rotate(ops, unrotate(ops, keys, model.rope, 0), model.rope, 700)[:, :, 32:64]
        _, alone = codec.coefficients(*arrays(xp, moved, values[:, :, 32:64]), 732)
        np.testing.assert_allclose(xp.to_numpy(alone), weights[:, :, 2:4], rtol=2e-2)
        got = codes_of(codec, codec.encode(*arrays(xp, keys, values), 0))
        expected = codes_of(reference, reference.encode(keys, values, 0))
        assert (got != expected).mean() < 1e-3


@pytest.fixture(scope="module")
def million():
    """Keys and values, and their chunk by the reference, of more than a million codes."""
    keys, values = MODEL.sample(1, 5120)
    codec = make_codec(ops, plan_of(MODEL, 3), 0)
    return keys, values, codec, codec.encode(keys, values, 4)


def test_identical_vectors_give_the_reference_codes(xp, million):
    keys, values, reference, expected = million
    codec = make_codec(xp, plan_of(MODEL, 3), 0)
    chunk = codec.encode(*arrays(xp, keys, values), 4)
    got_codes, codes = codes_of(codec, chunk), codes_of(reference, expected)
    assert codes.size >= 1_000_000
    assert [a.shape for a in chunk.arrays] == [a.shape for a in expected.arrays]
    assert_codes_close("codes", got_codes, codes)
    same = np.repeat((got_codes == codes).all((0, 1)), 16)  # tokens of blocks without a differing code
    for name, got, wanted in zip(("keys", "values"), decoded(codec, chunk), decoded(reference, expected)):
        assert_close(name, got[:, :, same], wanted[:, :, same])


@every_recipe
def test_reference_chunk_decodes_alike(xp, group, rope):
    plan, model = plan_of(MODEL, 2, group, rope), MODEL
    reference, codec = make_codec(ops, plan, 0), make_codec(xp, plan, 0)
    chunk = reference.encode(*model.sample(1, 176), 20)
    moved = type(chunk)(chunk.batch, chunk.start, chunk.tokens, arrays(xp, *chunk.arrays))
    for name, got, wanted in zip(("keys", "values"), decoded(codec, moved), decoded(reference, chunk)):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


@every_recipe
@pytest.mark.parametrize("pieces", [(16,) * 9, (64, 80), (128, 16)])
def test_appending_equals_encoding_at_once(xp, group, rope, pieces):
    codec = make_codec(xp, plan_of(MODEL, 3, group, rope), 0)
    keys, values = arrays(xp, *MODEL.sample(1, 144, batch=2))
    whole = codec.encode(keys, values, 4)
    done = pieces[0]
    chunk = codec.encode(keys[:, :, :done], values[:, :, :done], 4)
    for piece in pieces[1:]:
        before = codes_of(codec, chunk)
        chunk = codec.append(chunk, keys[:, :, done : done + piece], values[:, :, done : done + piece])
        done += piece
        np.testing.assert_array_equal(codes_of(codec, chunk)[:, :, : before.shape[2]], before)
    assert chunk.tokens == 144 and [a.shape for a in chunk.arrays] == [a.shape for a in whole.arrays]
    assert_codes_close("codes", codes_of(codec, chunk), codes_of(codec, whole))


@pytest.mark.parametrize("tokens", [16, 112, 128, 144])
def test_cut_keeps_the_codes(xp, tokens):
    codec = make_codec(xp, plan_of(MODEL, 3), 0)
    chunk = codec.encode(*arrays(xp, *MODEL.sample(1, 176, batch=2)), 4)
    cut = codec.cut(chunk, tokens)
    assert (cut.start, cut.tokens) == (4, tokens)
    np.testing.assert_array_equal(codes_of(codec, cut), codes_of(codec, chunk)[:, :, : tokens // 16])
    assert sum(a.nbytes for a in cut.arrays) < sum(a.nbytes for a in chunk.arrays)


def test_selected_rows_are_the_rows(xp):
    codec = make_codec(xp, plan_of(MODEL, 3), 0)
    chunk = codec.encode(*arrays(xp, *MODEL.sample(1, 48, batch=3)), 4)
    picked = chunk.of_sequences(xp, xp.asarray(np.array([2, 0, 2, 2], np.int32)))
    assert picked.batch == 4
    np.testing.assert_array_equal(codes_of(codec, picked), codes_of(codec, chunk)[[2, 0, 2, 2]])


def test_widths_are_the_plan(xp):
    plan = plan_of(MODEL, 2)
    codec = make_codec(xp, plan, 1)
    chunk = codec.encode(*arrays(xp, *MODEL.sample(1, 128)), 4)
    stored = sum(a.nbytes for a in chunk.arrays) * 8
    assert stored == int((plan.widths[1].astype(int) * [1, 1, 2, 4, 8]).sum()) * 128 // 16
    assert len(chunk.arrays) == 2 * len(codec.bits)


def test_layer_without_bits_gives_the_mean(xp):
    """A plan may give a whole layer nothing; its chunk has no arrays but still a batch."""
    plan = plan_of(MODEL, 0.25)
    plan = replace(plan, widths=np.zeros_like(plan.widths))
    codec = make_codec(xp, plan, 0)
    chunk = codec.encode(*arrays(xp, *MODEL.sample(1, 32, batch=2)), 4)
    chunk = codec.append(chunk, *arrays(xp, *MODEL.sample(2, 16, batch=2)))
    assert chunk.arrays == () and chunk.tokens == 48
    mean = plan.basis_set.mean[0].reshape(1, 4, 1, 64)
    keys, values = decoded(codec, codec.cut(chunk, 32))
    assert_close("keys", keys, np.broadcast_to(mean[:, :2], (2, 2, 32, 64)))
    assert_close("values", values, np.broadcast_to(mean[:, 2:], (2, 2, 32, 64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", ["spectral", "affine"])
def test_non_finite_vectors_are_refused(xp, bad, side, name):
    codec = make_codec(xp, make_plan(MODEL.shape, toy_profile_of(MODEL), name, 4.5), 0)
    parts = MODEL.sample(1, 32)
    chunk = codec.encode(*arrays(xp, *parts), 4)
    parts[side][0, 1, 7, 3] = bad
    for call in (lambda: codec.encode(*arrays(xp, *parts), 4), lambda: codec.append(chunk, *arrays(xp, *parts))):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()


def test_tables_hold_every_shared_array(xp):
    for group, rope in RECIPES:
        codec = make_codec(xp, plan_of(MODEL, 3, group, rope, "expected-attention"), 0)
        tables = codec.tables()  # makes what the kernel holds
        assert set(arrays_in(codec, type(codec.mean), set())) == {id(x) for x in tables}


def arrays_in(value, kind: type, seen: set[int]) -> Iterator[int]:
    """Ids of the arrays of type `kind` that can be reached from `value` through attributes."""
    if isinstance(value, kind):
        yield id(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from arrays_in(item, kind, seen)
    elif isinstance(value, dict):
        yield from arrays_in([*value.values()], kind, seen)
    elif type(value).__module__.startswith("spectral_kv") and id(value) not in seen:
        seen.add(id(value))
        yield from arrays_in(vars(value), kind, seen)


@pytest.mark.parametrize("bits", [2.5, 4.5, 8.5])
def test_affine_codec(xp, bits):
    model = ToyModel(128, 2)
    codec = make_codec(xp, make_plan(model.shape, None, METHODS["affine"], bits), 0)
    keys, values = model.sample(1, 63, batch=2)
    chunk = codec.encode(*arrays(xp, keys[:, :, :40], values[:, :, :40]), 4)
    chunk = codec.append(chunk, *arrays(xp, keys[:, :, 40:], values[:, :, 40:]))
    at_once = codec.encode(*arrays(xp, keys, values), 4)
    for got, expected in zip(chunk.arrays, at_once.arrays):
        np.testing.assert_array_equal(xp.to_numpy(got), xp.to_numpy(expected))
    assert sum(a.nbytes for a in chunk.arrays) * 8 == bits * keys.size * 2
    got = decoded(codec, chunk)
    assert_close("keys", got[0], keys, limit=2 * 2 ** -(bits - 0.5))
    assert_close("values", got[1], values, limit=2 * 2 ** -(bits - 0.5))
    np.testing.assert_array_equal(decoded(codec, codec.cut(chunk, 17))[0], got[0][:, :, :17])
    queries = model.queries(1, 2, 2)
    out = merge_partials(xp, [codec.attend(chunk, group_queries(xp.asarray(queries), 2), 0.1)])
    expected = [attention(queries[:, :, i : i + 1], *got, 0.1) for i in range(2)]
    assert_close("output", xp.to_numpy(out).reshape(queries.shape), np.concatenate(expected, axis=2))


def test_tokens_are_split_by_the_chunks_that_they_fill():
    assert split_by_chunk(0, 0, 0, 64) == []
    assert split_by_chunk(0, 64, 0, 64) == [(0, 64)]
    assert split_by_chunk(16, 160, 48, 64) == [(16, 32), (32, 96), (96, 160)]
    assert split_by_chunk(0, 16, 32, 64) == [(0, 16)]

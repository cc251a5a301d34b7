"""The decode step of the MLX backend: equal to the core's, however chunks are joined, and codes are held once."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cases import CASES, Case, ToyModel, codes_of, every_case, plan_of, toy_profile_of
from tolerances import assert_close

mx = pytest.importorskip("mlx.core")

from spectral_kv_core.arrays import attention  # noqa: E402
from spectral_kv_core.arrays import ops as core_ops  # noqa: E402
from spectral_kv_core.cache.layer_cache import LayerCache  # noqa: E402
from spectral_kv_core.cache.padding_group import PaddingGroup  # noqa: E402
from spectral_kv_core.codecs.registry import make_codec, make_plan  # noqa: E402
from spectral_kv_core.planning.budget import CHUNK_TOKENS  # noqa: E402
from spectral_kv_core.planning.methods import QUANTIZERS  # noqa: E402
from spectral_kv_mlx import ops  # noqa: E402
from spectral_kv_mlx.kernels import attention as fast  # noqa: E402
from spectral_kv_mlx.kernels import blocks, decode_step, rows  # noqa: E402


@pytest.fixture(params=[False, True], ids=["decoded", "multiplied"])
def products(request, monkeypatch):
    """Products as the CPU build takes them, and as Metal does."""
    for module in (rows, fast):
        monkeypatch.setattr(module, "on_gpu", lambda: request.param)
    monkeypatch.setattr(mx.metal, "is_available", lambda: request.param)
    for name in ("gather_mm", "segmented_mm"):  # float32 only in the CPU build
        monkeypatch.setattr(mx, name, partial(in_float32, getattr(mx, name)))


def in_float32(product, a, b, *indices):
    return product(a.astype(mx.float32), b.astype(mx.float32), *indices).astype(a.dtype)


def chunks_of(codec, case: Case, sizes: list[int]) -> list:
    keys, values = (codec.xp.asarray(x) for x in case.model.sample(1, sum(sizes), case.batch))
    stops = np.cumsum(sizes)
    return [codec.encode(keys[:, :, b - n : b], values[:, :, b - n : b], 4 + b - n) for n, b in zip(sizes, stops)]


def inputs(case: Case, length: int = 1, exact: int = 20, dtype=mx.float32) -> list:
    """Queries of `length` tokens at the end of `exact` exact tokens."""
    arrays = (case.model.queries(1, length, case.batch), *case.model.sample(2, exact, case.batch))
    return [mx.array(x).astype(dtype) for x in arrays]


def full(tokens: int) -> list[int]:
    """Sizes of the chunks of so many sealed tokens."""
    sizes = [CHUNK_TOKENS] * (tokens // CHUNK_TOKENS) + [tokens % CHUNK_TOKENS]
    return [size for size in sizes if size]


def assert_step(
    case: Case,
    bits: float,
    sizes: list[int],
    scale: float = 0.125,
    dtype: str = "float32",
    quantizer="scalar",
    **options,
):
    codec = make_codec(ops, plan_of(case.model, bits, quantizer=quantizer), 0)
    chunks, given = chunks_of(codec, case, sizes), inputs(case, dtype=getattr(mx, dtype), **options)
    expected = attention.decode_step(ops, codec, chunks, *given, scale)
    got = decode_step(codec)(chunks, *given, scale)
    assert got.dtype == given[0].dtype
    assert_close("output", ops.to_numpy(got), ops.to_numpy(expected), dtype)


@every_case
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [0.5, 2, 6])
def test_a_step_equals_the_core(products, case, bits, quantizer):
    assert_step(case, bits, full(max(case.tokens // 16 * 16, 16)), quantizer=quantizer)


@pytest.mark.parametrize("case", CASES[-3:], ids=lambda case: case.id)
def test_a_step_equals_numpy(case):
    """From the same codes."""
    given = inputs(case)
    ours, theirs = (make_codec(xp, plan_of(case.model, 3), 0) for xp in (ops, core_ops))
    expected_chunks = chunks_of(theirs, case, full(1360))
    chunks = [replace(chunk, arrays=tuple(map(mx.array, chunk.arrays))) for chunk in expected_chunks]
    expected = attention.decode_step(core_ops, theirs, expected_chunks, *map(np.array, given), 0.125)
    assert_close("output", np.array(decode_step(ours)(chunks, *given, 0.125)), expected)


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_any_number_of_chunks(products, monkeypatch, chunks):
    """In tiles of three."""
    monkeypatch.setattr(fast, "TILE_CHUNKS", {"cpu": 3, "gpu": 3})
    assert_step(Case(0, 32, 1, 2), 2, [CHUNK_TOKENS] * chunks + [48])


@pytest.mark.parametrize("blocks", [1, 7, 8, 13, 63])
def test_a_last_chunk_of_any_number_of_blocks(products, blocks):
    assert_step(Case(0, 64, 2, 6, batch=2), 3, [CHUNK_TOKENS, 16 * blocks])


@pytest.mark.parametrize("q_heads, length", [(1, 1), (5, 1), (7, 3), (2, 16)])
def test_any_number_of_query_rows_and_new_tokens(products, q_heads, length):
    assert_step(Case(0, 64, 1, q_heads, batch=2), 2, [1024, 1024, 48], length=length, exact=length + 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(products, dtype):
    assert_step(Case(0, 128, 2, 8), 2, [1024, 112], dtype=dtype)


def test_scores_far_apart():
    assert_step(Case(0, 64, 2, 4), 3, [1024, 1024], scale=30.0, length=4)  # exp(score) would leave the range of float32


@pytest.mark.parametrize("side", [slice(0, 2), slice(2, 4)], ids=["keys", "values"])
def test_a_side_without_any_bits(products, side):
    case = Case(0, 64, 2, 4)
    plan = plan_of(case.model, 2)
    widths = plan.widths.copy()
    widths[:, side] = 0
    codec = make_codec(ops, replace(plan, widths=widths), 0)
    chunks, given = chunks_of(codec, case, [1024, 64]), inputs(case)
    expected = attention.decode_step(ops, codec, chunks, *given, 0.125)
    assert_close("output", np.array(decode_step(codec)(chunks, *given, 0.125)), np.array(expected))


def test_other_codecs_have_no_faster_step():
    assert decode_step(None) is None
    assert decode_step(make_codec(ops, plan_of(ToyModel(), 3, "layer", "pre"), 0)) is None


def test_joined_codes_are_held_once(monkeypatch):
    case = Case(0, 64, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    chunks, given = chunks_of(codec, case, [CHUNK_TOKENS] * 3), inputs(case)
    before = [codes_of(codec, chunk) for chunk in chunks]
    mx.eval([chunk.arrays for chunk in chunks])
    codes = sum(x.nbytes for chunk in chunks for x in chunk.arrays)
    monkeypatch.setitem(fast.TILE_CHUNKS, "cpu", 3)
    step = decode_step(codec)
    for count in (2, 3, 3):
        outputs = step(chunks[:count], *given, 0.125)
        mx.eval(outputs, [chunk.arrays for chunk in chunks])
    held = mx.get_active_memory()
    tiles = list(step._tiles.values())
    assert [tile.tokens for tile in tiles] == [3 * CHUNK_TOKENS]
    assert all(np.array_equal(codes_of(codec, chunk), old) for chunk, old in zip(chunks, before))
    del tiles, outputs
    chunks.clear()
    assert len(step._tiles) == 0
    assert codes <= held - mx.get_active_memory() < 1.5 * codes  # what is held beside them is small


def test_a_cache_with_left_padding_takes_the_faster_step(monkeypatch):
    """Token by token behind a prompt, over the end of a chunk; as with the core's step."""
    model = ToyModel(kv_heads=2, q_heads=6, layers=1)
    plan = make_plan(model.shape, toy_profile_of(model), "spectral", 2)
    q, (k, v) = model.queries(1, 2144, 2), model.sample(1, 2144, 2)
    q, k, v = map(mx.array, (q, k, v))
    outputs = []
    for kernels in (ops.kernels, None):
        monkeypatch.setattr(ops, "kernels", kernels)
        store = LayerCache(ops, make_codec(ops, plan, 0), 4, 60)
        assert isinstance(store.codec.kernel, fast.LatentStep) == (kernels is not None)
        store.start(2, [0, 30])
        store.append(k[:, :, :2080], v[:, :, :2080])
        steps = [slice(t, t + 8) for t in range(2080, 2144, 8)]
        outputs.append(
            mx.concatenate([store.attend(q[:, :, t], k[:, :, t], v[:, :, t], 0.125, None) for t in steps], 2)
        )
    assert_close("output", *map(ops.to_numpy, outputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scores", [2**26, 2**18])
def test_a_later_part_of_a_prompt_attends_to_one_chunk_at_a_time(monkeypatch, dtype, scores):
    """As to the whole history at once, with left padding and staged chunks; queries in one block or in several."""
    monkeypatch.setattr(blocks, "SCORES", scores)
    model = ToyModel(kv_heads=2, q_heads=6, layers=1)
    plan = make_plan(model.shape, toy_profile_of(model), "spectral", 2)
    q, (k, v) = model.queries(1, 2200, 2), model.sample(1, 2200, 2)
    q, k, v = (mx.array(x).astype(getattr(mx, dtype)) for x in (q, k, v))
    outputs, decoded, whole = [], [], PaddingGroup.dense
    monkeypatch.setattr(PaddingGroup, "dense", lambda *a: decoded.append(1) or whole(*a))
    for kernels in (ops.kernels, None):
        monkeypatch.setattr(ops, "kernels", kernels)
        store = LayerCache(ops, make_codec(ops, plan, 0), 4, 64, lambda: make_codec(ops, plan.staging, 0))
        store.start(2, [0, 30])
        parts = [slice(0, 1300), slice(1300, 1900), slice(1900, 2200)]
        outputs.append([store.attend(q[:, :, p], k[:, :, p], v[:, :, p], 0.125, fused) for p in parts])
        assert store.is_staged
        assert len(decoded) == (4 if kernels is None else 0)
    for got, expected in zip(*outputs):
        assert got.dtype == expected.dtype
        assert_close("output", ops.to_numpy(got), ops.to_numpy(expected), dtype)


def test_no_more_scores_at_a_time_than_allowed(monkeypatch):
    """Nor any other block: what is there when a block has been computed is the result of those before."""
    monkeypatch.setattr(blocks, "SCORES", 2**16)
    q, (k, v) = ToyModel(64, 1, 2, 1).queries(1, 1024), ToyModel(64, 1, 2, 1).sample(1, 1024)
    q, k, v = map(mx.array, (q, k, v))
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = blocks.partial_attention(q, k, v, 0.125)
    mx.eval(out)
    assert mx.get_peak_memory() - before < 5 * q.nbytes + 4 * 2**16 < 2 * 1024 * 1024 * 4
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125)
    assert_close("output", np.array(out[0] / out[2]).reshape(q.shape), np.array(expected))


def fused(q, k, v, scale):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def test_a_longer_history_takes_no_more_operations(monkeypatch):
    """Three chunks in one tile as many as two, and a third tile no more than the second, with which sums begin."""
    monkeypatch.setitem(fast.TILE_CHUNKS, "cpu", 3)
    case = Case(0, 64, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 3), 0)
    step, chunks, given = decode_step(codec), chunks_of(codec, case, [CHUNK_TOKENS] * 9), inputs(case)

    def operations(count: int) -> int:
        mx.eval(step(chunks[:count], *given, 0.125))  # joins
        graph = io.StringIO()
        mx.export_to_dot(graph, step(chunks[:count], *given, 0.125))
        return graph.getvalue().count("shape=rectangle")

    two, three, six, nine = map(operations, (2, 3, 6, 9))
    assert 0 < two == three < six
    assert 0 < nine - six <= six - three

"""The MLX backend on a Metal device, against NumPy on the processor: the workflow on a Mac runs these, `make test-metal`.

Elsewhere they are skipped. `test_mlx_kernels.py` takes the same paths in MLX's CPU build.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import CASES, Case, ToyModel, codes_of, plan_of, toy_profile_of
from cases import attention as plain_attention
from tolerances import ATTENTION_RMS, assert_close, assert_codes_close

mx = pytest.importorskip("mlx.core")

from spectral_kv_core.arrays import attention  # noqa: E402
from spectral_kv_core.arrays import ops as core_ops  # noqa: E402
from spectral_kv_core.cache.layer_cache import LayerCache  # noqa: E402
from spectral_kv_core.codecs.registry import make_codec, make_plan  # noqa: E402
from spectral_kv_core.planning.budget import CHUNK_TOKENS  # noqa: E402
from spectral_kv_core.planning.methods import QUANTIZERS  # noqa: E402
from spectral_kv_mlx import ops  # noqa: E402
from spectral_kv_mlx.kernels import blocks, decode_step, rows  # noqa: E402

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(not mx.metal.is_available(), reason="MLX finds no Metal device here"),
]

SCALE = 0.125


def chunks_of(codec, case: Case, sizes: list[int]) -> list:
    """Chunks of `sizes` tokens that follow each other from position 4 on."""
    keys, values = case.model.sample(1, sum(sizes), case.batch)
    stops = np.cumsum(sizes)
    parts = [slice(stop - size, stop) for size, stop in zip(sizes, stops)]
    return [codec.encode(keys[:, :, p], values[:, :, p], 4 + p.start) for p in parts]


def inputs(case: Case, length: int = 1, exact: int = 20) -> list[np.ndarray]:
    """Queries of `length` tokens, and keys and values of the `exact` tokens that they end."""
    return [case.model.queries(1, length, case.batch), *case.model.sample(2, exact, case.batch)]


def assert_step(case: Case, bits: float, sizes: list[int], dtype: str = "float32", quantizer="scalar", **options):
    """A decode step on the device equals NumPy's from the same codes."""
    plan = plan_of(case.model, bits, quantizer=quantizer)
    ours, theirs = (make_codec(xp, plan, 0) for xp in (ops, core_ops))
    chunks = chunks_of(theirs, case, sizes)
    given = [mx.array(x).astype(getattr(mx, dtype)) for x in inputs(case, **options)]
    expected = attention.decode_step(core_ops, theirs, chunks, *map(ops.to_numpy, given), SCALE)
    moved = [replace(chunk, arrays=tuple(map(mx.array, chunk.arrays))) for chunk in chunks]
    got = decode_step(ours)(moved, *given, SCALE)
    assert got.dtype == given[0].dtype
    assert_close("output", ops.to_numpy(got), expected, dtype)


def test_what_follows_runs_on_the_gpu():
    assert mx.default_device() == mx.Device(mx.gpu) and rows.on_gpu()
    assert decode_step(make_codec(ops, plan_of(ToyModel(), 2), 0)) is not None
    assert not blocks.supports_partial_attention(None)


@pytest.mark.parametrize("case", CASES[-4:], ids=lambda case: case.id)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [0.5, 2, 3, 6])
def test_a_step_equals_numpy(case, bits, quantizer):
    assert_step(case, bits, [CHUNK_TOKENS, 336], quantizer=quantizer)


@pytest.mark.parametrize("chunks", [1, 2, 8, 9])
def test_any_number_of_chunks(chunks):
    assert_step(Case(0, 32, 1, 2), 2, [CHUNK_TOKENS] * chunks + [48])


@pytest.mark.parametrize("blocks", [1, 7, 8, 13, 63])
def test_a_last_chunk_of_any_number_of_blocks(blocks):
    assert_step(Case(0, 64, 2, 6, batch=2), 3, [CHUNK_TOKENS, 16 * blocks])


@pytest.mark.parametrize("q_heads, length", [(1, 1), (5, 1), (7, 3), (2, 16)])
def test_any_number_of_query_rows_and_new_tokens(q_heads, length):
    assert_step(Case(0, 64, 1, q_heads, batch=2), 2, [1024, 1024, 48], length=length, exact=length + 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3])
def test_half_precision(dtype, bits):
    assert_step(Case(0, 128, 2, 8), bits, [1024, 112], dtype=dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [2**26, 2**16])
def test_partial_attention_equals_numpy(monkeypatch, causal, scores):
    monkeypatch.setattr(blocks, "SCORES", scores)
    model = ToyModel(kv_heads=2, q_heads=6)
    queries, (keys, values) = model.queries(1, 300, 2), model.sample(1, 300, 2)
    got, _, weights = blocks.partial_attention(*map(mx.array, (queries, keys, values)), SCALE, causal)
    if causal:
        expected = plain_attention(queries, keys, values, SCALE)
    else:
        rows_of_queries = attention.group_queries(queries, model.kv_heads)
        expected, _, total = attention.dense_partial(core_ops, rows_of_queries, keys, values, SCALE)
        expected = (expected / total).reshape(queries.shape)
    assert_close("output", np.array(got / weights).reshape(queries.shape), expected)


@pytest.mark.parametrize("group, rope", [("head", "post"), ("layer", "pre")])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_and_decoded_values_equal_numpy(group, rope, quantizer):
    case = Case(0, 64, 2, 4, batch=2)
    plan = plan_of(case.model, 3, group, rope, quantizer=quantizer)
    ours, theirs = (make_codec(xp, plan, 0) for xp in (ops, core_ops))
    keys, values = case.model.sample(1, 512, case.batch)
    got, expected = ours.encode(mx.array(keys), mx.array(values), 4), theirs.encode(keys, values, 4)
    if quantizer == "scalar":  # a trellis may take another path of the same cost
        assert_codes_close("codes", codes_of(ours, got), codes_of(theirs, expected))
    moved = replace(expected, arrays=tuple(map(mx.array, expected.arrays)))
    for side, a, b in zip(("keys", "values"), ours.decode(moved), theirs.decode(expected)):
        assert_close(side, ops.to_numpy(a), b)


def test_a_cache_attends_to_what_it_holds():
    """Behind a prompt, token by token over the end of a chunk."""
    model = ToyModel(kv_heads=2, q_heads=6, layers=1)
    store = LayerCache(ops, make_codec(ops, make_plan(model.shape, toy_profile_of(model), "spectral", 4), 0), 4, 64)
    q, k, v = map(mx.array, (model.queries(1, 1160), *model.sample(1, 1160)))
    store.append(k[:, :, :1080], v[:, :, :1080])
    for start in range(1080, 1160, 4):
        step = slice(start, start + 4)
        held = [mx.concatenate([x, new[:, :, step]], axis=2) for x, new in zip(store.dense(), (k, v))]
        expected = plain_attention(ops.to_numpy(q[:, :, step]), *map(ops.to_numpy, held), SCALE)
        got = store.attend(q[:, :, step], k[:, :, step], v[:, :, step], SCALE, None)
        assert_close("output", ops.to_numpy(got), expected, limit=ATTENTION_RMS)
    assert store.seen == 1160

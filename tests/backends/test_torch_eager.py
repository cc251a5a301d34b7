"""The decode step of the PyTorch backend without a kernel: equal to the core's, however chunks are joined, codes held once."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from cases import Case, ToyModel, codes_of, every_case, plan_of, toy_profile_of
from tolerances import assert_close

torch = pytest.importorskip("torch")

from spectral_kv_core.arrays import attention  # noqa: E402
from spectral_kv_core.cache.layer_cache import LayerCache  # noqa: E402
from spectral_kv_core.codecs.registry import make_codec, make_plan  # noqa: E402
from spectral_kv_core.planning.budget import CHUNK_TOKENS  # noqa: E402
from spectral_kv_torch import ops  # noqa: E402
from spectral_kv_torch.cache import storages  # noqa: E402
from spectral_kv_torch.kernels import eager, products  # noqa: E402
from spectral_kv_torch.kernels.eager import EagerStep  # noqa: E402


@pytest.fixture(params=["integers", "decoded", "card"])
def way(request, monkeypatch):
    """Products of integers, of decoded coefficients where a processor has no sound ones, and the core's joined chunks."""
    if request.param == "integers" and not products.has_integer_products():
        pytest.skip("torch has no products of 8-bit integers here")
    if request.param == "decoded":
        monkeypatch.setattr(products, "has_integer_products", lambda: False)
    if request.param == "card":
        monkeypatch.setattr(eager, "multiplies", lambda device: False)
    return request.param


def chunks_of(codec, case: Case, sizes: list[int]) -> list:
    keys, values = map(torch.from_numpy, case.model.sample(1, sum(sizes), case.batch))
    stops = np.cumsum(sizes)
    return [codec.encode(keys[:, :, b - n : b], values[:, :, b - n : b], 4 + b - n) for n, b in zip(sizes, stops)]


def inputs(case: Case, length: int = 1, exact: int = 9, dtype=torch.float32) -> list:
    """Queries of `length` tokens at the end of `exact` exact tokens."""
    arrays = (case.model.queries(1, length, case.batch), *case.model.sample(2, exact, case.batch))
    return [torch.from_numpy(x).to(dtype) for x in arrays]


def assert_step(
    codec, case: Case, sizes: list[int], scale: float = 0.125, dtype: str = "float32", limit=None, **options
):
    chunks, given = chunks_of(codec, case, sizes), inputs(case, dtype=getattr(torch, dtype), **options)
    expected = attention.decode_step(ops, codec, chunks, *given, scale)
    step = EagerStep(codec)
    for _ in range(2):  # chunks as they came, and as views of tiles
        got = step(chunks, *given, scale)
        assert got.dtype == given[0].dtype
        assert_close("output", got.float(), expected.float(), dtype, limit)


@every_case
@pytest.mark.parametrize("bits", [0.5, 1, 2, 3.7, 6, 8])
def test_a_step_equals_the_core(way, case, bits):
    tokens = max(case.tokens // 16 * 16, 16)
    sizes = [CHUNK_TOKENS] * (tokens // CHUNK_TOKENS) + [tokens % CHUNK_TOKENS]
    assert_step(make_codec(ops, plan_of(case.model, bits), 0), case, sizes)


@pytest.mark.parametrize("bits", [0.5, 2, 6])
def test_codes_of_a_trellis(way, bits):
    """Some of which are coupled with rows of other heads."""
    case = Case(0, 64, 2, 4, batch=2)
    assert_step(make_codec(ops, plan_of(case.model, bits, quantizer="trellis"), 0), case, [1024, 1024, 48, 208])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_every_width_alone(way, bits):
    """A row in every segment, so that nothing has to be filled up."""
    case = Case(0, 64, 2, 6)
    plan = plan_of(case.model, 2)
    codec = make_codec(ops, replace(plan, widths=np.full_like(plan.widths, bits)), 0)
    assert codec.bits == [bits]
    assert_step(codec, case, [1024, 400])


@pytest.mark.parametrize("blocks", range(1, 65, 3))
def test_a_last_chunk_of_any_number_of_blocks(way, blocks):
    case = Case(0, 64, 2, 6, batch=2)
    assert_step(make_codec(ops, plan_of(case.model, 2), 0), case, [CHUNK_TOKENS, 16 * blocks])


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_any_number_of_chunks(way, monkeypatch, chunks):
    """In tiles of three; codes that wait for their unit in the middle too."""
    monkeypatch.setattr(eager, "TILE_CHUNKS", 3)
    case = Case(0, 32, 1, 2)
    assert_step(make_codec(ops, plan_of(case.model, 2), 0), case, [CHUNK_TOKENS] * chunks + [48, 208])


@pytest.mark.parametrize("q_heads, length", [(1, 1), (2, 1), (3, 1), (5, 1), (7, 3), (2, 16)])
def test_any_number_of_query_rows_and_new_tokens(way, q_heads, length):
    case = Case(0, 64, 1, q_heads, batch=2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    assert_step(codec, case, [1024, 1024, 48], length=length, exact=length + 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(way, dtype):
    assert_step(make_codec(ops, plan_of(ToyModel(128, 2, 8, 1), 2), 0), Case(0, 128, 2, 8), [1024, 112], dtype=dtype)


def test_scores_far_apart_and_weights_far_below_them(way):
    case = Case(0, 64, 2, 4)
    codec = make_codec(ops, plan_of(case.model, 3), 0)
    assert_step(codec, case, [1024, 1024], scale=30.0, length=4, limit=1e-4)  # exp(score) would leave float32


@pytest.mark.parametrize("side", [slice(0, 2), slice(2, 4), slice(0, 4)], ids=["keys", "values", "both"])
def test_a_side_without_any_bits(way, side):
    case = Case(0, 64, 2, 4)
    plan = plan_of(case.model, 2)
    widths = plan.widths.copy()
    widths[:, side] = 0
    assert_step(make_codec(ops, replace(plan, widths=widths), 0), case, [1024, 64])


def test_a_head_without_any_bits(way):
    case = Case(0, 64, 2, 4)
    plan = plan_of(case.model, 2)
    widths = plan.widths.copy()
    widths[:, [0, 3]] = 0
    assert_step(make_codec(ops, replace(plan, widths=widths), 0), case, [1024, 64])


def test_a_model_that_is_not_told_to_do_without_gradients(way):
    case = Case(0, 64, 2, 4)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    chunks, (queries, keys, values) = chunks_of(codec, case, [1024]), inputs(case)
    expected = attention.decode_step(ops, codec, chunks, queries, keys, values, 0.125)
    assert_close("output", EagerStep(codec)(chunks, queries.requires_grad_(), keys, values, 0.125).detach(), expected)


def test_joined_codes_are_held_once(way, monkeypatch):
    monkeypatch.setattr(eager, "TILE_CHUNKS", 2)
    case = Case(0, 64, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    chunks, given = chunks_of(codec, case, [CHUNK_TOKENS] * 3 + [208]), inputs(case)
    before = [codes_of(codec, chunk) for chunk in chunks]
    held = sum(storages(x for chunk in chunks for x in chunk.arrays).values())
    step = EagerStep(codec)
    for count in (1, 2, 3, 4, 4):
        step(chunks[:count], *given, 0.125)
    assert all(np.array_equal(codes_of(codec, chunk), old) for chunk, old in zip(chunks, before))
    now = sum(storages(x for chunk in chunks for x in chunk.arrays).values())
    assert held <= now < 1.2 * held  # rows end in whole words, and the last unit is there as it waits
    assert len(step._tiles._made) == (2 if way != "card" else 1)
    chunks.clear()
    assert len(step._tiles._made) == 0


def test_another_chunk_in_the_middle(way):
    case = Case(0, 64, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    chunks, given = chunks_of(codec, case, [CHUNK_TOKENS] * 3), inputs(case)
    other = chunks_of(codec, replace(case, batch=2), [CHUNK_TOKENS])[0]
    step = EagerStep(codec)
    step(chunks, *given, 0.125)
    chunks[1] = replace(other, batch=1, arrays=tuple(x[1:] for x in other.arrays))
    expected = attention.decode_step(ops, codec, chunks, *given, 0.125)
    assert_close("output", step(chunks, *given, 0.125), expected)


def test_a_cache_with_left_padding(way, monkeypatch):
    """Token by token behind a prompt, over the end of a chunk, then copied, cropped and selected; as with the core's step."""
    monkeypatch.setattr(eager, "TILE_CHUNKS", 2)
    model = ToyModel(kv_heads=2, q_heads=6, layers=1)
    plan = make_plan(model.shape, toy_profile_of(model), "spectral", 2)
    q, (k, v) = model.queries(1, 2200, 2), model.sample(1, 2200, 2)
    q, k, v = map(torch.from_numpy, (q, k, v))
    outputs = []
    for fast in (True, False):
        codec = make_codec(ops, plan, 0)
        codec.kernel = EagerStep(codec) if fast else None
        store = LayerCache(ops, codec, 4, 60)
        store.start(2, [0, 30])
        store.append(k[:, :, :2080], v[:, :, :2080])

        def read(store, start, stop, step=8):
            at = [slice(t, t + step) for t in range(start, stop, step)]
            return [store.attend(q[:, :, t], k[:, :, t], v[:, :, t], 0.125, None) for t in at]

        made = read(store, 2080, 2144)
        other = copy.deepcopy(store)
        made += read(other, 2160, 2200)  # another continuation, from the same tile
        made += read(store, 2144, 2200)
        store.crop(150)
        made += read(store, 2050, 2200, 15)
        store.select([1, 0])
        made += read(store, 2160, 2200)
        outputs.append(torch.cat(made, dim=2))
    assert_close("output", *outputs)

"""The C kernels of the PyTorch backend: equal to the stock operations, and what happens where they cannot be built."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from cases import Case, ToyModel, every_case, plan_of, toy_profile_of
from tolerances import assert_close

torch = pytest.importorskip("torch")

from spectral_kv_core.arrays import attention  # noqa: E402
from spectral_kv_core.cache.layer_cache import LayerCache  # noqa: E402
from spectral_kv_core.cache.padding_group import PaddingGroup  # noqa: E402
from spectral_kv_core.codecs.registry import make_codec, make_plan  # noqa: E402
from spectral_kv_core.native import loader, toolchain  # noqa: E402
from spectral_kv_core.planning.budget import CHUNK_TOKENS  # noqa: E402
from spectral_kv_core.planning.cache_plan import cache_plan  # noqa: E402
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS  # noqa: E402
from spectral_kv_core.quantization.time_rounding import round_in_time  # noqa: E402
from spectral_kv_core.quantization.trellis import WIDTHS  # noqa: E402
from spectral_kv_torch import ops  # noqa: E402
from spectral_kv_torch.kernels import build, checked, decode_step, flash, packing  # noqa: E402
from spectral_kv_torch.kernels.attention import LatentStep  # noqa: E402
from spectral_kv_torch.kernels.eager import EagerStep  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


VARIANTS = {"native": toolchain.NATIVE, "avx2": (("-march=x86-64-v3",),), "portable": ((),)}


@pytest.fixture(params=VARIANTS)
def kernels(request, monkeypatch, tmp_path_factory):
    """Kernels for this processor, for older ones of its kind, and without vector instructions of any one kind."""
    if request.param == "avx2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("not an x86 processor with AVX2")
    if request.param != "native":
        monkeypatch.setattr(toolchain, "NATIVE", VARIANTS[request.param])
        folder = tmp_path_factory.getbasetemp() / "kernels"  # built once
        monkeypatch.setenv("SPECTRALKV_CACHE", str(folder))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.fixture(params=["scalar", "trellis"])
def quantizer(request):
    return request.param


def codec_of(model: ToyModel, bits: float, quantizer: str = "scalar", widths=None):
    """Codec of a toy model; `widths`: of its coefficients, in place of those of a plan of `bits` bits."""
    plan = plan_of(model, bits, quantizer=quantizer)
    return make_codec(ops, plan if widths is None else replace(plan, widths=widths(plan.widths)), 0)


def chunks_of(codec, case: Case, sizes: list[int]) -> list:
    keys, values = map(torch.from_numpy, case.model.sample(1, sum(sizes), case.batch))
    stops = np.cumsum(sizes)
    return [
        codec.encode(keys[:, :, b - n : b], values[:, :, b - n : b], 4 + b - n) for n, b in zip(sizes, stops.tolist())
    ]


def both(codec, case: Case, sizes: list[int], length: int = 1, exact: int = 9, dtype=torch.float32) -> tuple:
    """The kernel's output and that of stock operations."""
    queries = torch.from_numpy(case.model.queries(1, length, case.batch)).to(dtype)
    keys, values = (torch.from_numpy(x).to(dtype) for x in case.model.sample(2, exact, case.batch))
    chunks, scale = chunks_of(codec, case, sizes), case.head_dim**-0.5
    step = codec.kernel
    assert isinstance(step, LatentStep)
    expected = attention.decode_step(ops, codec, chunks, queries, keys, values, scale)
    return step(chunks, queries, keys, values, scale), expected


@needs_compiler
@every_case
@pytest.mark.parametrize("bits", [0.5, 2, 3.7, 6, 8])
def test_a_step_equals_stock_operations(kernels, case, bits, quantizer):
    codec = codec_of(case.model, bits, quantizer)
    tokens = max(case.tokens // 16 * 16, 16)
    sizes = [CHUNK_TOKENS] * (tokens // CHUNK_TOKENS) + [tokens % CHUNK_TOKENS]
    assert_close("output", *both(codec, case, sizes))


@needs_compiler
@pytest.mark.parametrize("blocks", range(1, 65, 3))
def test_a_chunk_of_any_number_of_blocks(kernels, blocks, quantizer):
    """Whole vectors, an odd unit, and codes that wait for their unit."""
    case = Case(0, 64, 2, 6, batch=2)
    codec = codec_of(case.model, 3, quantizer, lambda widths: some_widths(widths, BIT_WIDTHS))
    assert_close("output", *both(codec, case, [1024, 16 * blocks]))


@needs_compiler
@pytest.mark.parametrize("bits", [*BIT_WIDTHS[1:], "high"])
def test_every_width_alone(kernels, bits, quantizer):
    """And none of those that a trellis couples."""
    case = Case(0, 64, 1, 4, batch=2)
    codec = codec_of(
        case.model, 2, quantizer, lambda widths: some_widths(widths, (0, 5, 6, 8) if bits == "high" else (bits,))
    )
    assert codec.coupled == (quantizer == "trellis" and bits in WIDTHS)
    assert_close("output", *both(codec, case, [1024, 16 * 13, 16 * 44]))


def some_widths(widths, choices):
    return np.random.default_rng(0).choice(choices, widths.shape).astype(np.uint8)


@needs_compiler
@pytest.mark.parametrize("batch, chunks", [(1, 1), (1, 9), (2, 9), (3, 5)])
def test_path_rows_of_some_chunks_at_a_time(kernels, batch, chunks):
    """With one thread and one KV head, those of 16 chunks at most; of several sequences in turn."""
    case = Case(0, 32, 1, 2, batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_close("output", *both(codec_of(case.model, 2, "trellis"), case, [CHUNK_TOKENS] * chunks + [272]))
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("q_heads, length", [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 3), (2, 16)])
def test_any_number_of_query_rows_and_new_tokens(kernels, q_heads, length, quantizer):
    case = Case(0, 64, 1, q_heads, batch=2)
    codec = codec_of(case.model, 2, quantizer)
    assert_close("output", *both(codec, case, [1024] * 5 + [48], length, exact=length + 3))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_dtype(kernels, dtype, quantizer):
    case = Case(0, 128, 2, 8)
    got, expected = both(codec_of(case.model, 2, quantizer), case, [1024, 112], dtype=getattr(torch, dtype))
    assert got.dtype == expected.dtype == getattr(torch, dtype)
    assert_close("output", got.float(), expected.float(), dtype)


@needs_compiler
def test_scores_far_apart_and_a_masked_future(kernels, quantizer):
    case = Case(0, 64, 2, 4)
    codec = codec_of(case.model, 3, quantizer)
    chunks, scale = chunks_of(codec, case, [1024, 1024]), 3.0  # exp(score) would leave the range of float32
    queries = 20 * torch.from_numpy(case.model.queries(1, 4))
    keys, values = map(torch.from_numpy, case.model.sample(2, 6))
    got = decode_step(codec)(chunks, queries, keys, values, scale)
    assert got.isfinite().all()
    assert_close("output", got, attention.decode_step(ops, codec, chunks, queries, keys, values, scale), limit=1e-4)


@needs_compiler
def test_a_layer_without_any_bits_attends_to_its_means(kernels, quantizer):
    case = Case(0, 64, 1, 2)
    codec = codec_of(case.model, 0.25, quantizer, np.zeros_like)
    assert codec.bits == []
    assert_close("output", *both(codec, case, [64]))


@pytest.mark.slow
@needs_compiler
def test_the_kernel_is_built_once_and_its_tables_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path))
    build.library.cache_clear()
    try:
        assert build.library() is not None
        built = list((tmp_path / "kernels").glob("*.so"))
        build.library.cache_clear()
        monkeypatch.setattr(loader, "_compile", lambda *a: pytest.fail("built twice"))
        assert build.library() is not None
        assert len(built) == 1
    finally:
        build.library.cache_clear()
    codec = make_codec(ops, plan_of(ToyModel(), 3), 0)
    tables = decode_step(codec).tables()
    rows = sum(len(x) for x in codec.numbers)
    assert sum(x.nbytes for x in tables if x.dtype == torch.int16) == 2 * rows


def test_stock_operations_take_over_without_kernels(monkeypatch, tmp_path):
    codec = make_codec(ops, plan_of(ToyModel(), 3), 0)
    build.library.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("SPECTRALKV_KERNELS", "0")
            assert isinstance(decode_step(codec), EagerStep)
        build.library.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(toolchain.shutil, "which", lambda name: None)
            assert isinstance(decode_step(codec), EagerStep)
        build.library.cache_clear()
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho 'fatal: no memory' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path))
        with pytest.warns(UserWarning, match="fatal: no memory.*stock operations"):
            assert isinstance(decode_step(codec), EagerStep)
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            assert isinstance(decode_step(codec), EagerStep)
    finally:
        build.library.cache_clear()


def test_other_codecs_have_no_kernel():
    assert decode_step(None) is None
    assert decode_step(make_codec(ops, plan_of(ToyModel(), 3, "layer", "pre"), 0)) is None


@needs_compiler
@pytest.mark.parametrize("group, rope", [("head", "post"), ("layer", "pre")])
@pytest.mark.parametrize("bits", [0.5, 2, 6])
def test_time_rounding_gives_the_codes_of_stock_operations(kernels, monkeypatch, group, rope, bits):
    codec = make_codec(ops, plan_of(ToyModel(), bits, group, rope, "expected-attention"), 0)
    z, weights = codec.coefficients(*map(torch.from_numpy, ToyModel().sample(1, 2048, 2)), 4)
    assert build.library() is not None
    got = round_in_time(ops, z, weights, codec.gain, codec.time, codec.quantizers)
    monkeypatch.setattr(ops, "kernels", None)
    expected = round_in_time(ops, z, weights, codec.gain, codec.time, codec.quantizers)
    assert (got != codec.quantizers.quantize(z)).float().mean() > 0.01  # rounding to the nearest is something else
    assert np.count_nonzero(got != expected) <= max(1, got.numel() // 10_000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_part_of_a_prompt_attends_to_one_chunk_at_a_time(monkeypatch, dtype):
    """As to the whole history at once, with left padding and staged chunks."""
    model = ToyModel(kv_heads=2, q_heads=6, layers=1)
    plan = make_plan(model.shape, toy_profile_of(model), "spectral", 2)
    q, (k, v) = model.queries(1, 3000, 2), model.sample(1, 3000, 2)
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (q, k, v))
    outputs, decoded, whole = [], [], PaddingGroup.dense
    monkeypatch.setattr(PaddingGroup, "dense", lambda *a: decoded.append(1) or whole(*a))
    for kernels in (ops.kernels, None):
        monkeypatch.setattr(ops, "kernels", kernels)
        store = LayerCache(ops, make_codec(ops, plan, 0), 4, 64, lambda: make_codec(ops, plan.staging, 0))
        store.start(2, [0, 30])
        parts = [slice(0, 1300), slice(1300, 2500), slice(2500, 3000)]
        outputs.append([store.attend(q[:, :, p], k[:, :, p], v[:, :, p], 0.125, fused) for p in parts])
        assert store.is_staged
        assert len(decoded) == (4 if kernels is None else 0)
    for got, expected in zip(*outputs):
        assert_close("output", got.float(), expected.float(), dtype)


def test_a_later_part_of_a_prompt_where_nothing_is_exact():
    model = ToyModel(layers=1)
    store = LayerCache(ops, make_codec(ops, plan_of(model, 3), 0), 0, 0)
    q, (k, v) = torch.from_numpy(model.queries(1, 128)), map(torch.from_numpy, model.sample(1, 128))
    for p in (slice(0, 64), slice(64, 128)):
        got = store.attend(q[:, :, p], k[:, :, p], v[:, :, p], 0.125, fused)
    held_k, held_v = store.dense()
    held_k[:, :, 64:], held_v[:, :, 64:] = k[:, :, 64:], v[:, :, 64:]
    assert_close("output", got, fused(q[:, :, 64:], held_k, held_v, 0.125))


def fused(q, k, v, scale):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("fault", [None, "wrong", "raises"])
def test_a_kernel_not_seen_on_a_card_is_checked_at_its_first_step(monkeypatch, fault):
    monkeypatch.setattr(checked, "OF_PROCESS", checked.Verdicts())
    case = Case(0, 64, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    calls = []

    def kernel(*call):
        calls.append(1)
        if fault == "raises":
            raise RuntimeError("out of resources")
        return attention.decode_step(ops, codec, *call) * (1.1 if fault else 1)

    step = checked.CheckedStep(ops, codec, kernel)
    call = (chunks_of(codec, case, [64]), torch.from_numpy(case.model.queries(1, 1)), *exact(case), 0.125)
    expected = attention.decode_step(ops, codec, *call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_close("output", step(*call), expected)
    assert len(calls) == (1 if fault else 3)
    assert [str(w.message).split(" on cpu")[0] for w in caught] == {
        None: [],
        "wrong": ["spectralkv's kernel for attention differs by 10.0%"],
        "raises": ["spectralkv's kernel for attention fails: out of resources"],
    }[fault]


def test_layers_of_other_ranks_share_a_check(monkeypatch):
    monkeypatch.setattr(checked, "OF_PROCESS", checked.Verdicts())
    ranks = set()
    for bits in (0.5, 2):
        codec = make_codec(ops, plan_of(ToyModel(), bits, "layer", "pre"), 0)
        codes = codec.choose(*map(torch.from_numpy, ToyModel().sample(1, 32)), 4)
        got = packing.CheckedPacker(codec, codec.pack)(codes)
        assert all(torch.equal(*pair) for pair in zip(got, codec.pack(codes), strict=True))
        ranks.add(codec.rank)
    assert len(ranks) == 2 and list(checked.OF_PROCESS.known.values()) == [True]


def exact(case: Case) -> tuple:
    return tuple(map(torch.from_numpy, case.model.sample(2, 9)))


def test_caches_of_one_plan_share_their_codecs():
    plans = [cache_plan(plan_of(ToyModel(), 2)) for _ in range(2)]
    first, second = (plan.codecs(ops, torch.device("cpu")) for plan in plans)
    assert first is second and len(first) == ToyModel().layers


@pytest.mark.parametrize("fault", [None, "wrong"])
@pytest.mark.parametrize("causal", [True, False])
def test_partial_attention_on_a_card(monkeypatch, fault, causal):
    """The call and what comes back, by a stand-in for the operation that CPUs do not have."""
    pretend_a_card(monkeypatch, 1.1 if fault else 1)
    queries = torch.randn(2, 6, 40, 64).bfloat16()
    keys, values = (torch.randn(2, 2, 40 if causal else 100, 64).bfloat16() for _ in range(2))
    assert flash.supports_partial_attention(queries) and not flash.supports_partial_attention(queries.float())
    rows = attention.group_queries(queries, 2).float()
    mask = attention.causal_mask(ops, 3, 40, 40, queries) if causal else None
    expected = attention.dense_partial(ops, rows, keys.float(), values.float(), 0.125, mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            o, m, l = flash.partial_attention(queries, keys, values, 0.125, causal)
            assert_close("output", o / l, expected[0] / expected[2], "bfloat16")
            assert_close("log-sum-exp", m + l.log(), expected[1] + expected[2].log(), "bfloat16")
    assert len(caught) == (1 if fault else 0)
    assert flash.supports_partial_attention(queries) == (fault is None)


def test_causal_attention_on_a_card(monkeypatch):
    """The last queries of more keys, of which those that are sealed are decoded at once."""
    pretend_a_card(monkeypatch)
    model = ToyModel(q_heads=6, layers=1)
    q, (k, v) = model.queries(1, 300), model.sample(1, 300)
    q, k, v = (torch.from_numpy(x).bfloat16() for x in (q, k, v))
    outputs = []
    for many in (False, True):
        codec = make_codec(ops, plan_of(model, 2), 0)
        codec.decoder = Chunkwise(codec) if many else None
        store = LayerCache(ops, codec, 4, 64)
        parts = [slice(0, 200), slice(200, 300)]
        outputs.append([store.attend(q[:, :, p], k[:, :, p], v[:, :, p], 0.125, flash.causal_attention) for p in parts])
    for got, expected in zip(*outputs):
        assert_close("output", got.float(), expected.float(), "bfloat16")


class Chunkwise:
    """A decoder of several chunks."""

    def __init__(self, codec):
        self.codec = codec

    def __call__(self, chunks, dtype):
        return ([x.to(dtype) for x in self.codec.decode(chunk)] for chunk in chunks)


def pretend_a_card(monkeypatch, factor: float = 1) -> None:
    """A stand-in for the operation of torch that CPUs do not have, of which a fault is the `factor`."""

    def attention_on_card(queries, keys, values, dropout, is_causal, debug, scale):
        assert (dropout, debug) == (0.0, False)
        keys, values = (x.float().repeat_interleave(queries.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = queries.float() @ keys.mT * scale
        if is_causal:
            future = torch.ones_like(scores).triu(1 + keys.shape[2] - queries.shape[2]).bool()
            scores = scores.masked_fill(future, -torch.inf)
        return (scores.softmax(-1) @ values).to(queries.dtype) * factor, scores.logsumexp(-1), None

    monkeypatch.setattr(checked, "OF_PROCESS", checked.Verdicts())
    monkeypatch.setattr(flash, "is_card", lambda device: True)
    monkeypatch.setattr(flash, "runs_kernels", lambda device: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", attention_on_card)

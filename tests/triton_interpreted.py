"""The Triton kernel under Triton's interpreter, on CPU tensors: `test_triton_kernel.py` runs this in its own process.

TRITON_INTERPRET=1 must be set before triton is imported, and holds for everything in a process that uses it. One program
takes up to a third of a second here, so cases are as few and as small as there are ways to go wrong.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, ToyModel, codes_of, plan_of
from test_torch_kernels import chunks_of, codec_of
from tolerances import assert_close, assert_codes_close

from spectral_kv_core.arrays import attention
from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.arrays.rope import rotate as core_rotate
from spectral_kv_core.arrays.transform import to_time
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.codecs import spectral as core_codec
from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.registry import make_codec
from spectral_kv_core.quantization.time_rounding import descend
from spectral_kv_torch import ops
from spectral_kv_torch.kernels import decoding
from spectral_kv_torch.kernels.decoding import Decoder, DenseStep
from spectral_kv_torch.kernels.triton_attention import TritonStep
from spectral_kv_torch.kernels.triton_latents import Latents
from spectral_kv_torch.kernels.triton_packing import Packer
from spectral_kv_torch.kernels.triton_rope import rotate
from spectral_kv_torch.kernels.triton_rounding import round_in_time


def compare(codec, case: Case, sizes: list[int], length: int = 1, exact: int = 9, dtype="float32", stretch=1.0) -> None:
    """The kernel's output with that of stock operations; `stretch` multiplies the queries."""
    queries = torch.from_numpy(case.model.queries(1, length, case.batch)).to(getattr(torch, dtype)) * stretch
    keys, values = (torch.from_numpy(x).to(queries.dtype) for x in case.model.sample(2, exact, case.batch))
    call = chunks_of(codec, case, sizes), queries, keys, values, case.head_dim**-0.5
    got, expected = TritonStep(codec)(*call), attention.decode_step(ops, codec, *call)
    assert got.dtype == queries.dtype and got.isfinite().all()
    assert_close("output", got.float(), expected.float(), dtype)


@pytest.mark.parametrize("bits", [0.5, 3.7, 8])
def test_every_width(bits):
    case = Case(0, 64, 1, 2)
    compare(make_codec(ops, plan_of(case.model, bits), 0), case, [176])


@pytest.mark.parametrize("sizes", [[112], [400], [1024, 1024, 48], [48, 128]], ids=str)
def test_chunks_of_any_number_of_blocks(sizes):
    """Whole units, codes that wait for theirs, and both."""
    case = Case(0, 64, 1, 2)
    compare(make_codec(ops, plan_of(case.model, 2), 0), case, sizes)


def test_a_chunk_of_several_spans_and_a_head_that_is_no_power_of_two():
    case = Case(0, 80, 1, 2)
    compare(make_codec(ops, plan_of(case.model, 3), 0), case, [1024, 672])


@pytest.mark.parametrize("kv_heads, q_heads, batch, length", [(1, 1, 1, 1), (2, 6, 2, 1), (1, 5, 1, 2)])
def test_any_number_of_heads_sequences_and_new_tokens(kv_heads, q_heads, batch, length):
    case = Case(0, 64, kv_heads, q_heads, batch)
    compare(make_codec(ops, plan_of(case.model, 2), 0), case, [48], length, exact=70 + length)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    case = Case(0, 64, 1, 4)
    compare(make_codec(ops, plan_of(case.model, 2), 0), case, [176], dtype=dtype)


def test_scores_far_apart():
    case = Case(0, 64, 1, 2)  # exp(score) would leave the range of float32
    compare(make_codec(ops, plan_of(case.model, 3), 0), case, [128, 128, 16], length=2, stretch=400.0)


def test_a_layer_without_any_bits_attends_to_its_means():
    case = Case(0, 64, 1, 2)
    codec = codec_of(case.model, 0.25, "scalar", np.zeros_like)
    assert codec.bits == []
    compare(codec, case, [176])


def test_a_cache_that_seals_while_it_decodes():
    case = Case(0, 64, 1, 2)
    q, (k, v) = case.model.queries(1, 72), case.model.sample(1, 72)
    q, k, v = map(torch.from_numpy, (q, k, v))
    codec, outputs, step = make_codec(ops, plan_of(case.model, 2), 0), [], None
    for kernel in (True, False):
        store = LayerCache(ops, codec, 4, 16)
        codec.kernel = TritonStep(codec) if kernel else None
        step = codec.kernel or step
        parts = [slice(0, 48), slice(48, 52), slice(52, 54)]
        outputs.append([store.attend(q[:, :, p], k[:, :, p], v[:, :, p], 0.125, fused) for p in parts])
    for got, expected in zip(*outputs):
        assert_close("output", got, expected)
    assert len(step._spans.arrays()) <= 1


def fused(q, k, v, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def test_what_lies_where_is_moved_once_per_sealing_and_counted():
    case = Case(0, 64, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    step, chunks = TritonStep(codec), chunks_of(codec, case, [1024, 48, 16])
    assert sum(x.nbytes for x in step.tables()) == 4 * codec.groups * 16 * (codec.rank + 1)
    table = step._spans.of(chunks)
    assert step._spans.of(list(chunks)) is table
    assert step.tables()[-1] is table and table.nbytes == 4 * 192
    assert step._spans.of(chunks[:2]) is not table
    assert len(step._spans.arrays()) == 1
    del chunks, table
    assert len(step._spans.arrays()) == 0


@pytest.mark.parametrize("bits, sizes, batch", [(0.5, [48], 1), (2, [1024], 1), (3.7, [48], 2), (6, [16], 1)])
def test_the_step_with_a_trellis(bits, sizes, batch):
    """Paths that visit rows of all widths, heads and both sides; spans of two words, and codes that wait for their unit."""
    case = Case(0, 64, 2 if bits < 1 else 1, 2, batch)
    codec = make_codec(ops, plan_of(case.model, bits, quantizer="trellis"), 0)
    assert codec.coupled
    compare(codec, case, sizes)


@pytest.mark.parametrize("bits, batch", [(0.5, 2), (3.7, 1)])
def test_latents_with_a_trellis(bits, batch):
    case = Case(0, 24, 1, 2, batch)
    codec = make_codec(ops, plan_of(case.model, bits, "layer", "pre", "expected-attention", "trellis"), 0)
    chunks, latents = chunks_of(codec, case, [128, 48]), Latents(codec)
    assert_close("latents", latents(chunks, torch.float32), latents_of(codec, chunks))
    tables = latents.tables()
    assert sum(x.nbytes for x in tables) == 4 * (16 * -(-codec.rank // 32) * 33 + 32) + 24 * 8 * 2


def latents_of(codec, chunks) -> torch.Tensor:
    return torch.cat([to_time(ops, codec.spectrum(chunk), codec.time) for chunk in chunks], dim=2)


@pytest.mark.parametrize("bits", [0.5, 3.7, 8])
def test_latents_of_every_width(bits):
    check_latents(Case(0, 24, 1, 2), bits, "layer", "pre")


@pytest.mark.parametrize("group, rope, case", [("side", "pre", Case(0, 40, 1, 2)), ("head", "post", Case(0, 16, 2, 2))])
def test_latents_of_other_groups(group, rope, case):
    check_latents(case, 3, group, rope)


def check_latents(case: Case, bits: float, group: str, rope: str) -> None:
    codec = make_codec(ops, plan_of(case.model, bits, group, rope), 0)
    chunks = chunks_of(codec, case, [128, 48])
    assert_close("latents", Latents(codec)(chunks, torch.float32), latents_of(codec, chunks))


@pytest.mark.parametrize("sizes, dtype", [([16], "float32"), ([128], "bfloat16"), ([400, 48], "float32")], ids=str)
def test_latents_of_any_number_of_blocks(sizes, dtype):
    case = Case(0, 16, 1, 2)
    codec = make_codec(ops, plan_of(case.model, 2), 0)
    chunks = chunks_of(codec, case, sizes)
    got = Latents(codec)(chunks, getattr(torch, dtype))
    assert got.dtype == getattr(torch, dtype)
    assert_close("latents", got.float(), latents_of(codec, chunks), dtype)


def test_latents_of_a_layer_without_any_bits():
    case = Case(0, 64, 1, 2)
    codec = codec_of(case.model, 0.25, "scalar", np.zeros_like)
    assert not Latents(codec)(chunks_of(codec, case, [176]), torch.float32).any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim, rotary, scaling", [(64, 64, 1.0), (80, 48, 1.3)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation(interleaved, dim, rotary, scaling, inverse):
    rope = Rope(tuple(10000.0 ** (-np.arange(0, rotary, 2) / rotary)), interleaved, scaling)
    x = torch.randn(2, 3, 40, dim)
    got = rotate(x.transpose(1, 2).contiguous().transpose(1, 2), rope, 130_000, inverse, torch.float32)
    assert_close("at one place", got, core_rotate(ops, x, rope, 130_000, inverse), limit=1e-6)
    places = torch.randint(0, 4000, (2, 1, 40), dtype=torch.int32).sort(-1).values
    got = rotate(x, rope, places, inverse, torch.float32)
    assert_close("at any place", got, core_rotate(ops, x, rope, places, inverse), limit=1e-6)
    half = rotate(x.bfloat16(), rope, 5, inverse, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_close("in half precision", half.float(), core_rotate(ops, x, rope, 5, inverse), "bfloat16")


@pytest.mark.parametrize(
    "group, rope, case, dtype",
    [
        ("head", "post", Case(0, 64, 1, 2), "float32"),
        ("layer", "pre", Case(0, 64, 2, 4), "float32"),
        ("side", "pre", Case(0, 80, 1, 3), "bfloat16"),
    ],
)
def test_decoded_tiles(monkeypatch, group, rope, case, dtype):
    """As chunk by chunk, and a step over them; with more chunks than a tile takes."""
    monkeypatch.setattr(decoding, "TILE_CHUNKS", 2)
    kind = getattr(torch, dtype)
    quantizer = "trellis" if group == "layer" else "scalar"
    codec = make_codec(ops, plan_of(case.model, 0.4, group, rope, quantizer=quantizer), 0)
    decode = on_card(monkeypatch, codec)
    chunks = chunks_of(codec, case, [128, 16, 32])
    tiles = list(decode(chunks, kind))
    assert [tile[0].shape[2] for tile in tiles] == [144, 32]
    for got, expected in zip(zip(*tiles), zip(*map(codec.decode, chunks))):
        assert got[0].dtype == kind
        assert_close("side", torch.cat(got, dim=2).float(), torch.cat(expected, dim=2), dtype)
    kept = dict(zip((chunks[0], chunks[2]), tiles))  # decoded once: the first chunk of a tile stands for it
    monkeypatch.setattr(decode, "_checked", lambda like, size, some, dtype: kept[some[0]])
    for length, held in ((1, chunks[:2]), (3, chunks)):
        queries = torch.from_numpy(case.model.queries(1, length, case.batch)).to(kind)
        exact = (torch.from_numpy(x).to(kind) for x in case.model.sample(2, 9, case.batch))
        call = held, queries, *exact, case.head_dim**-0.5
        got = DenseStep(codec, decode)(*call)
        assert got.dtype == kind and got.shape == queries.shape
        assert_close("output", got.float(), attention.decode_step(ops, codec, *call).float(), dtype)


def test_decoded_tiles_of_tokens_that_stand_anywhere(monkeypatch):
    case = Case(0, 64, 2, 4, batch=2)
    codec = make_codec(ops, plan_of(case.model, 0.4, "layer", "pre"), 0)
    blocks = torch.tensor([[[0, 2, 3, 7, 9]], [[1, 2, 4, 5, 6]]], dtype=torch.int32)
    chunks = codec.keep(chunks_of(codec, case, [128, 48]), blocks, 48)
    (got,) = on_card(monkeypatch, codec)(chunks, torch.float32)
    for x, expected in zip(got, zip(*map(codec.decode, chunks))):
        assert_close("side", x, torch.cat(expected, dim=2))


def on_card(monkeypatch, codec) -> Decoder:
    """A decoder as a card has it, without the check of its first results."""
    monkeypatch.setattr(decoding, "rotate", lambda *args, dtype: rotate(*args, False, dtype))
    decode = Decoder(codec, Latents(codec))
    monkeypatch.setattr(decode, "_checked", lambda like, size, *args: decode._decode(*args))
    return decode


@pytest.mark.parametrize("group, rope, bits", [("head", "post", 3), ("layer", "pre", 0.5)])
def test_time_rounding(group, rope, bits):
    model = ToyModel(80, kv_heads=1, q_heads=2) if group == "head" else ToyModel(64)
    codec = make_codec(ops, plan_of(model, bits, group, rope, "expected-attention"), 0)
    z, weights = codec.coefficients(*map(torch.from_numpy, model.sample(1, 48, 2)), 4)
    call = z, weights, codec.gain, codec.time, codec.quantizers
    got, expected = round_in_time(*call), descend(ops, *call)
    assert (got != codec.quantizers.quantize(z)).float().mean() > 0.01  # rounding to the nearest is something else
    assert np.count_nonzero(got != expected) <= max(1, got.numel() // 10_000)


@pytest.mark.parametrize("bits, sizes", [(0.5, [1, 2]), (2, [9, 7]), (3.7, [3, 5, 1]), (8, [8, 1])])
def test_packing(bits, sizes):
    """Chunks that grow by any number of blocks, byte by byte as width by width; of a part of more codes."""
    case = Case(0, 16, 1, 2, batch=2 if bits == 0.5 else 1)
    codec = make_codec(ops, plan_of(case.model, bits, "layer", "pre"), 0)
    keys, values = map(torch.from_numpy, case.model.sample(1, 16 * sum(sizes), case.batch))
    codes, packer = codec.choose(keys, values, 4), Packer(codec)
    chunk = expected = None
    for start, n in zip(np.cumsum([0, *sizes]).tolist(), sizes):
        part = codes[:, :, start : start + n]
        got, expected = packer(part, chunk), codec.pack(part, expected and replace(chunk, arrays=expected))
        assert [x.shape for x in got] == [x.shape for x in expected]
        assert all(torch.equal(x, y) for x, y in zip(got, expected))
        chunk = Chunk(case.batch, 4, 16 * (start + n), got)
    elsewhere = replace(chunk, arrays=tuple(x.clone() for x in got))
    assert all(torch.equal(x, y) for x, y in zip(packer(part, elsewhere), packer(part, chunk)))


def test_a_prompt_coded_several_chunks_at_a_time(monkeypatch):
    case = Case(0, 64, 1, 2)
    k, v = map(torch.from_numpy, case.model.sample(1, 2600))
    stores = []
    for at_once in (False, True):
        codec = make_codec(ops, plan_of(case.model, 2), 0)
        codec.packer = codec.pack if at_once else None
        monkeypatch.setattr(core_codec, "TILE_CHUNKS", 2)
        stores.append(LayerCache(ops, codec, 4, 16))
        for p in (slice(0, 2500), slice(2500, 2600)):
            stores[-1].append(k[:, :, p], v[:, :, p])
    one, many = (store.padding_groups[0].chunks for store in stores)
    assert [(c.start, c.tokens) for c in one] == [(c.start, c.tokens) for c in many]
    for a, b in zip(one, many):
        assert_codes_close("codes", codes_of(codec, b), codes_of(codec, a))

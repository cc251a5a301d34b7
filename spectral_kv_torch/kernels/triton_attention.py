"""The decode step of `latent.c` in Triton, for tensors on a GPU: three launches per layer and step, four for a trellis.

A program attends with a few query rows of one KV head to the codes of one *span*: up to 64 time blocks of a chunk, or
its codes that wait for their unit. It reads one frequency of its head at a time, as a tile of all components by all blocks,
in which every row has its own width, and multiplies it with the query rows turned to each of the 16 tokens of a block:

    score[token, row, block] = sum over frequencies f, components r of (time[f, token] q[row, r]) y[f, r, block]

so the time transform costs no pass of its own, and even one query row fills a tensor core's 16. Values go the same way
back. One compilation serves every plan of a model, since widths are data. Formulas: SpectralReader.attend.

Verified under Triton's interpreter (TRITON_INTERPRET=1, CPU tensors), and on an H100 with Triton 3.6: relative errors of 1e-7
in float32 and 2e-4 to 7e-4 in half precision. Counts of registers, shared memory and instructions: results/triton.md.
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl

from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader

from .triton_codes import BLOCKS_AT, FREQUENCIES, LEFT_AT, WAITING, CodeTables, Spans, coefficients

MAX_DIM = 256  # channels of a head that the 99 KB of shared memory of most cards have room for
TILE = 4096  # coefficients decoded at a time: 32 registers of each of 128 threads, 16 KB as an operand
QUERY_ROWS, QUERY_TILE = 4, 512  # most query rows of a program, and most of them times components: 16 tokens of each
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_codes(
    span, sequence, head, kv_heads, first_row, query_rows, rank, latent, offset, state, pooled, places, planes, normalize,
    levels, time, paths, path_rows, starts, second, third, fifth, curves, COUPLED: tl.constexpr, RANK_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial softmax of ROWS query rows over one span, to the base 2, values as latents."""
    i, r = tl.arange(0, FREQUENCIES * ROWS), tl.arange(0, RANK_TILE)
    token, m = i // ROWS, first_row + i % ROWS
    query = tl.load(latent + m[:, None] * RANK_TILE + r, mask=(m < query_rows)[:, None], other=0.0)
    scores = tl.zeros([FREQUENCIES * ROWS, BLOCKS], tl.float32)
    for f in range(FREQUENCIES):
        at = head * FREQUENCIES + f
        present = tl.load(planes + at)
        if present:
            y = coefficients(
                span, sequence, at, 0, 1, rank, present, places, normalize, levels, paths, path_rows, starts, second, third,
                fifth, curves, COUPLED, RANK_TILE, BLOCKS, REST,
            )  # fmt: skip
            turned = query * tl.load(time + f * FREQUENCIES + token)[:, None]
            scores = tl.dot(turned, tl.trans(y), scores, input_precision=PRECISION)
    scores += tl.load(offset + m, mask=m < query_rows, other=0.0)[:, None]
    scores = tl.where(tl.arange(0, BLOCKS) < tl.load(span + BLOCKS_AT), scores, float("-inf"))
    scores = tl.reshape(scores, [FREQUENCIES, ROWS, BLOCKS])
    top = tl.max(tl.max(scores, 2), 0)
    p = tl.exp2(scores - top[None, :, None])
    total = tl.sum(tl.sum(p, 2), 0)
    p = tl.reshape(p, [FREQUENCIES * ROWS, BLOCKS])
    sums = tl.zeros([FREQUENCIES * ROWS, RANK_TILE], tl.float32)
    for f in range(FREQUENCIES):
        at = (kv_heads + head) * FREQUENCIES + f
        present = tl.load(planes + at)
        if present:
            y = coefficients(
                span, sequence, at, 0, 1, rank, present, places, normalize, levels, paths, path_rows, starts, second, third,
                fifth, curves, COUPLED, RANK_TILE, BLOCKS, REST,
            )  # fmt: skip
            turned = p * tl.load(time + f * FREQUENCIES + token)[:, None]
            sums = tl.dot(turned, y, sums, input_precision=PRECISION)
    m = first_row + tl.arange(0, ROWS)
    tl.store(state + 2 * m, top, mask=m < query_rows)
    tl.store(state + 2 * m + 1, total, mask=m < query_rows)
    sums = tl.sum(tl.reshape(sums, [FREQUENCIES, ROWS, RANK_TILE]), 0)
    tl.store(pooled + m[:, None] * RANK_TILE + r, sums, mask=(m < query_rows)[:, None])


@triton.jit
def _attend_exact(
    first_row, query_rows, length, exact, scale, queries, keys, values, state, window, DIM: tl.constexpr,
    DIM_TILE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial softmax of ROWS query rows over the exact tokens; a new token is followed by those it may not see."""
    i, d = tl.arange(0, 16), tl.arange(0, DIM_TILE)  # a product wants 16 rows
    m = first_row + i
    valid = (i < ROWS) & (m < query_rows)
    query = tl.load(queries + m[:, None] * DIM + d, mask=valid[:, None] & (d < DIM), other=0.0).to(tl.float32)
    last = exact - length + m % length
    top = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    sums = tl.zeros([16, DIM_TILE], tl.float32)
    for start in range(0, exact, EXACT):
        j = start + tl.arange(0, EXACT)
        here, inside = j[:, None] * DIM + d, (j < exact)[:, None] & (d < DIM)
        key = tl.load(keys + here, mask=inside, other=0.0).to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(j[None, :] <= last[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        value = tl.load(values + here, mask=inside, other=0.0).to(tl.float32)
        sums = tl.dot(p, value, sums * fade[:, None], input_precision=PRECISION)
        total = total * fade + tl.sum(p, 1)
        top = higher
    tl.store(state + 2 * m, top, mask=valid)
    tl.store(state + 2 * m + 1, total, mask=valid)
    tl.store(window + m[:, None] * DIM + d, sums, mask=valid[:, None] & (d < DIM))


@triton.jit(do_not_specialize=["query_rows", "rank"])
def _project(
    query_rows, rank, kv_heads, scale, queries, basis, mean, latent, offset, DIM: tl.constexpr, RANK_TILE: tl.constexpr
):  # fmt: skip
    """One query row on the basis of its head's keys, and on their mean, times the scale of logits to the base 2."""
    m, sequence_head = tl.program_id(0), tl.program_id(1)
    head = sequence_head % kv_heads
    line = sequence_head.to(tl.int64) * query_rows + m
    r = tl.arange(0, RANK_TILE)
    sums, at_mean = tl.zeros([RANK_TILE], tl.float32), 0.0
    for start in range(0, DIM, 16):
        d = start + tl.arange(0, 16)
        query = tl.load(queries + line * DIM + d, mask=d < DIM, other=0.0).to(tl.float32) * (scale * LOG2E)
        axes = basis + head * DIM * rank + d[:, None] * rank + r
        sums += tl.sum(query[:, None] * tl.load(axes, mask=(d < DIM)[:, None] & (r < rank), other=0.0), 0)
        at_mean += tl.sum(query * tl.load(mean + head * DIM + d, mask=d < DIM, other=0.0), 0)
    tl.store(latent + line * RANK_TILE + r, sums)
    tl.store(offset + line, at_mean)


@triton.jit(do_not_specialize=["query_rows", "length", "exact", "rank", "path_rows"])
def _attend(
    query_rows, length, exact, rank, kv_heads, scale, spans, queries, keys, values, latent, offset, state, pooled, window,
    places, planes, normalize, levels, time, paths, path_rows, starts, second, third, fifth, curves, COUPLED: tl.constexpr,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, RANK_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partials of every (group of query rows, span, sequence and KV head); the first is that of the exact tokens."""
    first_row, number, sequence_head = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    state += (sequence_head * tl.num_programs(1) + number) * query_rows * 2
    if number == 0:
        _attend_exact(
            first_row, query_rows, length, exact, scale, queries + sequence_head * query_rows * DIM,
            keys + sequence_head * exact * DIM, values + sequence_head * exact * DIM, state,
            window + sequence_head * query_rows * DIM, DIM, DIM_TILE, ROWS, EXACT, PRECISION,
        )  # fmt: skip
    else:
        span = spans + (number - 1) * 24
        sequence, head = sequence_head // kv_heads, (sequence_head % kv_heads).to(tl.int32)
        latent += sequence_head * query_rows * RANK_TILE
        offset += sequence_head * query_rows
        pooled += (sequence_head * (tl.num_programs(1) - 1) + number - 1) * query_rows * RANK_TILE
        paths += (sequence * (tl.num_programs(1) - 1) + number - 1) * ((BLOCKS + 31) // 32) * path_rows
        if tl.load(span + LEFT_AT) > 0:
            _attend_codes(
                span, sequence, head, kv_heads, first_row, query_rows, rank, latent, offset, state, pooled, places, planes,
                normalize, levels, time, paths, path_rows, starts, second, third, fifth, curves, COUPLED, RANK_TILE, ROWS,
                WAITING, True, PRECISION,
            )  # fmt: skip
        else:
            _attend_codes(
                span, sequence, head, kv_heads, first_row, query_rows, rank, latent, offset, state, pooled, places, planes,
                normalize, levels, time, paths, path_rows, starts, second, third, fifth, curves, COUPLED, RANK_TILE, ROWS,
                BLOCKS, False, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["query_rows", "spans", "rank"])
def _merge(
    query_rows, spans, rank, kv_heads, state, pooled, window, basis, mean, output, DIM: tl.constexpr,
    RANK_TILE: tl.constexpr,
):  # fmt: skip
    """Weighted mean of the partials of one query row over `spans` and over the exact tokens."""
    m, sequence_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = kv_heads + sequence_head % kv_heads
    state += (sequence_head * (spans + 1) * query_rows + m) * 2
    pooled += (sequence_head * spans * query_rows + m) * RANK_TILE
    r = tl.arange(0, RANK_TILE)
    top, exact = tl.load(state), tl.load(state + 1)
    state += query_rows * 2
    weight, sealed, sums = 1.0, 0.0, tl.zeros([RANK_TILE], tl.float32)
    for start in range(0, spans, 16):
        i = start + tl.arange(0, 16)
        tops = tl.load(state + i * query_rows * 2, mask=i < spans, other=float("-inf"))
        higher = tl.maximum(top, tl.max(tops, 0))
        p, fade = tl.exp2(tops - higher), tl.exp2(top - higher)
        parts = tl.load(pooled + i[:, None] * query_rows * RANK_TILE + r, mask=(i < spans)[:, None], other=0.0)
        sums = sums * fade + tl.sum(p[:, None] * parts, 0)
        sealed = sealed * fade + tl.sum(p * tl.load(state + i * query_rows * 2 + 1, mask=i < spans, other=0.0), 0)
        weight *= fade
        top = higher
    line = sequence_head * query_rows + m
    for start in range(0, DIM, 16):
        d = start + tl.arange(0, 16)
        axes = basis + group * DIM * rank + d[:, None] * rank + r
        out = tl.sum(sums[None, :] * tl.load(axes, mask=(d < DIM)[:, None] & (r < rank), other=0.0), 1)
        out += sealed * tl.load(mean + group * DIM + d, mask=d < DIM, other=0.0)
        out += weight * tl.load(window + line * DIM + d, mask=d < DIM, other=0.0)
        out = out / (sealed + weight * exact)
        tl.store(output + line * DIM + d, out.to(output.dtype.element_ty), mask=d < DIM)


class TritonStep:
    """`attention.decode_step` for one layer's codec, on the device of its tensors; the host never waits for it."""

    def __init__(self, codec: SpectralReader):
        self._codec = codec
        self._rank_tile, self._dim_tile = (max(16, triton.next_power_of_2(n)) for n in (codec.rank, codec.head_dim))
        blocks, self._exact = (max(16, min(32, TILE // n)) for n in (self._rank_tile, self._dim_tile))
        self._blocks, self._spans = blocks, Spans(codec, blocks, codec.basis)

    @cached_property
    def _codes(self) -> CodeTables:
        return CodeTables(self._codec, self._rank_tile)

    def __call__(self, chunks: list[Chunk], queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        codec, codes, spans = self._codec, self._codes, self._spans.of(chunks)
        batch, q_heads, length, dim = queries.shape
        kv_heads, exact = keys.shape[1:3]
        heads, rows, tile, parts = batch * kv_heads, q_heads // kv_heads * length, self._rank_tile, len(spans)
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        output = torch.empty_like(queries)

        def empty(*shape):
            return torch.empty(shape, dtype=torch.float32, device=queries.device)

        latent, offset, state = empty(heads, rows, tile), empty(heads, rows), empty(heads, 1 + parts, rows, 2)
        pooled, window = empty(heads, parts, rows, tile), empty(heads, rows, dim)
        at_once = min(triton.next_power_of_2(rows), QUERY_ROWS, QUERY_TILE // tile)
        # ten bits of mantissa: no less than a half-precision query has
        precision = "ieee" if queries.dtype == torch.float32 else "tf32"
        with torch.cuda.device_of(queries):
            trellis = codes.paths(spans, batch, self._blocks)
            _project[rows, heads](
                rows, codec.rank, kv_heads, scale, queries, codec.basis, codec.mean, latent, offset, dim, tile
            )  # fmt: skip
            _attend[triton.cdiv(rows, at_once), 1 + parts, heads](
                rows, length, exact, codec.rank, kv_heads, scale, spans, queries, keys, values, latent, offset, state, pooled,
                window, codes.places, codes.planes, codec.normalize, codec.quantizers.levels, codec.time, *trellis,
                codes.coupled, dim, self._dim_tile, tile, at_once, self._blocks, self._exact, precision,
                num_warps=8 if tile > 128 else 4,
            )  # fmt: skip
            _merge[rows, heads](
                rows, parts, codec.rank, kv_heads, state, pooled, window, codec.basis, codec.mean, output, dim, tile
            )  # fmt: skip
        return output

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share, and where the codes of each lie."""
        return [*self._codes.arrays(), *self._spans.arrays()]

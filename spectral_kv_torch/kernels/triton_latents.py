"""Latents of many chunks in one launch: codes of every width -> coefficients -> the transform back to tokens."""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl

from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.spectral_reader import SpectralReader

from .triton_codes import BLOCKS_AT, FIRST_AT, FREQUENCIES, LEFT_AT, WAITING, CodeTables, Spans, coefficients

COMPONENTS = 32  # of a program; those of higher numbers have few frequencies with bits, and are done early
BLOCKS = WAITING.value  # of a program: 64 registers of each of 128 threads for the latents of 32 components


@triton.jit
def _of_span(
    span, sequence, group, tile, tiles, rank, planes, places, normalize, levels, time, latents, paths, path_rows,
    starts, second, third, fifth, curves, COUPLED: tl.constexpr, RANK_TILE: tl.constexpr, BLOCKS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Latents of a tile of components of a span; `latents`: of the sequence and group."""
    token, n, r = tl.arange(0, FREQUENCIES), tl.arange(0, BLOCKS), tile * RANK_TILE + tl.arange(0, RANK_TILE)
    z = tl.zeros([FREQUENCIES, BLOCKS, RANK_TILE], tl.float32)
    for f in range(FREQUENCIES):
        at = group * FREQUENCIES + f
        present = tl.load(planes + at * tiles + tile)
        if present:
            y = coefficients(
                span, sequence, at, tile, tiles, rank, present, places, normalize, levels, paths, path_rows, starts, second,
                third, fifth, curves, COUPLED, RANK_TILE, BLOCKS, REST,
            )  # fmt: skip
            z += tl.load(time + f * FREQUENCIES + token)[:, None, None] * y[None, :, :]
    block = tl.load(span + FIRST_AT) + n
    here = (block[None, :, None] * FREQUENCIES + token[:, None, None]) * rank + r[None, None, :]
    held = (n < tl.load(span + BLOCKS_AT))[None, :, None] & (r < rank)[None, None, :]
    tl.store(latents + here, z.to(latents.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["tokens", "rank", "path_rows"])
def _latents(
    tokens, rank, groups, spans, planes, places, normalize, levels, time, latents, paths, path_rows, starts, second, third,
    fifth, curves, COUPLED: tl.constexpr, RANK_TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Latents [B, G, tokens, rank] of every (tile of components, span, sequence and group)."""
    tile, number, sequence_group = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    span, latents = spans + number * 24, latents + sequence_group * tokens * rank
    sequence, group = sequence_group // groups, (sequence_group % groups).to(tl.int32)
    paths += (sequence * tl.num_programs(1) + number) * ((BLOCKS + 31) // 32) * path_rows
    if tl.load(span + LEFT_AT) > 0:
        _of_span(
            span, sequence, group, tile, tl.num_programs(0), rank, planes, places, normalize, levels, time, latents, paths,
            path_rows, starts, second, third, fifth, curves, COUPLED, RANK_TILE, BLOCKS, True,
        )  # fmt: skip
    else:
        _of_span(
            span, sequence, group, tile, tl.num_programs(0), rank, planes, places, normalize, levels, time, latents, paths,
            path_rows, starts, second, third, fifth, curves, COUPLED, RANK_TILE, BLOCKS, False,
        )  # fmt: skip


class Latents:
    """`transform.to_time` of the coefficients of several chunks of one layer's codec."""

    def __init__(self, codec: SpectralReader):
        self._codec, self._spans = codec, Spans(codec, BLOCKS, codec.basis)

    @cached_property
    def _codes(self) -> CodeTables:
        return CodeTables(self._codec, COMPONENTS)

    def __call__(self, chunks: list[Chunk], dtype: torch.dtype) -> torch.Tensor:
        """Latents [B, G, T, R] of the tokens of all `chunks`."""
        codec, spans = self._codec, self._spans.of(chunks)
        batch, tokens = chunks[0].batch, sum(chunk.tokens for chunk in chunks)
        latents = torch.empty((batch, codec.groups, tokens, codec.rank), dtype=dtype, device=spans.device)
        with torch.cuda.device_of(latents):
            trellis = self._codes.paths(spans, batch, BLOCKS)
            _latents[self._codes.tiles, len(spans), batch * codec.groups](
                tokens, codec.rank, codec.groups, spans, self._codes.planes, self._codes.places, codec.normalize,
                codec.quantizers.levels, codec.time, latents, *trellis, self._codes.coupled, COMPONENTS, BLOCKS,
            )  # fmt: skip
        return latents

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share, and where the codes of each lie."""
        return [*self._codes.arrays(), *self._spans.arrays()]

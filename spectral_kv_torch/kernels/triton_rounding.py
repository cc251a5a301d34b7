"""The time rounding of `rounding.c` in Triton: a program chooses the codes of some components of one block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spectral_kv_core.quantization import quantizer

from .triton_codes import FREQUENCIES

COMPONENTS = 64  # of a program, which has two warps
CELLS, REACH = tl.constexpr(quantizer.CELLS), tl.constexpr(quantizer.REACH)
LEVELS = tl.constexpr(256)


@triton.jit
def _quantize(z, at, slot, codes, levels):
    """Codes of the values `at`, and what their levels leave of `z`."""
    SPAN: tl.constexpr = 2 * REACH * CELLS
    x = tl.minimum(tl.maximum(at, -REACH), REACH)
    cell = tl.minimum((x * CELLS + REACH * CELLS).to(tl.int32), SPAN - 1)
    code = tl.load(codes + slot * SPAN + cell)
    return code, z - tl.load(levels + slot * LEVELS + code.to(tl.int32))


@triton.jit(do_not_specialize=["blocks", "rank"])
def _round(
    blocks, rank, groups, z, weights, gain, slots, time, codes, levels, output, RANK_TILE: tl.constexpr
):  # fmt: skip
    """Codes of RANK_TILE components; one round of coordinate descent from the nearest: rounding.round_in_time."""
    number, sequence_group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    block = sequence_group * blocks + number
    group = (sequence_group % groups).to(tl.int32) * FREQUENCIES * rank
    f, r = tl.arange(0, FREQUENCIES), tl.program_id(1) * RANK_TILE + tl.arange(0, RANK_TILE)
    z, output = z + block * FREQUENCIES * rank, output + block * FREQUENCIES * rank
    gain, slots = gain + group, slots + group
    rows, held = f[:, None] * rank + r[None, :], (r < rank)[None, :]
    nearest = tl.load(z + rows, mask=held, other=0.0)
    _, error = _quantize(nearest, nearest, tl.load(slots + rows, mask=held, other=0), codes, levels)
    error *= tl.load(gain + rows, mask=held, other=0.0)
    matrix = tl.load(time + f[:, None] * FREQUENCIES + f[None, :])
    weight = tl.load(weights + block * FREQUENCIES + f)
    for i in range(FREQUENCIES):
        row = tl.load(time + i * FREQUENCIES + f)
        metric = tl.sum(matrix * (row * weight)[None, :], 1) / tl.sum(row * row * weight, 0)
        others = tl.sum(metric[:, None] * error, 0)
        own = tl.sum(tl.where(f[:, None] == i, error, 0.0), 0)
        here = i * rank + r
        value, g = tl.load(z + here, mask=r < rank, other=0.0), tl.load(gain + here, mask=r < rank, other=1.0)
        slot = tl.load(slots + here, mask=r < rank, other=0)
        code, left = _quantize(value, value + (others - own) / g, slot, codes, levels)
        tl.store(output + here, code, mask=r < rank)
        error = tl.where(f[:, None] == i, (left * g)[None, :], error)


def round_in_time(z, weights, gain, matrix, tables) -> torch.Tensor:
    """As `rounding.round_in_time`."""
    batch, groups, blocks, _, rank = z.shape
    z, weights = z.contiguous(), weights.contiguous()
    output = torch.empty(z.shape, dtype=torch.uint8, device=z.device)
    with torch.cuda.device_of(z):
        _round[blocks, triton.cdiv(rank, COMPONENTS), batch * groups](
            blocks, rank, groups, z, weights, gain, tables.slots, matrix, tables.codes, tables.levels, output, COMPONENTS,
            num_warps=2,
        )  # fmt: skip
    return output

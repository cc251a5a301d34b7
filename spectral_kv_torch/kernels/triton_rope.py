"""RoPE in Triton: positions become angles on the card, of which the host computes but a table."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv_core.arrays.rope import Rope

FINE, COARSE = 1024, 4096  # position = FINE * i + j: two small tables give every angle up to 4 million tokens
ENTRIES = 2048  # numbers of a program


@triton.jit(do_not_specialize=["start", "tokens", "sequence_positions", "head_positions"])
def _rotate(
    start, factor, sign, x, positions, coarse, fine, output, tokens, x_sequence, x_head, x_token, sequence_positions,
    head_positions, DIM: tl.constexpr, HALF: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
    TOKENS: tl.constexpr, FINE: tl.constexpr, INTERLEAVED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head of one sequence, which stand at `positions`, or from `start` on."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    x += sequence * x_sequence + head * x_head
    output += (sequence * tl.num_programs(1) + head) * tokens * DIM
    if GIVEN:
        position = tl.load(
            positions + sequence * sequence_positions + head * head_positions + t, mask=t < tokens, other=0
        )
    else:
        position = start + t
    i = tl.arange(0, HALF_TILE)[None, :]
    pair = (t < tokens)[:, None] & (i < HALF)
    large = coarse + (position // FINE)[:, None] * (2 * HALF) + i
    small = fine + (position % FINE)[:, None] * (2 * HALF) + i
    large_cos, large_sin = tl.load(large, mask=pair, other=0.0), tl.load(large + HALF, mask=pair, other=0.0)
    small_cos, small_sin = tl.load(small, mask=pair, other=0.0), tl.load(small + HALF, mask=pair, other=0.0)
    cos = (large_cos * small_cos - large_sin * small_sin) * factor
    sin = (large_sin * small_cos + large_cos * small_sin) * (factor * sign)
    one = 2 * i if INTERLEAVED else i
    other = one + 1 if INTERLEAVED else i + HALF
    here = x + t[:, None].to(tl.int64) * x_token
    a = tl.load(here + one, mask=pair, other=0.0).to(tl.float32)
    b = tl.load(here + other, mask=pair, other=0.0).to(tl.float32)
    there = output + t[:, None] * DIM
    tl.store(there + one, (a * cos - b * sin).to(output.dtype.element_ty), mask=pair)
    tl.store(there + other, (b * cos + a * sin).to(output.dtype.element_ty), mask=pair)
    if DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST_TILE)[None, :]
        held = (t < tokens)[:, None] & (rest < DIM)
        tl.store(there + rest, tl.load(here + rest, mask=held, other=0.0).to(output.dtype.element_ty), mask=held)


def rotate(x: torch.Tensor, rope: Rope, start, inverse: bool, dtype: torch.dtype) -> torch.Tensor:
    """`rope.rotate` of `x` [B, H, T, D], in `dtype`; `start`: int, or int32 positions that broadcast to [B, H, T]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    output = torch.empty(x.shape, dtype=dtype, device=x.device)
    (batch, heads, tokens, dim), half = x.shape, len(rope.inv_freq)
    given = not isinstance(start, int)
    positions = start.expand(batch, heads, tokens).int().contiguous() if given else x
    factor, sign = (1 / rope.scaling, -1.0) if inverse else (rope.scaling, 1.0)
    half_tile = triton.next_power_of_2(half)
    at_once = max(1, ENTRIES // half_tile)
    with torch.cuda.device_of(x):
        _rotate[triton.cdiv(tokens, at_once), heads, batch](
            0 if given else start, factor, sign, x, positions, *angles(rope, x.device), output, tokens, *x.stride()[:3],
            heads * tokens, tokens, dim, half, half_tile, triton.next_power_of_2(max(dim - 2 * half, 1)), at_once, FINE,
            rope.interleaved, given,
        )  # fmt: skip
    return output


@cache
def angles(rope: Rope, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine float32 [positions, 2, pairs] of every FINE-th position, and of the first FINE."""
    rates = np.array(rope.inv_freq)

    def table(positions: np.ndarray) -> torch.Tensor:
        angle = positions.astype(np.float64)[:, None] * rates
        return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)).to(device)

    return table(np.arange(COARSE) * FINE), table(np.arange(FINE))

"""Partial attention of many tokens, by torch's own fused kernels, which are not part of its public interface."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from spectral_kv_core.arrays import attention

from .. import arrays
from .checked import Checked
from .device import runs_kernels

MAX_DIM = 256  # channels of a head, which are multiples of 8, in the kernel for cards
ROWS_TIMES_KEYS = 2**21  # scores of a head that stock operations compute at a time


def partial_attention(queries, keys, values, scale: float, causal: bool = False):
    """Partial (`spectral_kv_core.attention`) of `queries` [B, Hq, L, D] over `keys`, `values` [B, H, T, D] of their dtype.

    causal: the keys are those of the same L tokens. Returns (o, m, l) for grouped query rows.
    """
    heads, (batch, q_heads, length, dim) = keys.shape[1], queries.shape
    rows = q_heads // heads * length
    if not causal:  # the query heads of a KV head as rows: its keys are read once
        queries = queries.reshape(batch, heads, -1, dim)
    if is_card(queries.device):
        if causal:
            keys, values = (x.repeat_interleave(q_heads // heads, dim=1) for x in (keys, values))
        out, log_sum = _checked(queries, dim, queries, keys, values, scale, causal)
    else:
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, scale=scale
        )
    out, log_sum = out.reshape(batch, heads, rows, dim).float(), log_sum.reshape(batch, heads, rows, 1)
    return out, log_sum, torch.ones_like(log_sum)


def causal_attention(queries, keys, values, scale: float):
    """Attention [B, Hq, L, D] of L queries at the end of N keys [B, H, N, D] on a card; None where torch has no kernel."""
    if not is_card(queries.device) or not supports_partial_attention(queries):
        return None
    return _checked_causal(queries, queries.shape[3], queries, keys, values, scale)


def supports_partial_attention(queries) -> bool:
    """Whether torch has the kernel for the device, dtype and channels of `queries`."""
    device, dim = queries.device, queries.shape[3]
    if not is_card(device):
        return device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if queries.dtype not in (torch.float16, torch.bfloat16) or dim % 8 or dim > MAX_DIM:
        return False
    return runs_kernels(device) and not _checked.refused(queries, dim)


def is_card(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_card(queries, keys, values, scale: float, causal: bool) -> tuple:
    """Output [B, H, L, D] and log-sum-exp [B, H, L] float32 of heads that are as many for queries, keys and values."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(queries, keys, values, 0.0, causal, False, scale=scale)[:2]


def _stock(queries, keys, values, scale: float, causal: bool) -> tuple:
    """`_on_card` by the core's operations, some queries at a time."""
    total, parts = queries.shape[2], []
    at_once = max(1, ROWS_TIMES_KEYS // keys.shape[2])
    for start in range(0, total, at_once):
        part = queries[:, :, start : start + at_once].float()
        mask = None
        if causal:
            rows = torch.arange(start, start + part.shape[2], device=queries.device)
            mask = rows[:, None] >= torch.arange(keys.shape[2], device=queries.device)
        o, m, l = attention.dense_partial(arrays, part, keys.float(), values.float(), scale, mask)
        parts.append(((o / l).to(queries.dtype), (m + l.log())[..., 0]))
    return tuple(torch.cat(x, dim=2) for x in zip(*parts))


def _causal_on_card(queries, keys, values, scale: float):
    # for fewer queries than keys this operation means the last ones: torch.nn.attention.bias.causal_lower_right
    return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True, False, scale=scale)[0]


def _causal_stock(queries, keys, values, scale: float):
    length, total = queries.shape[2], keys.shape[2]
    mask = torch.ones(length, total, dtype=torch.bool, device=queries.device).tril(total - length)
    return scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)


_checked, _checked_causal = Checked("prefill", _on_card, _stock), Checked("causal", _causal_on_card, _causal_stock)

"""Partial attention of many tokens, by torch's own fused kernel."""

from __future__ import annotations

import torch


def partial_attention(queries, keys, values, scale: float, causal: bool = False):
    """Partial (`spectral_kv_core.attention`) of `queries` [B, Hq, L, D] over `keys`, `values` [B, H, T, D] of their dtype.

    causal: the keys are those of the same L tokens. Returns (o, m, l) for grouped query rows.
    """
    heads, (batch, q_heads, length, dim) = keys.shape[1], queries.shape
    if not causal:  # the query heads of a KV head as rows: its keys are read once
        queries = queries.reshape(batch, heads, -1, dim)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = kernel(queries, keys, values, 0.0, causal, scale=scale)
    rows = q_heads // heads * length
    out, log_sum = out.reshape(batch, heads, rows, dim).float(), log_sum.reshape(batch, heads, rows, 1)
    return out, log_sum, torch.ones_like(log_sum)


def supports_partial_attention(queries) -> bool:
    """Whether torch has the kernel, which is not part of its public interface, for the device of `queries`."""
    return queries.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")

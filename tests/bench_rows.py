"""What every row of `spectralkv bench` must satisfy, whatever the backend."""

from __future__ import annotations

import numpy as np
import pytest
from cases import attention

from spectral_kv_core.benchmark.synthetic import synthetic_vectors

TINY = (4, 2, 32, 1e4)  # q_heads, kv_heads, head_dim, RoPE base
ROW_KEYS = {
    "method", "context", "bits", "bits_per_element", "kept_share", "dtype", "threads", "attention_us", "plain_host_us",
    "plain_gqa_us", "plain_grouped_us", "host_quantized_us", "ratio_to_dense", "ratio_to_host", "ratio_to_gqa",
    "ratio_to_grouped", "ratio_to_host_quantized", "host_quantized_reason", "bytes", "bytes_by_kind", "exact_tokens",
    "plan_hash", "plain_bytes", "read_gb_per_s", "plain_read_gb_per_s", "peak_bytes", "plain_peak_bytes",
}  # fmt: skip
MODEL_KEYS = {"decode_tokens_per_s", "plain_decode_tokens_per_s", "prefill_tokens_per_s", "plain_prefill_tokens_per_s"}


def check_row(row: dict) -> None:
    """Keys, and every ratio against the times in the same row."""
    assert set(row) >= ROW_KEYS and min(row["peak_bytes"], row["plain_peak_bytes"]) > 0
    plain = [row[f"plain_{way}_us"] for way in ("host", "gqa", "grouped")]
    assert min(plain) > 0 and row["ratio_to_dense"] == pytest.approx(min(plain) / row["attention_us"])
    for way, time in zip(("host", "gqa", "grouped"), plain):
        assert row[f"ratio_to_{way}"] == pytest.approx(time / row["attention_us"])
    if row["host_quantized_us"] is None:
        assert row["ratio_to_host_quantized"] is None and row["host_quantized_reason"]
    else:
        assert row["ratio_to_host_quantized"] == pytest.approx(row["host_quantized_us"] / row["attention_us"])
        assert row["host_quantized_reason"] is None
    assert row["bytes"] == sum(row["bytes_by_kind"].values()) and row["exact_tokens"] > 0
    assert row["read_gb_per_s"] == pytest.approx(row["bytes"] / row["attention_us"] / 1e3)


def check_reader(bench, shape, plan) -> None:
    """A layer that reads random tokens call by call attends like the host's own, and to all of them."""
    parts = [synthetic_vectors(shape, tokens, seed) for seed, tokens in enumerate((70, 40, 1))]
    outputs = []
    for made in (None, plan):
        read = bench.layer_reader(shape, made, 4, 64, "float32")
        outputs.append([np.array(read(*part)) for part in parts])
    for got, expected in zip(*outputs):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    whole = [np.concatenate(x, axis=2) for x in zip(*parts)]
    expected = attention(whole[0][:, :, -1:], *whole[1:], shape.head_dim**-0.5)
    np.testing.assert_allclose(outputs[0][-1].reshape(expected.shape), expected, atol=1e-4)


def check_result(result: dict, backend: str) -> None:
    """What a result says about the run itself."""
    assert result["backend"] == backend and result["rows"] and result["machine_read_gb_per_s"] > 0
    assert {"spectralkv", "packages", "instruction_sets", "date", "command"} <= set(result["provenance"])
    plans = {row["plan_hash"] for row in result["rows"]}
    assert set(result["provenance"]["plans"].values()) == plans and all(plans)
    assert {"cpu", "cores", "device", "threads", "versions", "host_quantized"} <= set(result["machine"])
    for row in result["rows"]:
        check_row(row)

"""What `tests/backends` shares: the hosts, their tiny models, and how an exception is marked.

A test that takes `host` runs once on `torch_host` and once on `mlx_host`, modules with the same names inside.
A test that takes `family` too runs on every tiny model of each. NumPy goes in and comes out.
"""

from __future__ import annotations

import numpy as np
import pytest

NAMES = ("torch", "mlx")
FAMILIES = {
    "torch": ("llama", "llama3-rope", "qwen2", "qwen3", "gemma3", "mistral", "phi", "phi3"),
    "mlx": ("llama", "qwen2", "qwen3", "gemma3"),
}
SMALL = {"window": 16, "sinks": 4}


def only(host: str, reason: str):
    """Mark a test that the other host cannot run, with the reason."""
    assert host in NAMES and reason
    return pytest.mark.only(host, reason)


def of_families(*names: str, **of_host: tuple[str, ...]):
    """Mark a test that takes `family` and needs no more than `names`, and on one host some others."""
    return pytest.mark.of_families(*names, **of_host)


class ByteTokenizer:
    """One token per byte, as much of a tokenizer as calibration needs."""

    chat_template = None
    eos_token_ids = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3 + b % 253 for b in text.encode("latin-1", "replace")]

    def decode(self, tokens, skip_special_tokens: bool = True) -> str:
        return bytes(max(t - 3, 0) for t in tokens).decode("latin-1")


def tokens(count: int, seed: int = 0) -> list[int]:
    """Ids above the special ones, the same on every host."""
    return np.random.default_rng(seed).integers(3, 256, count).tolist()


def text(count: int, seed: int) -> str:
    """Text that `ByteTokenizer` turns into `tokens(count, seed)`."""
    return bytes(t - 3 for t in tokens(count, seed)).decode("latin-1")


TEXT = [text(1024, seed=9 + i) for i in range(2)]


def dense(store) -> list[np.ndarray]:
    """Decoded keys and values [B, H, T, D] of all tokens of a store."""
    return [store.xp.to_numpy(x) for x in store.dense()]


def codes(store) -> list[np.ndarray]:
    """Every array of every sealed chunk of a store."""
    return [store.xp.to_numpy(x) for group in store.padding_groups for chunk in group.chunks for x in chunk.arrays]


def close(got, expected, atol: float, rtol: float) -> None:
    np.testing.assert_allclose(got, expected, atol=atol, rtol=rtol)


def relative_error(got, expected) -> float:
    """Root of the mean squared error over the standard deviation of `expected`."""
    return float(np.sqrt(np.square(got - expected).mean()) / np.std(expected, ddof=1))


def batch_greedy(host, model, prompts: list[list[int]], cache, count: int) -> list[list[int]]:
    """The next `count` tokens of every row of a batch with left padding, which `cache` was made for."""
    total = max(map(len, prompts))
    padding = [total - len(prompt) for prompt in prompts]
    rows = [[2] * pad + prompt for pad, prompt in zip(padding, prompts)]
    found = host.batch_logits(model, rows, padding, cache, 0, total)[:, -1].argmax(-1)
    for stop in range(total + 1, total + count + 1):
        rows = [[*row, int(token)] for row, token in zip(rows, found)]
        if stop < total + count:
            found = host.batch_logits(model, rows, padding, cache, stop - 1, stop)[:, -1].argmax(-1)
    return [row[total:] for row in rows]

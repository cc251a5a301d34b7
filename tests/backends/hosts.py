"""What `tests/backends` shares: the hosts, their tiny models, and how an exception is marked.

A test that takes `host` runs once on `torch_host` and once on `mlx_host`, modules with the same names inside.
A test that takes `family` too runs on every tiny model of each. NumPy goes in and comes out.
"""

from __future__ import annotations

import gc
import types
from itertools import pairwise

import numpy as np
import pytest
from tolerances import relative_rms

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

    def decode(self, tokens: int | list[int], skip_special_tokens: bool = True) -> str:
        tokens = [tokens] if isinstance(tokens, int) else tokens
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


def buffers_of(host, *roots) -> dict[int, int]:
    """Bytes of every array that the garbage collector finds under `roots`, by the buffer that holds it."""
    left, seen, arrays, found = list(roots), {}, [], {}
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, (type, types.ModuleType, types.BuiltinFunctionType, types.FrameType)):
            continue
        seen[id(x)] = x
        if isinstance(x, host.IS_ARRAY):
            arrays.append(x)
        elif isinstance(x, types.FunctionType):
            left += [cell.cell_contents for cell in x.__closure__ or ()]
        elif isinstance(x, np.ndarray):
            left.append(x.base)
            found |= {} if isinstance(x.base, np.ndarray) else {id(x): x.nbytes}
        else:
            left += gc.get_referents(x)
    return found | host.backend.host.buffers(arrays)


def close(got, expected, atol: float, rtol: float) -> None:
    np.testing.assert_allclose(got, expected, atol=atol, rtol=rtol)


def relative_error(got, expected) -> float:
    """Root of the mean squared error over the standard deviation of `expected`."""
    return float(np.sqrt(np.square(got - expected).mean()) / np.std(expected, ddof=1))


def sealed_of(store, row: int) -> list[np.ndarray]:
    """Decoded keys and values [H, T, D] of the sealed tokens of one row of a batch."""
    group = next(group for group in store.padding_groups if row in group.sequences)
    held, sinks = group.dense(group.exact_keys.dtype), min(store.sinks, group.exact)
    number = list(group.sequences).index(row)
    return [store.xp.to_numpy(x)[number, :, sinks : sinks + group.sealed] for x in held]


def without_counters(size) -> int:
    """Bytes of a cache without the host's own counters, which no file has."""
    return int(size) - size.by_kind["other"]


def codes_moved(host, cache, alone, row: int = 0) -> bool:
    """Whether the codes of `row` of a batch may be others than those of the same tokens `alone`; or of one cache and another.

    Equal codes decode to the same vectors but for the last bits, of a batch and of a row. Of codes that were attended
    to and dropped nobody can tell.
    """
    for store, other in zip(host.stores(cache), host.stores(alone), strict=True):
        if other.has_dropped:
            return True
        for a, b in zip(sealed_of(store, row), sealed_of(other, 0), strict=True):
            if np.abs(a - b).max(initial=0) > 5e-6 * np.abs(b).max(initial=0):
                return True
    return False


def assert_alike(got, expected, exact, moved: bool) -> None:
    """Logits of two caches are equal; where a code `moved`, that costs less than half of what codes cost beside `exact`.

    Keys that come by two ways may differ in the last bit. One on a threshold then gets the code beside it, on one
    processor and not on another.
    """
    if moved:
        assert relative_rms(got, expected) < relative_rms(expected, exact) / 2
    else:
        close(got, expected, atol=1e-4, rtol=1e-3)


def check_padded(host, family, lengths: list[int], cuts: list[int], options: dict, exact: dict, profile=None):
    """Every row of a batch with left padding, read in pieces that end at `cuts`, is as if alone. Returns its cache.

    The rows of a batch are not multiplied as one row is, so a code may move: `assert_alike` tells what that may cost
    beside an `exact` cache.
    """
    model = host.model(family) if profile is None else host.model_of_three(family)
    profile, total, edges = profile or host.profile(family), max(lengths), [0, *cuts]
    rows, padding = [tokens(n, seed=n) for n in lengths], [total - n for n in lengths]
    ids = [[2] * pad + row for pad, row in zip(padding, rows)]
    cache = host.padded_cache(model, padding, profile, **options)
    parts = [host.batch_logits(model, ids, padding, cache, start, stop) for start, stop in pairwise(edges)]
    batch, alone_bytes = np.concatenate(parts, axis=1), 0
    for number, (row, pad) in enumerate(zip(rows, padding)):
        # the same pieces as in the batch, since a piece of a prompt sees its own tokens exactly
        own = list(pairwise([0, *(edge - pad for edge in edges if edge > pad)]))
        alone, true = (host.make_prompt_cache(model, profile, **given) for given in (options, exact))
        expected, without = (np.concatenate([host.logits(model, row[a:b], c) for a, b in own]) for c in (alone, true))
        alone_bytes += int(host.cache_nbytes(alone))
        moved = options != exact and codes_moved(host, cache, alone, number)
        assert_alike(batch[number, pad:], expected, without, moved)
    assert len(host.stores(cache)[0].padding_groups) == len(set(lengths))
    if family != "gemma3":  # whose layers with a sliding window keep padding
        assert int(host.cache_nbytes(cache)) == alone_bytes
    return cache


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

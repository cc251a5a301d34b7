"""Prompt caches in files, and from one method to another; files of both backends are the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers.cache_utils import Cache

from spectral_kv_core.cache import prompt_cache
from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.planning.budget import SINKS, WINDOW
from spectral_kv_core.planning.methods import Method
from spectral_kv_core.profile.profile import Profile

from . import host

__all__ = ["decode_cache", "encode_cache", "load_prompt_cache", "save_prompt_cache", "sealed_bits"]


def save_prompt_cache(
    path: str | os.PathLike,
    cache: Cache,
    tokens: Sequence | None = None,
    *,
    model=None,
    method: str | Method | None = None,
    bits: float | None = None,
    profile: Profile | None = None,
    window: int = WINDOW,
    sinks: int = SINKS,
    metadata: dict | None = None,
) -> Path:
    """Store a cache that has read a prompt, for `load_prompt_cache` of either backend.

    Args:
        path: Where to write the file, a `.safetensors`.
        cache: A cache of this backend, stored as it is with its prompt ended, or one of the host.
        tokens: Ids [seen] or [B, seen] of what was read, kept in the file.
        model: The model. Its name and the hash of its weights go into the file; needed to encode.
        method: Encodes what the cache holds by this method. None keeps codes as they are, and a host's cache exactly.
        bits: Average stored bits of `method`, as in `make_prompt_cache`.
        profile: The profile for `method`, as in `make_prompt_cache`.
        window: The last tokens, kept exactly by `method`.
        sinks: The first tokens, kept exactly by `method`.
        metadata: JSON that goes along.

    Returns:
        The path.

    Raises:
        UsageError: The cache is empty or of a kind that cannot be stored, `tokens` do not fit it, or arguments do not go
            together.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import load_model, make_prompt_cache, save_prompt_cache
        >>> from spectral_kv_torch.integration import cache_argument
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import torch
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([tokens]), **cache_argument(model, cache))
        >>> save_prompt_cache("build/sea.safetensors", cache, tokens, model=model).name
        'sea.safetensors'
    """
    encoding = prompt_cache.Encoding(method, bits, profile, window, sinks)
    return prompt_cache.save_prompt_cache(host, path, cache, tokens, encoding=encoding, model=model, metadata=metadata)


def load_prompt_cache(
    path: str | os.PathLike | PromptFile,
    model,
    profile: Profile | None = None,
    *,
    method: str | Method | None = None,
    bits: float | None = None,
) -> tuple[Cache, list | None]:
    """Read a stored prompt cache, which goes on where it ended.

    Args:
        path: A file of `save_prompt_cache`, by either backend.
        model: The model that reads on: of the architecture that made the file.
        profile: The profile that the file was made with; None looks for it.
        method: None gives the very cache that was saved, or a plain one where its method is for files only. `plain` gives
            the host's own. Any other encodes the decoded cache again, with the file's window and sinks.
        bits: Average stored bits of `method`, as in `make_prompt_cache`.

    Returns:
        The cache, and the token ids of its prompt, None where the file has none.

    Raises:
        FileNotFoundError: There is no such file.
        UsageError: The file is damaged, of another model or of another profile, or `bits` come without a method.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import load_model, load_prompt_cache, make_prompt_cache, save_prompt_cache
        >>> from spectral_kv_torch.integration import cache_argument
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import torch
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([tokens]), **cache_argument(model, cache))
        >>> path = save_prompt_cache("build/sea.safetensors", cache, tokens, model=model)
        >>> cache, read = load_prompt_cache(path, model)
        >>> read == tokens
        True
    """
    return prompt_cache.load_prompt_cache(host, path, model, profile, method=method, bits=bits)


encode_cache, decode_cache = partial(prompt_cache.encode_cache, host), partial(prompt_cache.decode_cache, host)
sealed_bits = partial(prompt_cache.sealed_bits, host)

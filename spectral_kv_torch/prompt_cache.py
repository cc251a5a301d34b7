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
    """Store a cache that has read a prompt, for `load_prompt_cache` of either backend; returns the path.

    method None stores a compressed cache as it is, its prompt ended, and a plain one exactly (`identity`); else what it
    holds is encoded by `method`, with `bits`, `profile`, `window` and `sinks` as in `make_prompt_cache`. tokens: ids
    [seen] or [B, seen] of what was read, kept in the file. model: names the file's model and its weights; needed to
    encode. metadata: JSON that goes along. Raises ValueError for a cache or tokens that cannot be stored.
    """
    options = {"method": method, "bits": bits, "profile": profile, "window": window, "sinks": sinks}
    return prompt_cache.save_prompt_cache(host, path, cache, tokens, model=model, metadata=metadata, **options)


def load_prompt_cache(
    path: str | os.PathLike | PromptFile,
    model,
    profile: Profile | None = None,
    *,
    method: str | Method | None = None,
    bits: float | None = None,
) -> tuple[Cache, list | None]:
    """A cache that goes on where the stored one ended, and the token ids of its prompt, None when they are not told.

    method None gives the very cache that was saved, or a plain one where its method is for files only; `plain` the
    host's own; any other encodes the decoded cache again, at `bits`, with the file's window and sinks. profile: the one
    that the file was made with; None looks for it. Raises FileNotFoundError, or ValueError for a file that is damaged, of
    another model or of another profile.
    """
    return prompt_cache.load_prompt_cache(host, path, model, profile, method=method, bits=bits)


encode_cache, decode_cache = partial(prompt_cache.encode_cache, host), partial(prompt_cache.decode_cache, host)
sealed_bits = partial(prompt_cache.sealed_bits, host)

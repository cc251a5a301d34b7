"""What a server is started with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..cache.request import CacheRequest
from ..errors import UsageError
from ..profile.profile import Profile

MOST_PORT = 65535  # a resolver takes the remainder of a larger one


@dataclass(frozen=True)
class Settings:
    """What a server is started with; raises UsageError for what no server has.

    model: directory or hub id. names: by which clients may call the model, the one that they are told first. request_for:
    what the caches of a model with such a tokenizer are to be. memory_limit: bytes of all caches. most_tokens: of an answer
    for which nobody says. concurrency: conversations that go on at a time. stored: conversations that are kept.
    """

    model: str
    names: tuple[str, ...]
    request_for: Callable[..., CacheRequest]
    profile: Profile | None = None
    dtype: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    memory_limit: int | None = None
    most_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    concurrency: int = 8
    stored: int = 64
    vocabulary: int = 1 << 31

    def __post_init__(self):
        if self.port > MOST_PORT:
            raise UsageError(f"Expected `port` of at most {MOST_PORT}, received {self.port}.")
        for name, least in (("port", 0), ("most_tokens", 1), ("concurrency", 1), ("stored", 0)):
            if getattr(self, name) < least:
                told = "max_tokens" if name == "most_tokens" else name
                raise UsageError(f"Expected `{told}` of at least {least}, received {getattr(self, name)}.")

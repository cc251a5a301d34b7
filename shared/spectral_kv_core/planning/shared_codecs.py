"""Codecs, made once: all caches of a process that code alike have the same tables, for as long as one of them lives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from threading import RLock
from weakref import WeakValueDictionary

from .plan import Plan, array_digest

LOCK = RLock()  # of everything here and in `cache_plan`: what two threads ask for at once is made once


class Codecs(list):
    """The codecs of all layer groups of a plan, on one device. A list that can be referred to weakly."""


_made: WeakValueDictionary[tuple, Codecs] = WeakValueDictionary()


def device_key(xp, like) -> tuple[str, int, str]:
    """Where the arrays of codecs lie, and whose they and the kernels on them are; `like`: an array, a device or None."""
    return xp.__name__, id(xp.kernels), str(getattr(like, "device", like))


def codec_key(plan: Plan) -> tuple:
    """What the codecs of `plan` are made of. Plans with equal keys have equal codecs.

    The plan's hash says what codes mean. Query statistics and losses say which code is chosen.
    """
    basis_set = getattr(plan, "basis_set", None)
    queries = plan.profile.queries if plan.profile is not None else None
    arrays = [(basis_set, name) for name in ("sensitivity", "cost") if basis_set is not None]
    arrays += [(queries, name) for name in getattr(queries, "ARRAYS", ())]
    chosen_by = "".join(array_digest(getattr(owner, name)) for owner, name in arrays)
    return type(plan), plan.method, plan.shape, plan.hash, hashlib.sha256(chosen_by.encode()).hexdigest()


def shared_codecs(key: tuple, xp, like, make: Callable[[], list]) -> Codecs:
    """The codecs of `codec_key` on the device of `like`: those that a cache has already, else what `make()` gives.

    All at a time: arrays that stay, made among those of a forward pass, leave the memory of a process in pieces.
    """
    at = key, device_key(xp, like)
    with LOCK:
        found = _made.get(at)
        if found is None:
            found = _made[at] = Codecs(make())
        return found

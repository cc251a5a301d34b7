"""What a cache keeps of its plan: numbers and codecs. The arrays of a profile, of which both are made, need not stay."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property
from itertools import count
from weakref import WeakValueDictionary

import numpy as np

from ..errors import UsageError
from ..profile.profile import Profile
from ..profile.stored_profile import StoredProfile
from ..scorers import get_scorer
from .plan import Plan, needed
from .shared_codecs import LOCK, Codecs, codec_key, device_key, shared_codecs


class CachePlan:
    """A `Plan` as caches have it, under the same names.

    It holds the plan and its profile until the codecs are made. Whatever needs them later reads the profile's file again.
    Of a profile without a file the basis set stays until a prompt comes in pieces. `profile` tells what the profile is of,
    without its arrays.
    """

    def __init__(self, plan: Plan):
        self.method, self.bits, self.shape = plan.method, plan.bits, plan.shape
        self.layer_groups, self.bits_per_element, self.drops = plan.layer_groups, plan.bits_per_element, plan.drops
        self.hash, self.codec_key = plan.hash, codec_key(plan)
        known = plan.profile
        self.profile = None if known is None else replace(known, basis_sets={}, queries=None)
        self._profile = (lambda: None) if known is None else weakref.ref(known)
        self._plan: Plan | None = plan
        self._remake = plan.remake
        self._codecs: dict[tuple[str, int, str], Codecs] = {}
        self._queries = (
            [plan.query_statistics(number) for number in range(len(plan.layer_groups))] if _scored(plan) else []
        )

    def __deepcopy__(self, memo) -> CachePlan:
        """Itself: nothing in it changes, and caches that are copied share their codecs."""
        return self

    def codecs(self, xp, like=None) -> Codecs:
        """The codecs of all layer groups on the device of `like`, which all caches of the process share."""
        at = device_key(xp, like)
        with LOCK:
            if at not in self._codecs:
                self._codecs[at] = shared_codecs(self.codec_key, xp, like, lambda: self._made_codecs(xp, like))
                self._let_go()
            return self._codecs[at]

    def make_codec(self, xp, layer_group: int, like=None):
        """One of `codecs`."""
        return self.codecs(xp, like)[layer_group]

    @cached_property
    def staging(self) -> CachePlan | None:
        """`Plan.staging`."""
        with LOCK:
            made = self._whole().staging
            return None if made is None else _Staging(made, self)

    def query_statistics(self, layer_group: int) -> dict[str, np.ndarray]:
        """`Plan.query_statistics`, of a plan whose scorer looks at queries."""
        return self._queries[layer_group] if self._queries else {}

    def _made_codecs(self, xp, like) -> list:
        plan = self._whole()
        return [plan.make_codec(xp, number, like) for number in range(len(self.layer_groups))]

    def _whole(self) -> Plan:
        """The plan: the one that is held, or one that is made again. Raises UsageError where its profile is gone."""
        if self._plan is not None:
            return self._plan
        plan = self._remake(self._profile() or self._from_file())
        if plan.hash != self.hash:
            raise UsageError(
                f"Expected the profile that the cache was made with, found another at {needed(self.profile).path}. Make the "
                "cache again."
            )
        return plan

    def _from_file(self) -> Profile:
        path = needed(self.profile).path
        if path is None:
            raise UsageError(
                "Expected the profile of a cache that moves to another device, which has no file and is gone. Keep the "
                "profile, or save it and give its path."
            )
        return Profile.load(path)

    def _let_go(self) -> None:
        """Hold the plan no longer, where it is made of a profile."""
        if self.profile is None:
            return
        if self.profile.path is None and not self.drops:
            _ = self.staging  # which nobody could make of a profile that is gone
        self._plan = None


class _Staging(CachePlan):
    """What holds a prompt until it ends, for caches of the plan `of`.

    It holds what its codecs are made of where `of` cannot make it again: of a profile without a file.
    """

    def __init__(self, plan: Plan, of: CachePlan):
        super().__init__(plan)
        self._of = weakref.ref(of)
        in_file = self.profile is None or self.profile.path is not None
        self._plan = None if in_file else replace(plan, profile=None)  # codes that are not weighed need no queries

    def _whole(self) -> Plan:
        return self._plan or needed(needed(self._of())._whole().staging)

    def _let_go(self) -> None:
        self._plan = None


_known: WeakValueDictionary[Hashable, CachePlan] = WeakValueDictionary()
_numbers: dict[int, tuple[weakref.ref, int]] = {}
_next = count()


def cache_plan(plan: Plan | CachePlan) -> CachePlan:
    """`plan` as caches have it; one for all caches that are made of the very plan."""
    if isinstance(plan, CachePlan):
        return plan
    return known_plan(("plan", _number(plan)), lambda: plan)


def known_plan(key: Hashable, make: Callable[[], Plan]) -> CachePlan:
    """The plan that a living cache has by `key`, else that of `make()`."""
    with LOCK:
        found = _known.get(key)
        if found is None:
            found = _known[key] = CachePlan(make())
        return found


def profile_key(profile: Profile | None) -> Hashable:
    """What tells a profile from others: the state of the file that it is read from, else the object and its parts."""
    if profile is None or isinstance(profile, StoredProfile):
        return profile and profile.stamp
    parts = profile, profile.queries, *profile.basis_sets.values()
    return tuple(_number(part) for part in parts if part is not None)


def _number(x) -> int:
    """A number that no other living or dead object has."""
    with LOCK:
        known = _numbers.get(id(x))
        if known is None or known[0]() is not x:
            at = id(x)
            known = _numbers[at] = weakref.ref(x, lambda _: _numbers.pop(at, None)), next(_next)
        return known[1]


def _scored(plan: Plan) -> bool:
    """Whether a cache of `plan` drops tokens by a scorer that looks at queries."""
    return plan.drops and get_scorer(needed(plan.method.scorer)).needs_queries

"""Profiles in files, which are read once and let go: what they say of a model stays known, their arrays do not stay."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from threading import RLock

from .profile import Profile


class StoredProfile(Profile):
    """A profile in a file. Its arrays are read when they are asked for, and go when nobody uses them.

    Whoever needs several of them holds what `loaded` gives meanwhile. stamp: path, time of change and size of the file.
    names: of the basis sets.
    """

    def __init__(self, profile: Profile, stamp: tuple | None):
        self.shape, self.model, self.calibration = profile.shape, profile.model, profile.calibration
        self.weights_digest, self.library_version = profile.weights_digest, profile.library_version
        self.path, self.stamp, self._file = profile.path, stamp, profile.path or ""
        self.names, self._loaded = frozenset(profile.basis_sets), weakref.ref(profile)

    def load_arrays(self) -> Profile:
        """The profile with its arrays: one that somebody uses already, or one that is read now."""
        with _LOCK:
            profile = self._loaded()
            if profile is None:
                profile = Profile.load(self._file)
                self._loaded = weakref.ref(profile)
            return profile

    @property
    def basis_sets(self):  # type: ignore[override]  # read when it is asked for
        return self.load_arrays().basis_sets

    @property
    def queries(self):  # type: ignore[override]
        return self.load_arrays().queries


def loaded(profile: Profile | None) -> Profile | None:
    """`profile` with its arrays in memory."""
    return profile.load_arrays() if isinstance(profile, StoredProfile) else profile


_LOCK = RLock()
_known: dict[Path, StoredProfile] = {}


def stored_profile(path: str | os.PathLike) -> StoredProfile:
    """The profile in the file `path`, read again where the file has changed; raises as `Profile.load`."""
    given, path = path, Path(path).absolute()
    with _LOCK:
        found = _known.get(path)
        if found is None or found.stamp != _stamp(path):
            profile = Profile.load(given)
            found = _known[path] = StoredProfile(profile, _stamp(path))
        return found


def _stamp(path: Path) -> tuple | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return str(path), state.st_mtime_ns, state.st_size

"""Where profiles are found by themselves: shipped with the package, or calibrated earlier on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import UsageError
from ..files.locking import one_process
from ..files.paths import user_cache_dir
from ..hosts.weights import are_other_weights
from .basis_set import ON_REQUEST
from .model_shape import ModelShape
from .profile import FORMAT_VERSION, Profile
from .stored_profile import stored_profile

log = logging.getLogger("spectralkv")


def packaged_profiles() -> list[Path]:
    """Profile files that ship with the package."""
    return sorted(Path(str(p)) for p in files("spectral_kv_core.profiles").iterdir() if p.name.endswith(".safetensors"))


def cached_profile_path(shape: ModelShape, basis_set: str | None = None, windows: bool = False) -> Path:
    """Where this machine keeps the profile of a model of `shape`; one with a basis set on request has its own place.

    windows: of its layers with a sliding window.

    Stored prompts need the very profile that they were made with.
    """
    extra = ON_REQUEST.get(basis_set or "", "").replace(" --", "-")
    of = "-windows" if windows else ""
    return user_cache_dir() / "profiles" / f"{shape.fingerprint}-v{FORMAT_VERSION}{extra}{of}.safetensors"


def find_profile(shape: ModelShape, basis_set: str, windows: bool = False) -> Profile | None:
    """A packaged profile, or one from the cache folder, that fits `shape` and has `basis_set`."""
    cached = dict.fromkeys(cached_profile_path(shape, name, windows) for name in (None, basis_set))
    for path in [*packaged_profiles(), *cached]:
        if path.is_file():
            profile = stored_profile(path)
            if profile.shape.mismatch(shape) is None and basis_set in profile.names:
                return profile
    return None


def auto_profile(shape: ModelShape, basis_set: str, calibrate: Callable[[], Profile], windows: bool = False) -> Profile:
    """`find_profile`, or calibrate now and keep the result; raises UsageError where it cannot be kept."""
    profile = find_profile(shape, basis_set, windows)
    if profile is not None:
        return profile
    path = cached_profile_path(shape, basis_set, windows)
    with one_process(path.with_suffix(".lock"), "Another process calibrates this model: waiting for its profile."):
        profile = find_profile(shape, basis_set, windows)  # the other one may have made it
        if profile is None:
            _check_place(path.parent)
            log.warning("No profile with %s for this model yet: calibrating once, which takes minutes.", basis_set)
            log.warning("Saved the profile as %s", calibrate().save(path))
            profile = stored_profile(path)
    return profile


def _check_place(folder: Path) -> None:
    """Raise UsageError where `folder` cannot be written, before anything long runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"Expected a folder for profiles that can be written, {folder} cannot: {error.strerror}. Name another one in "
            "SPECTRALKV_CACHE, or give a profile."
        ) from None


def warn_if_other_weights(profile: Profile, digest: str) -> None:
    """Warn, once, when `profile` was made on other weights of the same architecture."""
    if are_other_weights(profile.weights_digest, digest):
        warn_once(
            f"The profile of {profile.model} was made on other weights of this architecture (a fine-tune?): quality may "
            "suffer. Calibrate these: spectralkv profile --model MODEL",
            digest,
        )


def name_passed_layers(passed: dict[int, str]) -> None:
    """Say once which layers are not compressed, and why."""
    reasons: dict[str, list[int]] = {}
    for layer, reason in passed.items():
        reasons.setdefault(reason, []).append(layer)
    if reasons:
        text = "; ".join(
            f"{len(layers)} layer{'s' if len(layers) > 1 else ''} with {reason}" for reason, layers in reasons.items()
        )
        warn_once(f"Passed through uncompressed: {text}", str(sorted(passed.items())))


@cache
def warn_once(message: str, of: str) -> None:
    """Log a warning the first time that it is about `of`."""
    log.warning("%s", message)

"""Finding backends: packages that register themselves in the entry-point group `spectralkv.backends`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from ..errors import UsageError

log = logging.getLogger("spectralkv")
GROUP = "spectralkv.backends"


def backend_names() -> list[str]:
    """Registered backends, the natural one of this machine first: mlx on Apple silicon, torch elsewhere."""
    natural = "mlx" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "torch"
    return sorted({point.name for point in entry_points(group=GROUP)}, key=lambda name: (name != natural, name))


def backends_with(module: str) -> list[str]:
    """Registered backends whose package has a file `module`; nothing of them is imported."""
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        spec = importlib.util.find_spec(point.value)
        folders = spec.submodule_search_locations if spec is not None else None
        if any((Path(folder) / f"{module}.py").is_file() for folder in folders or ()):
            found.append(point.name)
    return found


def load_backend(name: str = "auto", module: str = "generation") -> tuple[str, ModuleType]:
    """Name and `module` of backend `name`; `auto` takes the natural one, or whichever is installed.

    Raises UsageError for an unknown name and ImportError, which names the extra, when its packages are missing.
    """
    names = backend_names()
    if not names:
        raise ImportError(
            "Expected an installed spectralkv, found no backend registered: pip install spectralkv[torch]"
        )
    if name != "auto":
        if name not in names:
            raise UsageError(f"Expected a backend among {', '.join(['auto', *names])}, received {name!r}.")
        return name, _import(name, module)
    missing = None
    for candidate in names:
        try:
            found = _import(candidate, module)
        except ImportError as error:
            missing = missing or error
            continue
        if missing:
            log.warning("%s Using %s instead.", missing, candidate)
        return candidate, found
    assert missing is not None, "no name was tried"
    raise missing


def _import(name: str, module: str) -> ModuleType:
    package = next(point.value for point in entry_points(group=GROUP) if point.name == name)
    try:
        return importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f'Expected the packages of backend {name}, {error.name} is not installed: pip install "spectralkv[{name}]".'
        ) from None

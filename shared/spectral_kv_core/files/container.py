"""Files of arrays with one JSON header and a hash over both: written whole or not at all, read without executing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import UsageError

METADATA_KEY = "spectralkv"


@dataclass(frozen=True)
class FileFormat:
    """One kind of safetensors file; `noun` and `command`, which makes such a file, are for messages."""

    name: str
    version: int
    noun: str
    command: str

    def save(self, path: str | os.PathLike, arrays: dict[str, np.ndarray], header: dict) -> Path:
        """Write `arrays` and `header` to `path` (temporary name, then rename); returns the path."""
        path = Path(path)
        arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}  # safetensors writes memory as it lies
        header = {"format": self.name, "version": self.version, **header}
        header["sha256"] = _digest(arrays, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        os.close(handle)
        try:
            save_file(arrays, temporary, {METADATA_KEY: json.dumps(header, sort_keys=True)})
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path

    def load(self, path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
        """Arrays and header of `path`.

        Raises FileNotFoundError, or UsageError for a file that is truncated, altered, of another kind or version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected a {self.noun} file, found nothing at {path}. Make one: {self.command} --output {path}"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                header = self._checked(_header(file), path)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise UsageError(
                f"Expected a whole {self.noun} file, {path} is truncated or damaged ({error}). Make it again."
            ) from None
        if _digest(arrays, header) != header.get("sha256"):
            raise UsageError(f"Expected the contents that the header's hash names, {path} was altered. Make it again.")
        return arrays, header

    def _checked(self, header: dict | None, path: Path) -> dict:
        """The header of a file of this kind and version."""
        if header is None:
            raise UsageError(f"Expected a spectralkv {self.noun}, received another safetensors file: {path}.")
        if header.get("format") != self.name:
            raise UsageError(f"Expected a {self.noun}, received a {header.get('format')} file: {path}.")
        version = header.get("version", self.version)
        if version != self.version:
            newer = isinstance(version, int) and version > self.version
            todo = "Upgrade: pip install -U spectralkv" if newer else f"Make it again: {self.command}"
            raise UsageError(f"Expected {self.noun} version {self.version}, received {version} from {path}. {todo}")
        return header


def format_name(path: str | os.PathLike) -> str | None:
    """Name of the format of a file, None for anything that is not ours or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (_header(file) or {}).get("format")
    except (SafetensorError, OSError, json.JSONDecodeError):
        return None


def _header(file) -> dict | None:
    header = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
    return header if isinstance(header, dict) else None


def _digest(arrays: dict[str, np.ndarray], header: dict) -> str:
    """Hash of a file's arrays and of its header without the hash itself."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()

"""Files of arrays with one JSON header and a hash over both: written whole or not at all, read without executing."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UsageError
from .replacing import replacing
from .tensors import TensorFile, open_regular, read_json, write_tensors

METADATA_KEY = "spectralkv"
PEEK = 4096  # bytes that tell what kind of file it is


@dataclass(frozen=True)
class FileFormat:
    """One kind of safetensors file; `noun` and `command`, which makes such a file, are for messages.

    private: new files can be read by their owner alone.
    """

    name: str
    version: int
    noun: str
    command: str
    private: bool = False

    def save(self, path: str | os.PathLike, arrays: dict[str, np.ndarray], header: dict) -> Path:
        """Write `arrays` and `header` to `path` (temporary name, then rename); returns the path."""
        path = Path(path)
        arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}  # written as they lie in memory
        header = {"format": self.name, "version": self.version, **header}
        header["sha256"] = _digest(arrays, header)
        size = sum(x.nbytes for x in arrays.values())
        with replacing(path, self.private, size) as file:
            write_tensors(file, arrays, {METADATA_KEY: json.dumps(header, sort_keys=True)})
        return path

    def load(self, path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
        """Arrays and header of `path`.

        Raises FileNotFoundError, or UsageError for a file that is truncated, altered, of another kind or version.
        """
        path = Path(path)
        try:
            with open_regular(path, self.noun) as file:
                try:
                    tensors = TensorFile(file)
                    header = self._checked(_header(tensors), path)
                    arrays = tensors.arrays()
                except UsageError:
                    raise
                except ValueError as error:
                    file.seek(0)
                    raise UsageError(self._what_is_wrong(file, path, error)) from None
        except FileNotFoundError:
            raise FileNotFoundError(
                f"Expected a {self.noun} file, found nothing at {path}. Make one: {self.making(path)}"
            ) from None
        if _digest(arrays, header) != header.get("sha256"):
            raise UsageError(f"Expected the contents that the header's hash names, {path} was altered. Make it again.")
        return arrays, header

    def making(self, path: str | os.PathLike = "FILE") -> str:
        """The command line that makes such a file."""
        return f"{self.command} --output {path}"

    def _what_is_wrong(self, file: BinaryIO, path: Path, error: ValueError) -> str:
        """What to say of a file that is no safetensors file, or none that is whole."""
        opening = file.read(PEEK)
        if opening[8:9] != b"{" and opening.lstrip()[:1] in (b"{", b"["):
            return f"Expected a {self.noun} file, {path} is a JSON text. Results are shown by: spectralkv report {path}"
        if len(opening) > 8 and opening[8:9] != b"{":
            return f"Expected a {self.noun} file, {path} is of another kind. Make one: {self.making()}"
        again = f"Make it again: {self.making(path)}"
        return f"Expected a whole {self.noun} file, {path} is truncated or damaged: {error}. {again}"

    def _checked(self, header: dict | None, path: Path) -> dict:
        """The header of a file of this kind and version."""
        if header is None:
            raise UsageError(f"Expected a spectralkv {self.noun}, received another safetensors file: {path}.")
        if header.get("format") != self.name:
            raise UsageError(f"Expected a {self.noun}, received a {header.get('format')!s:.60} file: {path}.")
        version = header.get("version", self.version)
        if version != self.version:
            newer = isinstance(version, int) and version > self.version
            todo = "Upgrade: pip install -U spectralkv" if newer else f"Make it again: {self.making(path)}"
            raise UsageError(
                f"Expected {self.noun} version {self.version}, received {version!s:.60} from {path}. {todo}"
            )
        return header


def format_name(path: str | os.PathLike) -> str | None:
    """Name of the format of a file, None for anything that is not ours or cannot be read."""
    try:
        with open_regular(Path(path), "spectralkv") as file:
            name = (_header(TensorFile(file)) or {}).get("format")
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) else None


def _header(tensors: TensorFile) -> dict | None:
    header = read_json(tensors.metadata.get(METADATA_KEY, "null"))
    return header if isinstance(header, dict) else None


def _digest(arrays: dict[str, np.ndarray], header: dict) -> str:
    """Hash of a file's arrays and of its header without the hash itself."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()

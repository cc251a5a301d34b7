"""Safetensors files: read strictly, whole, and never mapped; written to the byte as their own library does.

What is mapped ends the process when another one cuts the file off. What a header says is checked before anything is
allocated for it: sizes, types, and that the arrays fill the file without gaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError

LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
MOST_AXES = 8
MOST_DIGITS = 19  # of an integer in a header
DTYPES = {  # in the order in which files have them
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4", "F16": "<f2", "U16": "<u2",
    "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@contextmanager
def open_regular(path: Path, noun: str) -> Iterator[BufferedReader]:
    """The file `path` for reading; raises UsageError for a folder, a pipe or a device, which could give bytes for ever."""
    if path.is_dir():
        raise UsageError(f"Expected a {noun} file, received the folder {path}. Name a file in it.")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UsageError(
                f"Expected a {noun} file, {path} is a pipe, a device or a socket. Copy it to a file first."
            )
        yield file


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError for what is not finite, given twice, too long or too deep as well."""
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_number
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def write_tensors(file: BufferedWriter, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write contiguous `arrays` and `metadata` to `file`: the widest types first, then by name, as safetensors orders them.

    It would write to a file of its own making, whose rights and whose leftovers are not ours.
    """
    names = {np.dtype(kind): (place, name) for place, (name, kind) in enumerate(DTYPES.items())}
    order = sorted(arrays, key=lambda name: (names[arrays[name].dtype][0], name))
    header: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name in order:
        x = arrays[name]
        header[name] = {
            "dtype": names[x.dtype][1],
            "shape": list(x.shape),
            "data_offsets": [stop, stop + x.nbytes],
        }
        stop += x.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        x = arrays[name]
        file.write(x.astype(x.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)


class TensorFile:
    """An open safetensors file: what its header is made of; raises ValueError, with what is wrong, for anything else.

    metadata: texts by name. The arrays are looked at when they are asked for: one may be of a type that we never write.
    """

    def __init__(self, file: BufferedReader):
        self._file, size = file, os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(f"its header has {length:,} bytes, the whole file {size:,}")
        header = read_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        self.metadata: dict[str, str] = _texts(header.pop("__metadata__", {}))
        self._start, self._bytes, self._entries = 8 + length, size - 8 - length, header

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array, in memory of its own; raises ValueError where they do not fill the file to its end."""
        tensors = sorted((_Tensor(*entry) for entry in self._entries.items()), key=lambda x: (x.first, x.stop))
        stop = 0
        for tensor in tensors:
            if tensor.first != stop:
                raise ValueError(f"the array {tensor.name!r:.80} does not begin where the one before it ends")
            stop = tensor.stop
        if stop != self._bytes:
            raise ValueError(f"its arrays have {stop:,} bytes, what follows the header {self._bytes:,}")
        self._file.seek(self._start)
        found = {}
        for tensor in tensors:
            x = np.empty(tensor.shape, tensor.dtype)
            if x.size and self._file.readinto(x.reshape(-1).view(np.uint8).data) != x.nbytes:
                raise ValueError("it became shorter while it was read")
            found[tensor.name] = x
        return found


class _Tensor:
    """One entry of a header."""

    def __init__(self, name: str, fields: Any):
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry {name!r:.80} of its header is no array")
        kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ValueError(f"the array {name!r:.80} has the type {kind!r:.80}")
        if not (_sizes(shape) and len(shape) <= MOST_AXES and _sizes(offsets) and len(offsets) == 2):
            raise ValueError(f"the array {name!r:.80} has no shape of at most {MOST_AXES} axes, or no place")
        self.name, self.dtype, self.shape = name, np.dtype(DTYPES[kind]), tuple(shape)
        self.first, self.stop = offsets
        if self.stop - self.first != math.prod(shape) * self.dtype.itemsize:
            raise ValueError(f"the array {name!r:.80} has another number of bytes than its shape")


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    return metadata


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is given twice")
    return made


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"an integer has {len(text):,} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"a number is {text:.40}")
    return number

"""What can be said of weights without a model: how large their files are, and whether they are those of another model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import UsageError


def digest_weights(norm: np.ndarray | None) -> str:
    """Digest of the first entries of the final norm's weight, to two digits; empty without one.

    No weight quantization touches that norm.
    """
    if norm is None:
        return ""
    values = norm.reshape(-1)[:256]
    return hashlib.sha256(" ".join(f"{v:.1e}" for v in values).encode()).hexdigest()[:16]


def safetensors_nbytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of `folder`, read from their headers; raises UsageError without any."""
    files, total = sorted(folder.glob("*.safetensors")), 0
    for path in files:
        try:
            with safe_open(path, framework="numpy"):
                pass  # checks the header against the length of the file
        except SafetensorError as error:
            raise UsageError(f"Expected whole weights in {folder}, {path.name} is damaged ({error}).") from None
        with open(path, "rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    if not files:
        raise UsageError(f"Expected weights in safetensors files, {folder} has none: their size is not known.")
    return total

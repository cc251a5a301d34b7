"""What can be said of weights without a model: how large their files are, and whether they are those of another model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import UsageError

SAMPLE = 32  # entries of a weight that its digest sees
IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+\..*(?:attn|attention|norm|ln_).*)")
ELSEWHERE = re.compile(r"lora_|vision|visual|audio")  # adapters that are not merged, and parts that have no cache


def layer_weights(names: Iterable[str]) -> list[tuple[str, str]]:
    """What hosts alike call the projections and norms of every layer, and which of `names` that is, in order."""
    found = ((IN_LAYER.search(name), name) for name in names if name.endswith("weight") and not ELSEWHERE.search(name))
    return sorted((match[1].replace(".base_layer", ""), name) for match, name in found if match)


def sampled(flat, size: int):
    """`SAMPLE` entries of a weight, given as a vector `flat` of `size`; the odd step meets every column of a matrix."""
    return flat[:: size // (SAMPLE + 1) | 1][:SAMPLE]


def digest_weights(norm: np.ndarray | None, kinds: Iterable[str] = (), samples: np.ndarray | None = None) -> str:
    """Digest of weights: of the final norm, and behind it, where all are known, of the projections and norms of layers.

    Of the final norm the first entries count, to two digits; no quantization of weights touches them. `samples`: what
    `sampled` gives of all `layer_weights`, as float32, or None for weights that are quantized or not in memory. They count
    as bfloat16, with those of the norm: rounded to float32 or bfloat16, a model has the same ones. `kinds`: name, shape
    and precision of each. Empty without a norm.
    """
    if norm is None:
        return ""
    first = norm.reshape(-1)[:256]
    text = " ".join(f"{v:.1e}" for v in first)
    parts = [hashlib.sha256(text.encode()).hexdigest()[:16]]
    if samples is not None:
        bits = np.concatenate([samples, first]).astype("<f4").view("<u4")
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to the nearest, ties to even
        parts += [
            hashlib.sha256(x).hexdigest()[:16] for x in (";".join(kinds).encode(), rounded.astype("<u2").tobytes())
        ]
    return "-".join(parts)


def are_other_weights(digest: str, other: str) -> bool:
    """Whether two digests are of different weights, by what both of them know."""
    if not (digest and other):
        return False
    (norm, *layers), (other_norm, *other_layers) = digest.split("-"), other.split("-")
    comparable = layers and layers[:1] == other_layers[:1]
    return layers != other_layers if comparable else norm != other_norm


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

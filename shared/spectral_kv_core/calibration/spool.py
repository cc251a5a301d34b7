"""Captured vectors and gradients of calibration text, on disk: one layer of one document in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import UsageError


class Spool:
    """Captured vectors of every layer and document, on disk in float16 around each document's mean.

    Use as a context manager; the folder goes away at the end. A document adds, per compressible layer, post-RoPE keys
    and values [H, T, D] and their score gradients [S, H, T, D] for S label samples.
    """

    def __init__(self, folder: str | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="spectralkv-", dir=folder)
        self.documents = 0
        self._lengths: dict[int, int] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_) -> None:
        self._folder.cleanup()

    def add(self, layer: int, document: int, keys, values, key_gradients, value_gradients) -> None:
        """Store layer number `layer` of one document; raises UsageError on NaN or infinity."""
        x = np.concatenate([keys, values]).astype(np.float32)
        gradients = np.concatenate([key_gradients, value_gradients], axis=1).astype(np.float32)
        if not (np.isfinite(x).all() and np.isfinite(gradients).all()):
            raise UsageError(
                f"Expected finite activations, compressible layer {layer} has NaN or infinity: check the weights and the "
                "dtype."
            )
        mean = x.mean(1, keepdims=True)
        spread = max(float(np.abs(x - mean).max()), 1e-30)
        peak = max(float(np.abs(gradients).max()), 1e-30)
        np.savez(
            self._path(layer, document),
            mean=mean,
            x=((x - mean) / spread).astype(np.float16),
            spread=np.float32(spread),
            gradients=(gradients / peak).astype(np.float16),
            peak=np.float32(peak),
        )
        self.documents = max(self.documents, document + 1)
        self._lengths[document] = x.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self._lengths.values())

    def read(self, *layers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Vectors [2H, T, D] and gradients [S, 2H, T, D] of layers number `layers`, document by document.

        The keys of all of these layers come first, layer by layer; H counts the heads of all of them.
        """
        for document in range(self.documents):
            vectors, gradients = zip(*(self._load(layer, document) for layer in layers))
            yield _keys_first(vectors), _keys_first(gradients)

    def _load(self, layer: int, document: int) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self._path(layer, document)) as arrays:
            x = arrays["x"].astype(np.float32) * arrays["spread"] + arrays["mean"]
            return x, arrays["gradients"].astype(np.float32) * arrays["peak"]

    def _path(self, layer: int, document: int) -> Path:
        return Path(self._folder.name) / f"{layer}-{document}.npz"


def _keys_first(layers: tuple[np.ndarray, ...]) -> np.ndarray:
    """Arrays [..., 2H, T, D] of several layers, each with its keys first -> the keys of all, then the values of all."""
    sides = zip(*(np.split(x, 2, axis=-3) for x in layers))
    return np.concatenate([x for side in sides for x in side], axis=-3)

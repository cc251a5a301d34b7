"""Transforms along time: orthonormal blocks of consecutive tokens, and the frequency bands they are coded in."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError

TIME_TRANSFORMS = ("none", "dct", "haar")
FREQUENCIES = 16  # of a block of tokens: those that kernels are compiled for


def time_matrix(kind: str, block: int) -> np.ndarray:
    """Orthonormal analysis matrix [block, block] float32: row f gives coefficient f of a block of tokens.

    `dct` is the DCT-II (Ahmed, Natarajan and Rao 1974); `haar` the Haar wavelets (Haar 1910) from the mean to the finest
    scale, for a power of two; `none` is the identity for `block` 1. The octave bands are the scales of both.
    """
    if kind == "none":
        if block != 1:
            raise UsageError(f"Expected block 1 without a time transform, received {block}.")
        return np.ones((1, 1), np.float32)
    if kind == "haar":
        if block & (block - 1):
            raise UsageError(f"Expected a power of two as block of the Haar transform, received {block}.")
        matrix = np.ones((1, 1))
        while len(matrix) < block:
            matrix = np.concatenate([np.kron(matrix, [1, 1]), np.kron(np.eye(len(matrix)), [1, -1])]) / np.sqrt(2.0)
        return matrix.astype(np.float32)
    if kind != "dct":
        raise UsageError(f"Expected a time transform in {TIME_TRANSFORMS}, received {kind!r}.")
    t, f = np.arange(block), np.arange(block)[:, None]
    matrix = np.sqrt(2.0 / block) * np.cos(np.pi * (2 * t + 1) * f / (2 * block))
    matrix[0] /= np.sqrt(2.0)
    return matrix.astype(np.float32)


def octave_bands(block: int) -> np.ndarray:
    """Band index [block] of every frequency: {0}, {1}, {2, 3}, {4..7}, ...: one table entry per band and channel."""
    return np.array([0 if f == 0 else int(np.floor(np.log2(f))) + 1 for f in range(block)], np.int32)


def band_sizes(block: int) -> np.ndarray:
    """Frequencies per band [bands] of `octave_bands`."""
    return np.bincount(octave_bands(block))


def to_frequency(xp, z, matrix):
    """Latents [..., T, R] -> coefficients [..., T / block, block, R] of every block; `matrix` [block, block]."""
    *lead, tokens, rank = z.shape
    block = matrix.shape[0]
    return xp.matmul(matrix, z.reshape(*lead, tokens // block, block, rank))


def to_time(xp, y, matrix):
    """Frequency-major coefficients [..., block, R, blocks], as chunks keep them, -> latents [..., blocks * block, R]."""
    *lead, block, rank, blocks = y.shape
    n = len(lead)
    y = xp.permute_dims(y, (*range(n), n + 2, n, n + 1))  # [..., blocks, block, R]
    return xp.matmul(xp.permute_dims(matrix, (1, 0)), y).reshape(*lead, blocks * block, rank)

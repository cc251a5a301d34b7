"""Random rotations that spread a vector's energy over all coordinates, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np

from .transform import time_matrix


def hadamard(dim: int) -> np.ndarray:
    """Orthonormal matrix [dim, dim] float64: Sylvester's Hadamard matrix for a power of two.

    For dim = m * 2^k with m odd, the Kronecker product of the DCT of m with the Hadamard matrix of 2^k.
    """
    if dim < 1:
        raise ValueError(f"Expected a dimension of at least 1, received {dim}.")
    power = dim & -dim
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.kron([[1, 1], [1, -1]], matrix) / np.sqrt(2.0)
    odd = dim // power
    return matrix if odd == 1 else np.kron(time_matrix("dct", odd).astype(np.float64), matrix)


def random_signs(count: int, name: str) -> np.ndarray:
    """`count` signs +1 and -1 float64, out of the SHAKE-256 hash of `name`: no generator that may change."""
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(-(-count // 8)), np.uint8)
    return 1.0 - 2.0 * np.unpackbits(bits)[:count]


def random_rotation(dim: int, name: str = "rotation") -> np.ndarray:
    """Signs of `name`, then `hadamard`: orthonormal [dim, dim] float64 to multiply row vectors by."""
    return random_signs(dim, f"spectralkv {name} {dim}")[:, None] * hadamard(dim)

"""Orthonormal bases of a group of cached vectors, from their mean-removed second moment."""

from __future__ import annotations

import numpy as np


def fit_basis(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes and variances of `covariance` [..., D, D] -> basis [..., D, D], variance [..., D], descending.

    The SVD of the mean-removed vectors, by way of their covariance. Columns are signed so that the entry of largest
    magnitude is positive, which makes the result reproducible.
    """
    variance, basis = np.linalg.eigh((covariance + np.swapaxes(covariance, -1, -2)) / 2)
    variance, basis = variance[..., ::-1], basis[..., ::-1]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(-2)[..., None, :], -2)
    return basis * np.where(largest < 0, -1.0, 1.0), np.maximum(variance, 0.0)


def orthonormalize(basis: np.ndarray) -> np.ndarray:
    """Nearest matrix with orthonormal columns to a nearly orthonormal `basis` [..., D, R], float64.

    Two Newton-Schulz steps (Higham, Functions of Matrices, sec. 8.3) undo the rounding of a basis stored in float16.
    """
    basis = np.asarray(basis, np.float64)
    for _ in range(2):
        basis = basis @ (1.5 * np.eye(basis.shape[-1]) - 0.5 * (np.swapaxes(basis, -1, -2) @ basis))
    return basis


def rank_for_energy(variance: np.ndarray, energy: float) -> np.ndarray:
    """Smallest rank whose leading variances [..., D] hold the share `energy` of their sum -> int array [...]."""
    share = np.cumsum(variance, -1) / np.maximum(variance.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.minimum((share < energy - 1e-12).sum(-1) + 1, variance.shape[-1])


def effective_rank(variance: np.ndarray) -> np.ndarray:
    """exp of the entropy of the normalized singular values (Roy and Vetterli 2007); `variance` [..., D] -> [...]."""
    singular = np.sqrt(np.maximum(variance, 0.0))
    p = singular / np.maximum(singular.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.exp(-np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), -1))

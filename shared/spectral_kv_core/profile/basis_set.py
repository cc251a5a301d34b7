"""Bases, spectra and costs for one way of grouping vectors, as a profile file has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.equality import same_fields
from ..arrays.transform import band_sizes
from ..quantization.quantizer import BIT_WIDTHS

# vectors that share one basis: one head; all K heads or all V heads; all of both; of two or four layers that follow each
# other, or of all
GROUPS = ("head", "side", "layer", "layer2", "layer4", "model")
ROPES = ("pre", "post")  # keys before the rotary embedding, or after it
LONGEST_BLOCK = 1024  # tokens that are coded together
PAIRS, WHOLE_MODEL = "layer2.pre", "model.pre"  # names of basis sets that a profile has only when asked for
ON_REQUEST = {PAIRS: " --pairs", WHOLE_MODEL: " --joint"}  # the options that ask for them
HISTOGRAM_LIMIT, HISTOGRAM_BINS = 12.0, 1500  # of `BasisSet.histogram`, in standard deviations


@dataclass(eq=False)
class BasisSet:
    """Bases, spectra and sensitivities for one way of grouping vectors.

    L layer groups (`ModelShape.layer_groups`), each with G groups of m (side, head) members, in the order K
    heads then V heads, those of its first layer first; Dg = m * head_dim channels, R components, F time bands,
    W = len(BIT_WIDTHS). A layer group of fewer layers than others fills the first members, channels and components.

    mean [L, G, Dg]; weight [L, G, m] scales every member before the basis; basis [L, G, Dg, R] orthonormal columns;
    variance, sensitivity [L, G, R, F]: E[y^2] of the coefficients and E[g^2] of the score gradient along them;
    cost [L, G, R, F, W]: E[g^2 (y - Q_b(y))^2] at every width b; the last two of bases per head times one factor for the keys
    and one for the values of a layer (`layer_probing`); levels: quantizer tables in units of sigma;
    histogram [bins] int64: counts of |y| / sigma over [0, 12), of all coefficients; None in older files.
    """

    group: str
    rope: str
    time: str
    block: int
    mean: np.ndarray
    weight: np.ndarray
    basis: np.ndarray
    variance: np.ndarray
    sensitivity: np.ndarray
    cost: np.ndarray
    levels: dict[int, np.ndarray]
    histogram: np.ndarray | None = None

    ARRAYS = ("mean", "weight", "basis", "variance", "sensitivity", "cost")
    FILE_ARRAYS = (*ARRAYS, "basis_scale")

    def __eq__(self, other) -> bool:
        return same_fields(self, other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.basis.shape))

    @property
    def name(self) -> str:
        return f"{self.group}.{self.rope}"

    def rounded(self) -> BasisSet:
        """The same with the precision of the file, so that a plan does not change when a profile is saved and loaded."""
        return BasisSet.from_file(self.to_file(), self.levels, **self.description())

    def description(self) -> dict:
        """What names this set in a header."""
        return {key: getattr(self, key) for key in ("group", "rope", "time", "block")}

    def to_file(self) -> dict[str, np.ndarray]:
        """Arrays as a file has them: the basis in 8 bits per entry (readers make it orthonormal again), cost as a share.

        Costs span many orders of magnitude; as a share of 4^-b * sensitivity * variance they are about 1.
        """
        scale = np.abs(self.basis).max(-2, keepdims=True) / 127  # a column of zeros stays one
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        share = np.where(self._loss() > 0, self.cost / np.where(self._loss() > 0, self._loss(), 1), 0)
        arrays = {key: np.ascontiguousarray(getattr(self, key), np.float32) for key in self.ARRAYS}
        if self.histogram is not None:
            arrays["histogram"] = np.ascontiguousarray(self.histogram, np.int64)
        return arrays | {
            "basis": np.round(self.basis / scale).astype(np.int8),
            "basis_scale": scale,
            "cost": np.clip(share, 0, 6e4).astype(np.float16),
        }

    @classmethod
    def from_file(cls, arrays: dict[str, np.ndarray], levels: dict[int, np.ndarray], **description) -> BasisSet:
        """Inverse of `to_file`."""
        fields: dict[str, Any] = {key: arrays[key] for key in cls.ARRAYS}
        fields["basis"] = arrays["basis"].astype(np.float32) * arrays["basis_scale"]
        made = cls(**description, **fields, levels=levels, histogram=arrays.get("histogram"))
        made.cost = (made.cost * made._loss()).astype(np.float32)
        return made

    def _loss(self) -> np.ndarray:
        """4^-b * sensitivity * variance [L, G, R, F, W] float32: roughly what b bits cost."""
        product = self.sensitivity.astype(np.float32) * self.variance.astype(np.float32)
        return product[..., None] * np.float32(4.0) ** -np.array(BIT_WIDTHS, np.float32)

    @property
    def rank(self) -> int:
        return self.basis.shape[-1]

    def channel_variance(self) -> np.ndarray:
        """Variance per component [L, G, R], averaged over the frequencies of a block."""
        sizes = band_sizes(self.block)
        return (self.variance * (sizes / self.block)).sum(-1)

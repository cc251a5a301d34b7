"""The profile: budget-independent facts about a model, in one safetensors file that both backends read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import __version__
from ..arrays.basis import effective_rank, rank_for_energy
from ..arrays.rope import Rope
from ..arrays.transform import band_sizes
from ..errors import UsageError
from ..files.container import FileFormat
from ..planning.methods import JOINT, PAIRS
from ..quantization.quantizer import BIT_WIDTHS
from .projection import Projection, get_projection

ON_REQUEST = {PAIRS: " --pairs", JOINT: " --joint"}  # options of basis sets that a profile has only when asked for
FORMAT_VERSION = 2
FORMAT = FileFormat("spectralkv-profile", FORMAT_VERSION, "profile", "spectralkv profile --model MODEL")


@dataclass(frozen=True)
class ModelShape:
    """Architecture numbers of a model: what a profile must agree with, whatever the weights' precision.

    layers: indices of the layers whose cache can be compressed; the others are passed through.
    """

    num_layers: int
    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[int, ...]
    rope: Rope | None

    def layer_groups(self, group: str) -> tuple[tuple[int, ...], ...]:
        """Indices of the layers that every row of a basis set of `group` (`methods.GROUPS`) stands for.

        One; for `layer2` and `layer4` up to so many that follow each other in the model, from the first on, what finds
        no neighbour staying alone; for `model` all. Raises UsageError for `layer2` where no two layers follow each other.
        """
        if group == "model":
            return (self.layers,)
        size = {"layer2": 2, "layer4": 4}.get(group, 1)
        groups: list[tuple[int, ...]] = []
        for layer_idx in self.layers:
            if groups and len(groups[-1]) < size and groups[-1][-1] == layer_idx - 1:
                groups[-1] += (layer_idx,)
            else:
                groups.append((layer_idx,))
        if group == "layer2" and all(len(layers) == 1 for layers in groups):
            raise UsageError(
                f"Expected layers that follow each other to pair, received the compressible layers "
                f"{', '.join(map(str, self.layers))}. Use spectral-dense or spectral-stored, which code every layer alone."
            )
        return tuple(groups)

    @property
    def fingerprint(self) -> str:
        """File-name part: the integers of the architecture and the slowest RoPE frequency to two digits."""
        slow = f"{self.rope.inv_freq[-1]:.1e}" if self.rope else "none"
        text = f"{self.num_layers}/{self.hidden_size}/{self.q_heads}/{self.kv_heads}/{self.head_dim}/{slow}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> dict:
        fields = {n: getattr(self, n) for n in ("num_layers", "hidden_size", "q_heads", "kv_heads", "head_dim")}
        return {**fields, "layers": list(self.layers), "rope": self.rope.to_json() if self.rope else None}

    @classmethod
    def from_json(cls, fields: dict) -> ModelShape:
        rope = Rope.from_json(fields["rope"]) if fields["rope"] else None
        return cls(**{**fields, "layers": tuple(fields["layers"]), "rope": rope})

    def mismatch(self, other: ModelShape, owner: str = "the profile") -> str | None:
        """What differs from `other`, as words, or None; `owner` is what this shape stands in."""
        for name in ("num_layers", "hidden_size", "q_heads", "kv_heads", "head_dim", "layers"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs}, {owner} has {mine}"
        if (self.rope is None) != (other.rope is None):
            return "no rotary embedding on one side"
        if self.rope is not None and not self.rope.matches(other.rope):
            return (
                f"RoPE frequencies ending in {other.rope.inv_freq[-1]:.4g} rad/token (rotary_dim {other.rope.rotary_dim}), "
                f"{owner} has {self.rope.inv_freq[-1]:.4g} (rotary_dim {self.rope.rotary_dim}); a checkpoint saved by "
                "transformers 5 keeps its RoPE base where mlx-lm does not look: load it with "
                "spectral_kv_mlx.load_model"
            )
        return None


@dataclass
class BasisSet:
    """Bases, spectra and sensitivities for one way of grouping vectors.

    L rows, one per tuple of `ModelShape.layer_groups`, G groups per row of m (side, head) members each, in the order K
    heads then V heads, those of a row's first layer first; Dg = m * head_dim channels, R components, F time bands,
    W = len(BIT_WIDTHS). A row of fewer layers than others fills the first members, channels and components.

    mean [L, G, Dg]; weight [L, G, m] scales every member before the basis; basis [L, G, Dg, R] orthonormal columns;
    variance, sensitivity [L, G, R, F]: E[y^2] of the coefficients and E[g^2] of the score gradient along them;
    cost [L, G, R, F, W]: E[g^2 (y - Q_b(y))^2] at every width b; the last two of bases per head times one factor for the keys
    and one for the values of a layer (`probing`); levels: quantizer tables in units of sigma;
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
        fields = {key: arrays[key] for key in cls.ARRAYS}
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


@dataclass
class QueryStatistics:
    """Queries before RoPE, times the attention scale; L compressible layers.

    mean [L, Hq, D]; root [L, H, D, D]: symmetric root of the covariance, averaged over the query heads of a KV head;
    amplitude [L, Hq, rotary_dim / 2]: mean length of every rotary pair (with the mean, the centres of TriAttention).
    """

    mean: np.ndarray
    root: np.ndarray
    amplitude: np.ndarray

    ARRAYS = ("mean", "root", "amplitude")

    def to_file(self) -> dict[str, np.ndarray]:
        """Arrays as a file has them."""
        return {
            key: np.ascontiguousarray(getattr(self, key), np.float16 if key == "root" else np.float32)
            for key in self.ARRAYS
        }


@dataclass
class Profile:
    """Facts about one model from which the plan of any method and budget follows; see README, "Profile file"."""

    shape: ModelShape
    model: str
    calibration: dict
    basis_sets: dict[str, BasisSet]
    queries: QueryStatistics | None = None
    weights_digest: str = ""
    library_version: str = __version__
    path: str | None = field(default=None, compare=False)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the profile to `path` (temporary name, then rename); returns the path."""
        arrays, sets = {}, {}
        for name, basis_set in self.basis_sets.items():
            arrays |= {f"{name}/{key}": array for key, array in basis_set.to_file().items()}
            for bits, levels in basis_set.levels.items():
                arrays[f"{name}/levels/{bits}"] = np.ascontiguousarray(levels, np.float32)
            sets[name] = basis_set.description()
        if self.queries is not None:
            arrays |= {f"queries/{key}": array for key, array in self.queries.to_file().items()}
        header = {
            "library_version": self.library_version,
            "model": self.model,
            "shape": self.shape.to_json(),
            "calibration": self.calibration,
            "weights_digest": self.weights_digest,
            "basis_sets": sets,
        }
        return FORMAT.save(path, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """Read and check a profile file.

        Raises FileNotFoundError, or ValueError for a file that is truncated, altered, of another kind or too new.
        """
        arrays, header = FORMAT.load(path)
        shape = ModelShape.from_json(header["shape"])
        sets = {}
        for name, fields in header["basis_sets"].items():
            levels = {b: arrays[f"{name}/levels/{b}"] for b in BIT_WIDTHS if b}
            held = {key: arrays[f"{name}/{key}"] for key in BasisSet.FILE_ARRAYS}
            held["histogram"] = arrays.get(f"{name}/histogram")
            sets[name] = BasisSet.from_file(held, levels, **fields)
            _check_sizes(sets[name], shape, path)
        return cls(
            shape,
            header["model"],
            header["calibration"],
            sets,
            QueryStatistics(*(arrays[f"queries/{key}"] for key in QueryStatistics.ARRAYS))
            if "queries/mean" in arrays
            else None,
            header["weights_digest"],
            header["library_version"],
            str(path),
        )

    def basis_set(self, name: str) -> BasisSet:
        """The basis set `name`; raises UsageError with what to do when the profile lacks it."""
        if name not in self.basis_sets:
            self.shape.layer_groups(name.split(".")[0])  # raises where another calibration would not help
            raise UsageError(
                f"Expected a profile with the basis set {name}, {self.path or 'this one'} has {', '.join(self.basis_sets)}. "
                f"Calibrate again: spectralkv profile --model {self.model}{ON_REQUEST.get(name, '')}"
            )
        return self.basis_sets[name]

    def get_projection(
        self, layer: int, head: int, side: str = "keys", rank: int | None = None, energy: float | None = None
    ) -> Projection:
        """Components of the keys (after RoPE) or values of one KV head, for `SpectralKVCompressor`.

        As many as hold the share `energy` of the variance (default: the profiler's target), or `rank`. Raises UsageError
        for a layer or head that the profile lacks.
        """
        return get_projection(self, layer, head, side, rank, energy)

    def check(self, shape: ModelShape) -> None:
        """Raise UsageError unless the profile was made for a model of this `shape`."""
        difference = self.shape.mismatch(shape)
        if difference:
            raise UsageError(
                f"Expected a profile of this model, {self.path or 'the one given'} is for {self.model}: the model has "
                f"{difference}. Calibrate this model: spectralkv profile --model MODEL"
            )

    def summary(self, energy: float | None = None) -> str:
        """A few lines about the spectra: effective rank and rank at `energy` (default: the profiler's target)."""
        energy = energy or self.calibration.get("target_energy", 0.95)
        shape = self.shape
        lines = [
            f"SpectralProfile: {self.model}",
            f"  Architecture: {shape.num_layers} layers ({len(shape.layers)} compressible), {shape.q_heads} query heads, "
            f"{shape.kv_heads} KV heads, head_dim {shape.head_dim}",
            f"  Calibration: {self.calibration.get('tokens', 0):,} tokens of {self.calibration.get('text', 'unknown text')}",
        ]
        for basis_set in self.basis_sets.values():
            variance = basis_set.channel_variance()
            half = variance.shape[1] // 2
            sides = {"keys": variance[:, :half], "values": variance[:, half:]} if half else {"both": variance}
            for side, v in sides.items():
                rank, effective = rank_for_energy(v, energy), effective_rank(v)
                lines.append(
                    f"  {basis_set.name} {side}: rank at {energy:.0%} energy median {int(np.median(rank))}, range "
                    f"[{rank.min()}, {rank.max()}] of {v.shape[-1]}; effective rank median {np.median(effective):.1f}"
                )
        return "\n".join(lines)


def _check_sizes(basis_set: BasisSet, shape: ModelShape, path: str | os.PathLike) -> None:
    rows, groups, channels, rank = basis_set.basis.shape
    bands = len(band_sizes(basis_set.block))
    layer_groups = shape.layer_groups(basis_set.group)
    heads = 2 * shape.kv_heads * max(map(len, layer_groups))
    members = heads // groups
    expected = {
        "mean": (rows, groups, channels),
        "weight": (rows, groups, members),
        "variance": (rows, groups, rank, bands),
        "sensitivity": (rows, groups, rank, bands),
        "cost": (rows, groups, rank, bands, len(BIT_WIDTHS)),
    }
    found = {name: getattr(basis_set, name).shape for name in expected}
    whole = rows == len(layer_groups) and groups * channels == heads * shape.head_dim
    if found != expected or not whole:
        raise UsageError(f"Expected arrays that fit the model shape in the header, {path} has {found}. Make it again.")

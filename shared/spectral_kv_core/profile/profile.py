"""The profile: budget-independent facts about a model, in one safetensors file that both backends read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import __version__
from ..arrays.basis import effective_rank, orthonormalize, rank_for_energy
from ..arrays.equality import same_fields
from ..errors import UsageError
from ..files.checks import Wrong, checking, require_finite
from ..files.container import FileFormat
from ..quantization.quantizer import BIT_WIDTHS
from .basis_set import ON_REQUEST, BasisSet
from .file_checks import check_arrays, check_basis_set, check_header, shape_of
from .model_shape import ModelShape
from .projection import SIDES, Projection

FORMAT_VERSION = 2
FORMAT = FileFormat("spectralkv-profile", FORMAT_VERSION, "profile", "spectralkv profile --model MODEL")


@dataclass(eq=False)
class QueryStatistics:
    """Queries before RoPE, times the attention scale; L compressible layers.

    mean [L, Hq, D]; root [L, H, D, D]: symmetric root of the covariance, averaged over the query heads of a KV head;
    amplitude [L, Hq, rotary_dim / 2]: mean length of every rotary pair (with the mean, the centers of TriAttention).
    """

    mean: np.ndarray
    root: np.ndarray
    amplitude: np.ndarray

    ARRAYS = ("mean", "root", "amplitude")

    def __eq__(self, other) -> bool:
        return same_fields(self, other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.mean.shape, self.root.shape))

    def to_file(self) -> dict[str, np.ndarray]:
        """Arrays as a file has them."""
        return {
            key: np.ascontiguousarray(getattr(self, key), np.float16 if key == "root" else np.float32)
            for key in self.ARRAYS
        }


@dataclass(eq=False)
class Profile:
    """Facts about one model from which the plan of any method and budget follows: one file, read by both backends.

    Args:
        shape: Architecture numbers, which a model must agree with.
        model: Name of the model, for messages.
        calibration: The text, the tokens and the options that the profile was made with.
        basis_sets: Bases, spectra and costs by name, such as `head.post`. `BasisSet` gives the shapes.
        queries: Statistics of the queries before RoPE; None in older files. `QueryStatistics` gives the shapes.
        weights_digest: Hash of the weights that were read; empty where it is not known.
        library_version: The version of spectralkv that made the profile.
        path: The file that it came from; None for one in memory.

    Raises:
        FileNotFoundError: `load` finds no file.
        UsageError: `load` finds a file that is damaged or of another version, `check` a model of another shape,
            `basis_set` and `get_projection` something that the profile does not have.

    Examples:
        >>> from spectral_kv_torch import SpectralProfile  # spectral_kv_mlx has the same
        >>> from spectral_kv_core.profile.store import packaged_profiles
        >>> profile = SpectralProfile.load(packaged_profiles()[0])
        >>> profile.shape.num_layers, profile.shape.kv_heads, profile.shape.head_dim
        (30, 3, 64)
        >>> profile.get_projection(layer=8, head=0, energy=0.9).basis.shape  # [head_dim, rank]
        (64, 50)
    """

    shape: ModelShape
    model: str
    calibration: dict
    basis_sets: dict[str, BasisSet]
    queries: QueryStatistics | None = None
    weights_digest: str = ""
    library_version: str = __version__
    path: str | None = field(default=None, compare=False)

    def __eq__(self, other) -> bool:
        """Whether all is the same to the bit, wherever it came from."""
        return same_fields(self, other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.shape, self.model, self.weights_digest))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the profile to `path` (temporary name, then rename); returns the path. Raises UsageError for NaN."""
        arrays: dict[str, np.ndarray] = {}
        sets = {}
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
        try:
            for name, array in arrays.items():
                require_finite(array, name)
        except Wrong as error:
            raise UsageError(f"Expected {error}. Nothing was saved: check the weights and calibrate again.") from None
        return FORMAT.save(path, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Profile:
        """Read and check a profile file.

        Raises FileNotFoundError, or UsageError for a file that is truncated, altered, of another kind or too new.
        """
        arrays, header = FORMAT.load(path)
        with checking(path, FORMAT.making(path)):
            check_header(header)
            shape = shape_of(header["shape"])
            check_arrays(arrays, header, shape)
            sets = {name: _set_from(arrays, name, fields) for name, fields in header["basis_sets"].items()}
            for basis_set in sets.values():
                check_basis_set(basis_set)
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
        shape = self.shape
        if layer not in shape.layers:
            known = ", ".join(map(str, shape.layers))
            raise UsageError(f"Expected a compressible layer of {self.model}, one of {known}, received {layer!r}.")
        if head not in range(shape.kv_heads):
            raise UsageError(f"Expected a KV head between 0 and {shape.kv_heads - 1}, received {head!r}.")
        if side not in SIDES:
            raise UsageError(f"Expected a side of {SIDES}, received {side!r}.")
        basis_set = self.basis_set("head.post")
        layer_group, group = shape.layers.index(layer), head + shape.kv_heads * SIDES.index(side)
        variance = basis_set.channel_variance()[layer_group, group].astype(np.float64)
        if rank is None:
            energy = energy or self.calibration.get("target_energy", 0.95)
            if not 0 < energy <= 1:
                raise UsageError(f"Expected an energy in (0, 1], received {energy}.")
            rank = int(rank_for_energy(variance, energy))
        elif energy is not None:
            raise UsageError("Expected rank or energy, received both.")
        if rank not in range(1, basis_set.rank + 1):
            raise UsageError(f"Expected a rank between 1 and {basis_set.rank}, received {rank!r}.")
        basis = orthonormalize(basis_set.basis[layer_group, group])[:, :rank]
        mean = basis_set.mean[layer_group, group].astype(np.float64)
        return Projection(self.model, layer, head, side, mean, basis, variance[:rank], basis_set.levels)

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


def _set_from(arrays: dict[str, np.ndarray], name: str, fields: dict) -> BasisSet:
    levels = {b: arrays[f"{name}/levels/{b}"] for b in BIT_WIDTHS if b}
    keys = [*BasisSet.FILE_ARRAYS, *["histogram"] * (f"{name}/histogram" in arrays)]
    return BasisSet.from_file({key: arrays[f"{name}/{key}"] for key in keys}, levels, **fields)

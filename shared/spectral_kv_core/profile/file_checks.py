"""What a profile file must say: sizes, ranges, and bases that are orthonormal."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from ..arrays.transform import TIME_TRANSFORMS, band_sizes
from ..errors import UsageError
from ..files.checks import Wrong, number, require, require_fields, require_finite, whole
from ..quantization.quantizer import BIT_WIDTHS
from .basis_set import GROUPS, HISTOGRAM_BINS, LONGEST_BLOCK, ROPES, BasisSet
from .model_shape import ModelShape

HEADER = {
    "library_version": str, "model": str, "shape": dict, "calibration": dict, "weights_digest": str, "basis_sets": dict,
}  # fmt: skip
LEAST_NORM, MOST_NORM = 0.9, 1.1  # of a column of a basis; 8 bits per entry change less than a hundredth
MOST_LEAK = 0.5  # of other columns in one, the sum over all; 0.1 of rounding, 1 where two columns are one


def check_header(header: dict) -> None:
    """Raise `Wrong` unless `header` has the fields of a profile, with sizes that can be worked with."""
    require_fields(header, HEADER, "the header")
    require(header["basis_sets"], "basis sets in the header")
    calibration = header["calibration"]
    require("tokens" not in calibration or whole(calibration["tokens"]), "a number of tokens in calibration")
    energy = calibration.get("target_energy", 1)
    require(number(energy, 0, 1), "a target_energy in (0, 1] in calibration")
    for name, fields in header["basis_sets"].items():
        require_fields(fields, {"group": str, "rope": str, "time": str, "block": int}, f"basis set {name:.40}")
        require(len(fields) == 4 and name == f"{fields['group']}.{fields['rope']}", "basis sets called group.rope")
        require(fields["group"] in GROUPS and fields["rope"] in ROPES, f"a known group and rope in {name:.40}")
        block, time = fields["block"], fields["time"]
        require(whole(block, 1, LONGEST_BLOCK) and block & (block - 1) == 0, f"a block of tokens in {name:.40}")
        require(time in TIME_TRANSFORMS and (time == "none") == (block == 1), f"a time transform in {name:.40}")


def check_arrays(arrays: dict[str, np.ndarray], header: dict, shape: ModelShape) -> None:
    """Raise `Wrong` unless the arrays are those of the header and of `shape`, and no others."""
    expected: dict[str, tuple] = {}
    for name, fields in header["basis_sets"].items():
        expected |= {f"{name}/{key}": value for key, value in _set_arrays(name, fields, arrays, shape).items()}
    if "queries/mean" in arrays:
        layers, dim = len(shape.layers), shape.head_dim
        pairs = shape.rotary_pairs
        expected["queries/mean"] = (layers, shape.q_heads, dim), "float32"
        expected["queries/root"] = (layers, shape.kv_heads, dim, dim), "float16"
        expected["queries/amplitude"] = (layers, shape.q_heads, pairs), "float32"
    for name in sorted({*expected, *arrays}):
        found = (arrays[name].shape, arrays[name].dtype.name) if name in arrays else None
        wanted = expected.get(name)
        if found != wanted:
            raise Wrong(
                f"arrays that fit the model shape in the header, {wanted or 'nothing'} as {name:.80}, not "
                f"{found or 'nothing'}"
            )
    for name, x in arrays.items():
        key = name.rpartition("/")[2]
        positive = key in ("variance", "sensitivity", "cost", "histogram", "amplitude")
        require_finite(x, name, 0 if positive else -1e18)


def _set_arrays(name: str, fields: dict, arrays: dict[str, np.ndarray], shape: ModelShape) -> dict[str, tuple]:
    """Shape and dtype of every array of a basis set; the groups and components are those of its basis."""
    basis = arrays.get(f"{name}/basis")
    require(basis is not None and basis.ndim == 4, f"a basis of four axes in {name}")
    assert basis is not None
    rows, groups, channels, rank = basis.shape
    try:
        layer_groups = shape.layer_groups(fields["group"])
    except UsageError:
        raise Wrong(f"layers that follow each other for {name}") from None
    heads = 2 * shape.kv_heads * max(map(len, layer_groups))
    whole_groups = groups > 0 and heads % groups == 0 and channels == heads // groups * shape.head_dim
    fits = rows == len(layer_groups) and whole_groups and 0 < rank <= channels
    require(fits, f"arrays that fit the model shape in the header, not {basis.shape} as {name}/basis")
    lead, bands, f32 = (rows, groups), len(band_sizes(fields["block"])), "float32"
    made: dict[str, tuple] = {
        "mean": ((*lead, channels), f32),
        "weight": ((*lead, heads // groups), f32),
        "basis": (basis.shape, "int8"),
        "basis_scale": ((*lead, 1, rank), f32),
        "variance": ((*lead, rank, bands), f32),
        "sensitivity": ((*lead, rank, bands), f32),
        "cost": ((*lead, rank, bands, len(BIT_WIDTHS)), "float16"),
        **{f"levels/{bits}": ((2**bits,), f32) for bits in BIT_WIDTHS if bits},
    }
    return made | ({"histogram": ((HISTOGRAM_BINS,), "int64")} if f"{name}/histogram" in arrays else {})


def check_basis_set(basis_set: BasisSet) -> None:
    """Raise `Wrong` unless the set, read from a file whose arrays fit, can be worked with."""
    name = basis_set.name
    require(basis_set.weight.min() > 0, f"weights above 0 in {name}")
    for bits, levels in basis_set.levels.items():
        require((np.diff(levels) >= 0).all() and levels[-1] > levels[0], f"levels that ascend in {name}/levels/{bits}")
    if basis_set.histogram is not None:
        require(basis_set.histogram[1:].any(), f"counts in {name}/histogram")
    for row in range(len(basis_set.basis)):
        _check_basis(basis_set.basis[row], basis_set.variance[row], f"row {row} of {name}/basis")


def _check_basis(basis: np.ndarray, variance: np.ndarray, where: str) -> None:
    """Raise `Wrong` unless `basis` [G, Dg, R] is orthonormal; what has no variance [G, R, F] may be 0.

    Signs at random instead of all pairs of columns, which would take longer than the plan: basis' basis s = s, but for
    the rounding of a basis that is orthonormal.
    """
    norms = np.sqrt(np.square(basis).sum(1))  # [G, R]
    used = (norms > 0) | (variance.sum(-1) > 0)
    right = (norms[used] > LEAST_NORM).all() and (norms[used] < MOST_NORM).all()
    require(right, f"columns of length 1 in {where}")
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (*used.shape, 4)) * used[..., None]
    again = np.swapaxes(basis, 1, 2) @ (basis @ signs)
    require(np.abs(again - signs).max(initial=0) < MOST_LEAK, f"orthonormal columns in {where}")


def shape_of(fields: Any) -> ModelShape:
    """The shape that a header has; raises `Wrong` for sizes that no model has."""
    sizes = ("num_layers", "hidden_size", "q_heads", "kv_heads", "head_dim")
    require_fields(fields, {**dict.fromkeys(sizes, int), "layers": list}, "shape")
    require(set(fields) - {"ropes", "widths"} == {*sizes, "layers", "rope"}, "the fields of a shape and no others")
    require(all(whole(fields[name], 1, 1 << 20) for name in sizes), "sizes above 0 in shape")
    require(fields["q_heads"] % fields["kv_heads"] == 0, "query heads that the KV heads divide in shape")
    layers, most = fields["layers"], fields["num_layers"] - 1
    require(all(whole(layer, 0, most) for layer in layers) and layers, "indices of layers in shape")
    require(all(a < b for a, b in pairwise(layers)), "layers that ascend in shape")
    dim = fields["head_dim"]
    widths = fields.get("widths", [1, dim])
    two = isinstance(widths, list) and len(widths) == 2 and all(whole(width, 1, dim) for width in widths)
    require(
        two and max(widths) == dim and (widths[0] != widths[1] or "widths" not in fields), "widths of keys and values"
    )
    others = fields.get("ropes", [])
    pairs = isinstance(others, list) and all(isinstance(one, list) and len(one) == 2 for one in others)
    require(
        pairs and [i for i, _ in others] == sorted({i for i, _ in others if i in layers}), "layers with other ropes"
    )
    for rope in (fields["rope"], *(rope for _, rope in others)):
        _check_rope(rope, fields["head_dim"])
    return ModelShape.from_json(fields)


def _check_rope(rope: Any, head_dim: int) -> None:
    """Raise `Wrong` for a rotation that no model has."""
    if rope is not None:
        require_fields(rope, {"inv_freq": list, "interleaved": bool}, "rope")
        require(set(rope) == {"inv_freq", "interleaved", "scaling"}, "the fields of a RoPE and no others")
        frequencies = rope["inv_freq"]
        fits = frequencies and 2 * len(frequencies) <= head_dim
        numbers = fits and all(number(f, -1e3, 1e3) for f in frequencies)
        one_way = numbers and (min(frequencies) >= 0 or max(frequencies) <= 0)  # some models turn backwards
        require(one_way, "RoPE frequencies of the head's channels")
        require(number(rope["scaling"], 0, 1e3), "a scaling of RoPE above 0")

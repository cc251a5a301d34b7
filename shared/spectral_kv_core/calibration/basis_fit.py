"""From captured keys, values and score gradients to basis sets: one layer in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO

import numpy as np

from ..arrays import ops
from ..arrays.basis import fit_basis
from ..arrays.rope import Rope, shift, unrotate
from ..arrays.transform import band_sizes, octave_bands, time_matrix, to_frequency
from ..errors import UsageError
from ..profile.basis_set import GROUPS, HISTOGRAM_BINS, HISTOGRAM_LIMIT, BasisSet
from ..profile.model_shape import ModelShape
from ..quantization.quantizer import BIT_WIDTHS, empirical_tables, thresholds
from .moments import Moments
from .spool import Spool

SKIP = 4  # attention sinks of a document: outliers that the cache keeps exactly
SPREAD = 4  # places that a document is moved to, for post-RoPE keys
THIN_TOKENS, THIN_VECTORS = 1024, 8  # tokens in all, and per channel of a head, below which text is thin
TAIL = 1 / 16  # share of all coefficients that lie as a Laplace density has them, where text is thin
LEAST = 1e-6  # of a group's mean variance: what no coefficient stays below, where the group moves at all


def thin_below(head_dim: int) -> int:
    """Tokens of text below which statistics of heads of `head_dim` channels flatter themselves."""
    return max(THIN_TOKENS, THIN_VECTORS * head_dim)


def fit_basis_set(
    spool: Spool,
    shape: ModelShape,
    group: str = "head",
    rope: str = "post",
    time: str = "dct",
    block: int = 16,
    positions: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> BasisSet:
    """Means, bases, spectra, sensitivities and measured quantization costs of one way of grouping vectors.

    The basis is the PCA of mean-removed vectors; in a shared basis every (side, head) is scaled by the root of its mean
    squared gradient first, so that what matters more is better resolved (docs/decisions/rate-distortion-2.md, section 1).

    Post-RoPE keys turn with their position, slow pairs by less than a turn over a document: a basis fitted to the first
    positions misses what comes later. Every document is therefore taken `SPREAD` times, moved to places spread over
    the first `positions` tokens (0: left where it is); moving is exact, RoPE being a rotation.

    Axes through few vectors flatter themselves: on other text the last ones have many times the variance. Where text is
    thin, spectra and costs are therefore those of each half of it on axes of the other half (Bartz and Mueller 2014), and
    the quantizers reach further than what little was seen.
    """
    if group not in GROUPS:
        raise UsageError(f"Expected a group in {GROUPS}, received {group!r}.")
    result, layer_groups = _empty_set(shape, group, rope, time, block), shape.layer_groups(group)
    thin = spool.tokens < thin_below(shape.head_dim) * 3 // 4  # a fourth of a short document is scored
    pooled, groups = np.zeros(HISTOGRAM_BINS, np.int64), result.mean.shape[1]
    copies = SPREAD if rope == "post" and shape.rotary_pairs and positions else 1
    with tempfile.TemporaryFile() as shelf:  # histograms wait here for the tables that they are costed with
        for layer_group, layers in enumerate(progress(layer_groups)):
            numbers = tuple(map(shape.layers.index, layers))
            documents = _Documents(
                spool, numbers, shape, shape.common_rope(layers), rope == "pre", groups, block, positions, copies
            )
            part = _narrowed(result, 2 * shape.kv_heads * len(layers) // groups, shape.head_dim)
            _fit_basis(part, layer_group, documents)
            sources = _crossed(part, layer_group, documents) if thin else [(part, documents)]
            np.save(shelf, _fit_spectrum(part, layer_group, sources, pooled))
        result.levels, result.histogram = empirical_tables(_tailed(pooled) if thin else pooled, HISTOGRAM_LIMIT), pooled
        shelf.seek(0)
        _fit_costs(result, shelf)
    return result.rounded()


def _empty_set(shape: ModelShape, group: str, rope: str, time: str, block: int) -> BasisSet:
    """A basis set of full rank that has its sizes and nothing in it."""
    layer_groups = shape.layer_groups(group)
    count, heads = len(layer_groups), 2 * shape.kv_heads * max(map(len, layer_groups))
    groups = {"head": heads, "side": 2}.get(group, 1)
    members = heads // groups
    channels, bands = members * shape.head_dim, len(band_sizes(block))
    return BasisSet(
        group,
        rope,
        time,
        block,
        mean=np.zeros((count, groups, channels), np.float32),
        weight=np.ones((count, groups, members), np.float32),
        basis=np.zeros((count, groups, channels, channels), np.float32),
        variance=np.zeros((count, groups, channels, bands), np.float32),
        sensitivity=np.zeros((count, groups, channels, bands), np.float32),
        cost=np.zeros((count, groups, channels, bands, len(BIT_WIDTHS)), np.float32),
        levels={},
    )


@dataclass(frozen=True)
class _Documents:
    """The documents of a group's layers as `_grouped` gives them, read again at every iteration to keep one in memory.

    numbers: of the layers among the compressible ones. half: every second document, or of a single one the first or last
    tokens; None for all.
    """

    spool: Spool
    numbers: tuple[int, ...]
    shape: ModelShape
    rope: Rope | None
    unrotated: bool
    groups: int
    block: int
    positions: int
    copies: int
    half: int | None = None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        places = self.spool.documents * self.copies
        for d, (x, g) in enumerate(self.spool.read(*self.numbers)):
            if self.half is not None and self.spool.documents > 1 and d % 2 != self.half:
                continue
            for i in range(self.copies):
                # squares: half of the places lie in the first quarter, where most contexts end
                offset = (d * self.copies + i) ** 2 * self.positions // places**2
                moved = _grouped(x, g, self.shape, self.rope, self.unrotated, self.groups, self.block, offset)
                yield moved if self.half is None or self.spool.documents > 1 else self._part(*moved)

    def _part(self, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first or the last blocks of a document."""
        middle = x.shape[-2] // self.block // 2 * self.block
        part = slice(middle) if self.half == 0 else slice(middle, None)
        return x[..., part, :], g[..., part, :]


def _grouped(x, gradients, shape, rope, unrotated, groups, block, offset):
    """Vectors [G, T, Dg] and gradients [S, G, T, Dg] of the tokens of a document that a cache would have sealed.

    unrotated: as they are before `rope`; else as they would be `offset` positions later.
    """
    heads = x.shape[0] // 2
    if rope is None:
        pass
    elif unrotated:
        scaling = rope.scaling  # k_post = s R k_pre, hence the gradient turns back and is scaled by s
        x = np.concatenate([unrotate(ops, x[:heads], rope, 0), x[heads:]])
        turned = unrotate(ops, gradients[:, :heads], rope, 0) * scaling**2
        gradients = np.concatenate([turned, gradients[:, heads:]], axis=1)
    elif offset:
        x = np.concatenate([shift(ops, x[:heads], rope, offset), x[heads:]])
        turned = shift(ops, gradients[:, :heads], rope, offset)
        gradients = np.concatenate([turned, gradients[:, heads:]], axis=1)
    tokens = (x.shape[1] - SKIP) // block * block

    def gather(a):
        a = a[..., SKIP : SKIP + tokens, :]
        a = a.reshape(*a.shape[:-3], groups, -1, tokens, shape.head_dim)
        return np.moveaxis(a, -3, -2).reshape(*a.shape[:-4], groups, tokens, -1)

    return gather(x), gather(gradients)


def _coefficients(basis_set: BasisSet, layer_group: int, x: np.ndarray) -> np.ndarray:
    """[..., G, T, Dg] -> [..., G, n, block, R] with the basis and the time transform of `basis_set`."""
    return to_frequency(ops, x @ basis_set.basis[layer_group], time_matrix(basis_set.time, basis_set.block))


def _weights(basis_set: BasisSet, layer_group: int) -> np.ndarray:
    members = basis_set.weight.shape[-1]
    return np.repeat(basis_set.weight[layer_group], basis_set.mean.shape[-1] // members, axis=-1)[:, None, :]


def _narrowed(basis_set: BasisSet, members: int, head_dim: int) -> BasisSet:
    """The first `members` of every group: views, which are filled for a layer group that has no more."""
    channels = members * head_dim
    return replace(
        basis_set,
        mean=basis_set.mean[..., :channels],
        weight=basis_set.weight[..., :members],
        basis=basis_set.basis[..., :channels, :channels],
        variance=basis_set.variance[:, :, :channels],
        sensitivity=basis_set.sensitivity[:, :, :channels],
    )


def _fit_basis(basis_set: BasisSet, layer_group: int, documents: _Documents) -> None:
    members = basis_set.weight.shape[-1]
    moments, energy = Moments(), []
    for x, g in documents:
        moments.update(x)
        energy.append(np.square(g).mean(axis=(0, 2), dtype=np.float64))  # [G, Dg]
    if members > 1:
        weight = np.sqrt(np.mean(energy, axis=0).reshape(-1, members, basis_set.mean.shape[-1] // members).mean(-1))
        weight = weight / np.maximum(weight.mean(-1, keepdims=True), 1e-30)
        basis_set.weight[layer_group] = np.maximum(weight, 1e-3)  # a head without gradient stays decodable
    weights = _weights(basis_set, layer_group).astype(np.float64)
    basis_set.mean[layer_group] = moments.mean
    basis_set.basis[layer_group], _ = fit_basis(moments.covariance * np.swapaxes(weights, -1, -2) * weights)


def _crossed(basis_set: BasisSet, layer_group: int, documents: _Documents) -> list[tuple[BasisSet, _Documents]]:
    """Each half of `documents`, with the mean and the axes that the other half gives."""
    sources = []
    for half in (0, 1):
        fitted = replace(basis_set, mean=basis_set.mean.copy(), basis=basis_set.basis.copy())
        _fit_basis(fitted, layer_group, replace(documents, half=1 - half))
        sources.append((fitted, replace(documents, half=half)))
    return sources


def _tailed(histogram: np.ndarray) -> np.ndarray:
    """`histogram` of |x| in deviations with a share `TAIL` of it spread as a Laplace density has it."""
    edges = np.linspace(0, HISTOGRAM_LIMIT, len(histogram) + 1)
    laplace = -np.diff(np.exp(-np.sqrt(2) * edges))
    return (1 - TAIL) * histogram + TAIL * histogram.sum() * laplace


def _fit_spectrum(
    basis_set: BasisSet, layer_group: int, sources: list[tuple[BasisSet, _Documents]], pooled: np.ndarray
) -> np.ndarray:
    """Variance and sensitivity of every band, and E[g^2] by the cell that |coefficient| / sigma lies in.

    sources: documents, each time with what has the mean and axes for them. Adds the plain histogram of the cells to
    `pooled`. Returns [G, R, F, cells] float32.
    """
    weights, bands, sizes = _weights(basis_set, layer_group), octave_bands(basis_set.block), band_sizes(basis_set.block)

    def spectra():  # made twice, so that one document is in memory at a time
        for fitted, documents in sources:
            for x, g in documents:
                y = _coefficients(fitted, layer_group, (x - fitted.mean[layer_group][:, None]) * weights)
                yield y, np.square(_coefficients(fitted, layer_group, g / weights)).mean(0)  # over label samples

    energy, slope, count = np.zeros(()), np.zeros(()), 0
    for y, importance in spectra():
        energy = energy + np.square(y).sum(1, dtype=np.float64)
        slope = slope + importance.sum(1, dtype=np.float64)
        count += y.shape[1]
    variance = _per_band(energy / count, bands)
    least = LEAST * variance.mean((-1, -2), keepdims=True)
    moves = (variance > least)[..., bands].transpose(0, 2, 1)[:, None]  # [G, 1, F, R]
    basis_set.variance[layer_group] = np.maximum(variance, least)
    basis_set.sensitivity[layer_group] = _per_band(slope / count, bands)
    groups, rank, number = basis_set.variance.shape[1:]
    sigma = np.sqrt(basis_set.variance[layer_group])[..., bands].transpose(0, 2, 1)[:, None]  # [G, 1, F, R]
    cells = np.float32(HISTOGRAM_BINS / HISTOGRAM_LIMIT) / np.where(sigma > 0, sigma, 1)
    first = (np.arange(groups)[:, None, None] * rank + np.arange(rank)) * number + bands[:, None]
    first = (first * HISTOGRAM_BINS)[:, None]  # [G, 1, F, R]
    weighted = np.zeros(groups * rank * number * HISTOGRAM_BINS)
    for y, importance in spectra():
        cell = np.minimum(np.abs(y) * cells, HISTOGRAM_BINS - 1).astype(np.int64)
        moved = cell[np.broadcast_to(moves, cell.shape)]
        pooled += np.bincount(moved, minlength=HISTOGRAM_BINS)  # constants would pile up at zero
        weighted += np.bincount((cell + first).reshape(-1), importance.reshape(-1), minlength=len(weighted))
    return (weighted.reshape(groups, rank, number, -1) / (count * sizes[:, None])).astype(np.float32)


def _per_band(x: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """Mean over the frequencies of every band: [G, block, R] -> [G, R, F]."""
    return np.stack([x[:, bands == f].mean(1) for f in range(bands.max() + 1)], axis=-1)


def _fit_costs(basis_set: BasisSet, shelf: IO[bytes]) -> None:
    """Costs of every layer group from its histogram on the `shelf`, as `_fit_spectrum` left it, and the tables of the set."""
    errors = _cell_errors(basis_set.levels)
    for cost, variance in zip(basis_set.cost, basis_set.variance):
        weighted = np.load(shelf)  # [G, R, F, cells], R of this layer group
        rank = weighted.shape[1]
        cost[:, :rank] = (weighted @ errors) * variance[:, :rank, :, None]


def _cell_errors(levels: dict[int, np.ndarray]) -> np.ndarray:
    """Mean squared error of every width within every cell of the histogram, in variances: [cells, W] float32."""
    fine = 8
    x = (np.arange(HISTOGRAM_BINS * fine) + 0.5) * (HISTOGRAM_LIMIT / HISTOGRAM_BINS / fine)
    errors = [x if not b else x - levels[b][np.searchsorted(thresholds(levels[b]), x)] for b in BIT_WIDTHS]
    return np.stack([np.square(e).reshape(-1, fine).mean(1) for e in errors], axis=1).astype(np.float32)

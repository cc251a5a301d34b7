"""Codecs: keys and values of sealed tokens <-> packed codes, written once for every array library.

A codec turns blocks of tokens into a `Chunk` and back; chunks grow by whole blocks until they are full and are never
re-quantized. `xp` is `spectral_kv_core.arrays.ops` or a backend's module of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from operator import add
from typing import Any

import numpy as np

from ..arrays import attention
from ..arrays.basis import orthonormalize
from ..arrays.rope import rotate, unrotate
from ..arrays.transform import octave_bands, time_matrix, to_frequency, to_time
from ..planning.methods import get_live_method
from ..planning.plan import Plan
from ..profile.basis_set import BasisSet
from ..quantization import trellis
from ..quantization.packing import append_rows, pack, pack_rows, unpack, unpack_rows
from ..quantization.quantizer import RowTables, dequantize, dequantize_affine, quantize_affine
from ..quantization.time_rounding import TokenWeights, round_in_time

CHUNK_TOKENS = 1024  # tokens of a full chunk: the unit that is decoded at a time
TILE_CHUNKS = 8  # chunks that are coded at a time where small operations cost more than memory


@dataclass(frozen=True, eq=False)
class Chunk:
    """Packed codes of `tokens` tokens; arrays have the batch first.

    start: position of the first token, those of the others follow; or, where tokens in between were dropped, the
    positions of all, int32 [B, H, tokens], with one head for all where the codec keeps heads together.
    """

    batch: int
    start: Any
    tokens: int
    arrays: tuple

    @property
    def held(self) -> tuple:
        """Every array, positions included."""
        return self.arrays if isinstance(self.start, int) else (*self.arrays, self.start)


@dataclass
class Axes:
    """Keys and values of one layer's `heads` <-> latents, in `groups` that share a basis.

    mean, weight: [G, 1, Dg], the latter None for 1 everywhere; basis: [G, Dg, R].
    """

    xp: Any
    heads: int
    mean: Any
    basis: Any
    weight: Any

    def latents(self, keys, values):
        """Latents [B, G, T, R] of keys and values [B, H, T, D]."""
        xp, (groups, channels, _) = self.xp, self.basis.shape
        x = xp.concat([keys, values], axis=1)
        batch, _, tokens, dim = x.shape
        x = x.reshape(batch, groups, -1, tokens, dim)
        x = xp.permute_dims(x, (0, 1, 3, 2, 4)).reshape(batch, groups, tokens, channels)
        x = x - self.mean if self.weight is None else (x - self.mean) * self.weight
        return xp.matmul(x, self.basis)

    def vectors(self, z):
        """Keys and values [B, H, T, D] of latents [B, G, T, R]."""
        xp, (batch, groups, tokens, _) = self.xp, z.shape
        x = xp.matmul(z, xp.permute_dims(self.basis, (0, 2, 1)))
        x = x + self.mean if self.weight is None else x / self.weight + self.mean
        x = x.reshape(batch, groups, tokens, 2 * self.heads // groups, -1)
        x = xp.permute_dims(x, (0, 1, 3, 2, 4)).reshape(batch, 2 * self.heads, tokens, -1)
        return x[:, : self.heads], x[:, self.heads :]

    def arrays(self) -> list:
        return [x for x in (self.mean, self.basis, self.weight) if x is not None]


class TransformCodec:
    """Keys and values of a row's layers <-> coefficients: basis across channels, transform over blocks of time.

    H counts the heads of all layers that the row stands for, its first layer's first; `axes` has those of each layer.
    Components of which the plan stores no coefficient are never computed.
    """

    def __init__(self, xp, plan: Plan, row: int, like=None):
        basis_set, method = plan.basis_set, plan.method
        self.xp, self.method, self.block = xp, method, basis_set.block
        self.rope = plan.shape.rope
        self.layers = len(plan.layer_groups[row])
        self.kv_heads, self.head_dim = plan.shape.kv_heads * self.layers, plan.shape.head_dim
        self.groups = basis_set.mean.shape[1]
        members = 2 * self.kv_heads // self.groups  # the first ones of a row that has fewer layers than others

        def table(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        kept = kept_components(plan.coded[row])  # [G, R]
        self.rank = kept.shape[1]
        basis = np.take_along_axis(orthonormalize(basis_set.basis[row]), kept[:, None], -1)  # [G, Dg, R]
        weight = np.repeat(basis_set.weight[row, :, :members], self.head_dim, axis=-1)[:, None]  # [G, 1, Dg]
        mean = basis_set.mean[row][:, None]
        channels = np.arange(members * self.head_dim)  # keys of all layers, then values
        if self.layers > 1:
            channels = channels.reshape(2, self.layers, -1).swapaxes(0, 1)
        self.axes = [
            Axes(
                xp,
                plan.shape.kv_heads,
                table(mean[..., own]),
                table(basis[:, own]),
                None if np.all(weight[..., own] == 1) else table(weight[..., own]),
            )
            for own in channels.reshape(self.layers, -1)
        ]
        self.time = table(time_matrix(basis_set.time, basis_set.block))

        self.normalize = table(1 / deviations(basis_set, row, kept)[:, None])  # [G, 1, F, R]
        self.weigh = TokenWeights(xp, plan, row, table) if plan.rounds else None
        self.gain = self.weigh and table(by_frequency(plan.gain(row), kept, self.block)[:, None])

    @property
    def mean(self):
        """[G, 1, Dg] of a row of one layer; basis [G, Dg, R] and weight, None or [G, 1, Dg], likewise."""
        (axes,) = self.axes
        return axes.mean

    @property
    def basis(self):
        (axes,) = self.axes
        return axes.basis

    @property
    def weight(self):
        (axes,) = self.axes
        return axes.weight

    def coefficients(self, keys, values, start):
        """Transform [B, H, T, D] keys and values (T a multiple of `block`) of tokens at `start` (see `Chunk`).

        Returns coefficients [B, G, T / block, block, R] in standard deviations, and what a token weighs in every group,
        [B, G, T / block, block], or None for plain rounding.
        """
        xp, pre = self.xp, self.method.rope == "pre"
        keys, values = xp.astype(keys, xp.float32), xp.astype(values, xp.float32)
        turned = unrotate(xp, keys, self.rope, start) if self.rope and (pre or self.weigh) else keys
        layers = split_layers(turned if pre else keys, values, self.layers)
        z = reduce(add, (axes.latents(*layer) for axes, layer in zip(self.axes, layers)))
        z = to_frequency(xp, z, self.time) * self.normalize
        if self.weigh is None:
            return z, None
        weights = self.weigh(turned, values)
        weights = xp.concat([weights, weights], axis=1).reshape(keys.shape[0], self.groups, -1, keys.shape[2])
        return z, xp.mean(weights, axis=2).reshape(*z.shape[:4])

    def vectors(self, spectrum, start):
        """Keys and values [B, H, T, D] float32 of coefficients [B, G, block, R, T / block], which have their scale.

        Keys are rotated as the model had them, at `start` (see `Chunk`).
        """
        xp = self.xp
        z = to_time(xp, spectrum, self.time)  # [B, G, T, R]
        keys, values = join_layers(xp, [axes.vectors(z) for axes in self.axes])
        return (rotate(xp, keys, self.rope, start) if self.rope and self.method.rope == "pre" else keys), values

    def tables(self) -> list:
        """Every array that all sequences share."""
        arrays = [self.time, self.normalize, *(x for axes in self.axes for x in axes.arrays())]
        if self.weigh is not None:
            arrays += [*self.weigh.tables, self.gain]
        return arrays


class SpectralCodec(TransformCodec):
    """Coefficients as packed codes: one table entry per coefficient.

    Coefficients with 0 bits are not stored. Rows (group, frequency, component) are sorted by width; codes of a row are
    packed along time. A chunk holds, width by width, whole units [B, rows, units, bits] and then the codes that wait for
    their unit to fill (`pack_rows`).
    """

    coupled = 0  # widths whose codes are those of a trellis, the first ones

    def __init__(self, xp, plan: Plan, row: int, like=None):
        super().__init__(xp, plan, row, like)

        def table(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        kept = kept_components(plan.coded[row])
        widths, sigma = by_frequency(plan.widths[row], kept, self.block), deviations(plan.basis_set, row, kept)
        self.quantizers = RowTables(xp, plan.quantizers(xp, like), widths[:, None])
        widths, sigma = widths.reshape(-1), sigma.reshape(-1)  # rows in the order (group, frequency, component)
        self.bits = [int(b) for b in np.unique(widths) if b]
        rows = [np.flatnonzero(widths == b) for b in self.bits]
        order = np.full(len(widths), sum(map(len, rows)), np.int32)  # dropped rows read the zero row at the end
        if rows:
            order[np.concatenate(rows)] = np.arange(len(order[widths > 0]))
        self.order = table(order, np.int32)
        self.rows = [table(chosen, np.int32) for chosen in rows]
        self.scale = [table(sigma[chosen][:, None]) for chosen in rows]
        self.levels = [table(plan.levels[b]) for b in self.bits]

    @cached_property
    def decoder(self):
        """What the array library has to decode several chunks at a time, of one layer, or None."""
        return self.layers == 1 and self.xp.kernels and self.xp.kernels.decoder(self)

    @cached_property
    def packer(self):
        """What the array library has to pack the codes of all widths at once, or None."""
        return self.xp.kernels and self.xp.kernels.packer(self)

    @cached_property
    def kernel(self):
        """The faster decode step that the array library has for this codec of one layer, or None."""
        return self.layers == 1 and self.xp.kernels and self.xp.kernels.decode_step(self)

    @cached_property
    def of_layers(self) -> list:
        """For every layer of the row a codec that decodes and attends to that layer's heads alone, and encodes nothing."""
        return [self] if self.layers == 1 else [self._of_layer(number) for number in range(self.layers)]

    def _of_layer(self, number: int) -> SpectralCodec:
        view = copy(self)
        for made in ("decoder", "kernel", "of_layers"):
            view.__dict__.pop(made, None)
        view.layers, view.kv_heads, view.axes = 1, self.kv_heads // self.layers, self.axes[number : number + 1]
        view.packer = None  # nothing is packed by it
        return view

    def choose(self, keys, values, start):
        """Codes uint8 [B, G, T / block, block, R] of T tokens at `start`, T a multiple of `block`.

        Raises ValueError on NaN or infinity.
        """
        z, weights = self.coefficients(keys, values, start)
        check_finite(self.xp, z)
        return self.quantize(z, weights)

    def quantize(self, z, weights=None):
        """Coefficients [B, G, n, block, R] -> codes uint8 of the same shape."""
        if weights is None:
            return self.quantizers.quantize(z)
        return round_in_time(self.xp, z, weights, self.gain, self.time, self.quantizers)

    def pack(self, codes, chunk: Chunk | None = None) -> tuple:
        """Arrays of a chunk with `codes` [B, G, n, block, R], behind those of `chunk` where one is given."""
        xp, (batch, _, n, _, _) = self.xp, codes.shape
        codes = xp.permute_dims(codes, (0, 1, 3, 4, 2)).reshape(batch, -1, n)
        by_width = [xp.take(codes, rows, axis=1) for rows in self.rows]
        if chunk is None:
            return _flatten([pack_rows(xp, x, b) for x, b in zip(by_width, self.bits)])
        held = chunk.tokens // self.block
        rows = zip(_pairs(chunk.arrays), by_width, self.bits)
        return _flatten([append_rows(xp, old, held, new, b) for old, new, b in rows])

    def seal(self, chunk: Chunk | None, codes, position) -> Chunk:
        """`chunk` with `codes` [B, G, n, block, R] behind its own, or a new one; `position`: where these tokens stand.

        position: a number, or int32 [B, H, T] of a chunk that has those of all tokens.
        """
        tokens, arrays = codes.shape[2] * self.block, (self.packer or self.pack)(codes, chunk)
        if chunk is None:
            return Chunk(codes.shape[0], position, tokens, arrays)
        return extended(self.xp, chunk, tokens, arrays, None if isinstance(position, int) else position)

    def encode(self, keys, values, start) -> Chunk:
        """A new chunk from T tokens at `start`, T a multiple of `block`; raises ValueError on NaN or infinity."""
        return self.seal(None, self.choose(keys, values, start), start)

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own; `positions` [B, H, T] of a chunk that has those of all tokens."""
        start = next_start(chunk, positions)
        return self.seal(chunk, self.choose(keys, values, start), start)

    @property
    def at_once(self) -> int:
        """Tokens whose codes are chosen together; 0: those of one chunk."""
        return TILE_CHUNKS * CHUNK_TOKENS if self.packer else 0

    def keep(self, chunks: list[Chunk], blocks, size: int) -> list[Chunk]:
        """`chunks` of `size` tokens with the blocks `blocks` of all of them, int32 [B, H, m] ascending; codes are copied.

        One head stands for all where the plan codes heads together.
        """
        xp, arrays = self.xp, []
        for i, (bits, rows) in enumerate(zip(self.bits, self.rows)):
            heads = xp.to_numpy(rows) // (self.block * self.rank) % blocks.shape[1]
            codes = [
                unpack_rows(xp, chunk.arrays[2 * i : 2 * i + 2], bits, chunk.tokens // self.block) for chunk in chunks
            ]
            index = xp.take(blocks, xp.asarray(heads.astype(np.int32), like=blocks), axis=1)
            arrays.append(xp.take_along_axis(xp.concat(codes, axis=2), index, axis=2))
        starts = kept_positions(xp, chunks, blocks, self.block)
        step, total = size // self.block, blocks.shape[2]
        return [
            Chunk(
                blocks.shape[0],
                xp.copy(starts[:, :, i * self.block : (i + step) * self.block]),
                (min(i + step, total) - i) * self.block,
                _flatten([pack_rows(xp, c[:, :, i : i + step], b) for c, b in zip(arrays, self.bits)]),
            )
            for i in range(0, total, step)
        ]

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`, a multiple of `block`; codes are copied, not decoded."""
        xp, n = self.xp, chunk.tokens // self.block
        codes = [unpack_rows(xp, packed, b, n) for packed, b in zip(_pairs(chunk.arrays), self.bits)]
        packed = [pack_rows(xp, c[:, :, : tokens // self.block], b) for c, b in zip(codes, self.bits)]
        return replace(chunk, tokens=tokens, arrays=_flatten(packed))

    def spectrum(self, chunk: Chunk):
        """Dequantized coefficients [B, G, block, R, n]."""
        xp, n = self.xp, chunk.tokens // self.block
        codes = [unpack_rows(xp, packed, b, n) for packed, b in zip(_pairs(chunk.arrays), self.bits)]
        parts = self._dequantized(codes)
        parts.append(xp.zeros((chunk.batch, 1, n), dtype=xp.float32, like=self.time))
        y = xp.take(xp.concat(parts, axis=1), self.order, axis=1)
        return y.reshape(chunk.batch, self.groups, self.block, self.rank, n)

    def _dequantized(self, codes: list) -> list:
        """Coefficients [B, rows, n] of codes width by width."""
        return [dequantize(self.xp, *of_width) * scale for *of_width, scale in zip(codes, self.levels, self.scale)]

    def decode(self, chunk: Chunk):
        """Keys and values [B, H, T, D] float32 of a chunk; keys are rotated as the model had them."""
        return self.vectors(self.spectrum(chunk), chunk.start)

    def attend(self, chunk: Chunk, queries, scale: float):
        """Partial softmax of grouped `queries` [B, H, M, D] float32 over a chunk.

        On latents where the method allows it: with k = mu + U F^T y, q.k = q.mu + F^T (U^T q . y), and likewise the
        output is one expansion of sum_t p_t z_t per query row, so that neither keys nor values are rebuilt.
        """
        xp, h = self.xp, self.kv_heads
        if not self.method.latent:
            return self._attend_rotated(chunk, queries, scale)
        y = self.spectrum(chunk)
        batch, _, block, _, n = y.shape
        rows = queries.shape[2]
        latent = xp.matmul(queries, self.basis[:h])  # [B, H, M, R]
        by_frequency = xp.matmul(latent[:, :, None], y[:, :h])  # [B, H, block, M, n]
        scores = xp.matmul(xp.permute_dims(by_frequency, (0, 1, 3, 4, 2)), self.time)  # [B, H, M, n, block]
        offset = xp.matmul(queries, xp.permute_dims(self.mean[:h], (0, 2, 1)))  # q . mu, [B, H, M, 1]
        scores = (scores.reshape(batch, h, rows, n * block) + offset) * scale
        p, m, l = attention.partial_from_scores(xp, scores)
        weights = xp.matmul(p.reshape(batch, h, rows, n, block), xp.permute_dims(self.time, (1, 0)))
        weights = xp.permute_dims(weights, (0, 1, 4, 2, 3))  # [B, H, block, M, n]
        pooled = xp.sum(xp.matmul(weights, xp.permute_dims(y[:, h:], (0, 1, 2, 4, 3))), axis=2)  # [B, H, M, R]
        output = xp.matmul(pooled, xp.permute_dims(self.basis[h:], (0, 2, 1))) + l * self.mean[h:]
        return output, m, l

    def _attend_rotated(self, chunk: Chunk, queries, scale: float):
        """`attend` where scores need keys that are rebuilt and rotated; values are pooled as latents all the same.

        A head's values take one product with the basis per query row instead of one per token.
        """
        xp, h = self.xp, self.kv_heads
        (batch, _, rows, dim), tokens = queries.shape, chunk.tokens
        z = to_time(xp, self.spectrum(chunk), self.time)  # [B, G, T, R]
        (key_z, value_z), (key_basis, value_basis), means = (self._sides(x) for x in (z, self.basis, self.mean))
        keys = xp.matmul(key_z, xp.permute_dims(key_basis, (0, 2, 1)))
        if self.weight is not None:
            keys = keys / self._sides(self.weight)[0]
        keys = (keys + means[0]).reshape(batch, key_z.shape[1], tokens, -1, dim)
        keys = xp.permute_dims(keys, (0, 1, 3, 2, 4)).reshape(batch, h, tokens, dim)
        if self.rope and self.method.rope == "pre":
            keys = rotate(xp, keys, self.rope, chunk.start)
        p, m, l = attention.partial_from_scores(xp, xp.matmul(queries, xp.permute_dims(keys, (0, 1, 3, 2))) * scale)
        pooled = xp.matmul(p.reshape(batch, value_z.shape[1], -1, tokens), value_z).reshape(batch, h, rows, -1)
        output = xp.matmul(pooled, xp.permute_dims(value_basis.reshape(h, dim, -1), (0, 2, 1)))
        if self.weight is not None:
            output = output / self._sides(self.weight)[1].reshape(h, 1, dim)
        return output + l * means[1].reshape(h, 1, dim), m, l

    def _sides(self, x) -> tuple:
        """What `x`, [G, Dg or 1, ...] of a table or [B, G, T, R] of latents, has for keys and for values."""
        if self.groups > 1:
            axis, half = len(x.shape) - 3, self.groups // 2
            return tuple(x[(slice(None),) * axis + (part,)] for part in (slice(half), slice(half, None)))
        if len(x.shape) == 4:  # both come from the same latents
            return x, x
        axis, half = (1 if x.shape[1] > 1 else 2), self.kv_heads * self.head_dim
        return tuple(x[(slice(None),) * axis + (part,)] for part in (slice(half), slice(half, None)))

    def decode_step(self, chunks, queries, keys, values, scale: float):
        """`attention.decode_step`, by the kernel that the array library has for it or by its operations."""
        step = self.kernel or partial(attention.decode_step, self.xp, self)
        return step(chunks, queries, keys, values, scale)

    def tables(self) -> list:
        """Every array that all sequences share."""
        rows = [self.order, *self.rows, *self.scale, *self.levels]
        faster = [x for way in (self.decoder, self.packer, self.kernel) if way for x in way.tables()]
        views = [x for view in self.of_layers if view is not self for x in view.tables()]
        return super().tables() + rows + self.quantizers.arrays() + faster + views


class TrellisCodec(SpectralCodec):
    """The codec with codes of `trellis`: stored as those of `SpectralCodec`, chosen and decoded together."""

    def __init__(self, xp, plan: Plan, row: int, like=None):
        super().__init__(xp, plan, row, like)
        kept = kept_components(plan.coded[row])
        widths, gain, cost = (
            by_frequency(x, kept, self.block) for x in (plan.widths[row], plan.gain(row), plan.loss(row))
        )
        self.search = trellis.Rows(widths, gain, cost, xp.to_numpy(self.time), plan.search_tables)
        self.coupled = sum(b in trellis.WIDTHS for b in self.bits)
        stored = [xp.to_numpy(rows) for rows in self.rows[: self.coupled]]
        if self.coupled:
            numbers = np.concatenate(stored)
            sequences = self.search.sequences()
            self.paths = trellis.Paths(xp, sequences, numbers, widths.reshape(-1)[numbers], plan.levels, like)
            self.paths_scale = xp.concat(self.scale[: self.coupled], axis=0)

    def quantize(self, z, weights=None):
        """As `SpectralCodec.quantize`; the host searches, wherever `z` is."""
        xp = self.xp
        held = [x if x is None else xp.to_numpy(x) for x in (z, weights)]
        return xp.asarray(self.search.search(*held), like=self.time)

    def _dequantized(self, codes: list) -> list:
        """Coefficients [B, rows, n] of codes width by width."""
        xp, n = self.xp, self.coupled
        alone = [dequantize(xp, *x) * scale for *x, scale in zip(codes[n:], self.levels[n:], self.scale[n:])]
        if not n:
            return alone
        return [self.paths.levels_of(xp.concat(codes[:n], axis=1)) * self.paths_scale, *alone]

    def tables(self) -> list:
        """Every array that all sequences share."""
        return super().tables() + ([*self.paths.arrays(), self.paths_scale] if self.coupled else [])


class AffineCodec:
    """Grouped affine quantization per token: codes [B, H, T, D / 8, bits], scale and bias [B, H, T, D / group]."""

    block = 1

    def __init__(self, xp, plan: Plan, row: int, like=None):
        self.xp, self.bits, self.group_size = xp, plan.affine_bits, plan.method.group_size

    def encode(self, keys, values, start) -> Chunk:
        """A new chunk from T tokens at `start`; raises ValueError on NaN or infinity."""
        xp, arrays = self.xp, []
        for x in (keys, values):
            codes, scale, bias = quantize_affine(xp, x, self.bits, self.group_size)
            check_finite(xp, xp.concat([scale, bias], axis=-1))  # NaN, infinity, and what float16 cannot hold
            arrays += [pack(xp, codes, self.bits), scale, bias]
        return Chunk(keys.shape[0], start, keys.shape[2], tuple(arrays))

    def append(self, chunk: Chunk, keys, values, positions=None) -> Chunk:
        """`chunk` with T more tokens behind its own; `positions` [B, H, T] of a chunk that has those of all tokens."""
        new = self.encode(keys, values, next_start(chunk, positions))
        arrays = tuple(self.xp.concat([a, b], axis=2) for a, b in zip(chunk.arrays, new.arrays))
        return extended(self.xp, chunk, new.tokens, arrays, positions)

    def keep(self, chunks: list[Chunk], blocks, size: int) -> list[Chunk]:
        """`chunks` of `size` tokens with the tokens `blocks` of all of them, int32 [B, H, m] ascending; nothing is decoded."""
        xp, total = self.xp, blocks.shape[2]
        arrays = []
        for parts in zip(*(chunk.arrays for chunk in chunks)):
            index = blocks.reshape(*blocks.shape, *(1,) * (len(parts[0].shape) - 3))
            arrays.append(xp.take_along_axis(xp.concat(list(parts), axis=2), index, axis=2))
        starts = kept_positions(xp, chunks, blocks, 1)
        return [
            Chunk(
                blocks.shape[0],
                xp.copy(starts[:, :, i : i + size]),
                min(size, total - i),
                tuple(xp.copy(a[:, :, i : i + size]) for a in arrays),
            )
            for i in range(0, total, size)
        ]

    def cut(self, chunk: Chunk, tokens: int) -> Chunk:
        """The first `tokens` tokens of `chunk`."""
        return replace(chunk, tokens=tokens, arrays=tuple(self.xp.copy(a[:, :, :tokens]) for a in chunk.arrays))

    def decode(self, chunk: Chunk):
        """Keys and values [B, H, T, D] float32 of a chunk."""
        xp, sides = self.xp, []
        for packed, scale, bias in (chunk.arrays[:3], chunk.arrays[3:]):
            codes = unpack(xp, packed, self.bits, scale.shape[-1] * self.group_size)
            sides.append(dequantize_affine(xp, codes, scale, bias))
        return tuple(sides)

    def attend(self, chunk: Chunk, queries, scale: float):
        """Partial softmax of grouped `queries` [B, H, M, D] float32 over a chunk, decoded for this call only."""
        keys, values = self.decode(chunk)
        return attention.dense_partial(self.xp, queries, keys, values, scale)

    def decode_step(self, chunks, queries, keys, values, scale: float):
        """`attention.decode_step`."""
        return attention.decode_step(self.xp, self, chunks, queries, keys, values, scale)

    def tables(self) -> list:
        """No array is shared."""
        return []


def decoded(xp, codec, chunks: list[Chunk], dtype):
    """Keys and values [B, H, T, D] in `dtype` of `chunks`, in their order: of as many at a time as the array library has a
    faster way for, else one by one."""
    many = getattr(codec, "decoder", None)
    if many:
        yield from many(chunks, dtype)
        return
    for chunk in chunks:
        yield tuple(xp.astype(x, dtype) for x in codec.decode(chunk))


def make_codec(xp, plan: Plan, row: int, like=None):
    """Codec of compressible layer number `row`, or None for a plan that compresses nothing."""
    name = get_live_method(plan.method).codec
    if hasattr(plan, "CODEC"):
        return plan.CODEC(xp, plan, row, like)
    kind = {"spectral": TrellisCodec if plan.trellis else SpectralCodec, "affine": AffineCodec, "none": None}[name]
    return kind(xp, plan, row, like) if kind else None


def kept_components(coded: np.ndarray) -> np.ndarray:
    """Components [G, R] with anything stored in `coded` [G, R, F], ascending; as many in every group, others fill up."""
    used = coded.any(-1)
    rank = max(int(used.sum(-1).max()), 1)
    return np.sort(np.argsort(~used, axis=-1, kind="stable")[:, :rank], axis=-1)


def by_frequency(x: np.ndarray, kept: np.ndarray, block: int) -> np.ndarray:
    """`x` [G, R, bands] of all components -> [G, block, R] of the components `kept` [G, R]."""
    return np.take_along_axis(x, kept[..., None], 1)[..., octave_bands(block)].transpose(0, 2, 1)


def deviations(basis_set: BasisSet, row: int, kept: np.ndarray) -> np.ndarray:
    """Standard deviations [G, block, R] of the components `kept` [G, R]; 1 for a coefficient that never moved."""
    sigma = np.sqrt(by_frequency(basis_set.variance[row], kept, basis_set.block))
    return np.where(sigma > 0, sigma, np.float32(1))


def join_layers(xp, layers: Sequence[tuple]) -> tuple:
    """Keys and values [B, H, T, D] of the layers of a row -> [B, layers * H, T, D], as its codec takes them."""
    if len(layers) == 1:
        return layers[0]
    return tuple(xp.concat(list(side), axis=1) for side in zip(*layers))


def split_layers(keys, values, layers: int) -> list[tuple]:
    """Inverse of `join_layers`."""
    heads = keys.shape[1] // layers
    return [tuple(x[:, i * heads : (i + 1) * heads] for x in (keys, values)) for i in range(layers)]


def select_rows(xp, chunk: Chunk, rows) -> Chunk:
    """The batch rows `rows` (int32 array) of a chunk."""
    start = chunk.start if isinstance(chunk.start, int) else xp.take(chunk.start, rows, axis=0)
    arrays = tuple(xp.take(a, rows, axis=0) for a in chunk.arrays)
    return replace(chunk, batch=rows.shape[0], start=start, arrays=arrays)


def positions_of(xp, chunk: Chunk, like):
    """Positions int32 [B, H, tokens] of a chunk, [1, 1, tokens] where nothing was dropped."""
    if not isinstance(chunk.start, int):
        return chunk.start
    return xp.asarray(np.arange(chunk.start, chunk.start + chunk.tokens, dtype=np.int32)[None, None], like=like)


def next_start(chunk: Chunk, positions):
    """Where tokens behind those of `chunk` stand: see `Chunk.start`."""
    return chunk.start + chunk.tokens if positions is None else positions


def extended(xp, chunk: Chunk, tokens: int, arrays: tuple, positions) -> Chunk:
    """`chunk` with `tokens` more, and now these `arrays`."""
    start = chunk.start
    if positions is not None:
        blank = xp.zeros((*positions.shape[:2], 1), dtype=xp.int32, like=positions)
        start = xp.concat([positions_of(xp, chunk, positions) + blank, positions], axis=2)
    return replace(chunk, start=start, tokens=chunk.tokens + tokens, arrays=arrays)


def kept_positions(xp, chunks: list[Chunk], blocks, block: int):
    """Positions int32 [B, H, m * block] of the tokens of `blocks` [B, H, m] of all `chunks`."""
    held = [positions_of(xp, chunk, blocks) for chunk in chunks]
    shape = max(x.shape[:2] for x in held)
    places = xp.concat([x + xp.zeros((*shape, 1), dtype=xp.int32, like=blocks) for x in held], axis=2)
    offsets = xp.asarray(np.arange(block, dtype=np.int32), like=blocks)
    index = (blocks[..., None] * block + offsets).reshape(*blocks.shape[:2], -1)
    return xp.take_along_axis(places, index, axis=2)


def _pairs(arrays: tuple) -> list[tuple]:
    return list(zip(arrays[0::2], arrays[1::2]))


def _flatten(pairs: list[tuple]) -> tuple:
    return tuple(array for pair in pairs for array in pair)


def check_finite(xp, x) -> None:
    if not xp.all_finite(x):
        raise ValueError("Expected finite keys and values, received NaN or infinity: check the weights and the dtype.")

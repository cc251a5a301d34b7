"""What decodes the packed codes of the spectral family and attends to them, for a layer of its own or one of several."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

from ..arrays import attention
from ..arrays.rope import rotate
from ..arrays.transform import to_time
from ..quantization.quantizer import CoefficientTables
from .chunk import Adaptation, Chunk, split_layers
from .transform import TransformReader


class SpectralReader(TransformReader):
    """Packed codes of a layer group -> keys and values of some of its layers, and attention to those of one.

    Coefficients (group, frequency, component) are sorted by width. For every width that is stored there are its
    `bits`, the `numbers` of its coefficients, their deviations `scale` and the `levels` of its codes; `order`: where the
    codes of a coefficient are among those of all widths, the last place for those without any. `quantizers` has all widths,
    `normalize` the deviations as a table. `coupled`: the first widths whose codes are those of a trellis, along `paths`.
    """

    block: int
    groups: int
    rank: int
    kv_heads: int
    head_dim: int
    normalize: Any
    quantizers: CoefficientTables
    order: Any
    bits: list[int]
    numbers: list
    scale: list
    levels: list
    coupled: int = 0
    paths: Any = None

    @cached_property
    def decoder(self):
        """What the array library has to decode several chunks at a time, of one layer, or None."""
        return len(self.axes) == 1 and self.xp.kernels and self.xp.kernels.decoder(self)

    @cached_property
    def kernel(self):
        """The faster decode step that the array library has for one layer, or None."""
        return len(self.axes) == 1 and self.xp.kernels and self.xp.kernels.decode_step(self)

    def spectrum(self, chunk: Chunk):
        """Dequantized coefficients [B, G, block, R, n]."""
        raise NotImplementedError

    def decode(self, chunk: Chunk):
        """Keys and values [B, H, T, D] float32 of a chunk; keys are rotated as the model had them."""
        return self.vectors(self.spectrum(chunk), chunk.start, chunk.adaptation)

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
        query_rows = queries.shape[2]
        latent = xp.matmul(queries, self.basis[:h])  # [B, H, M, R]
        by_frequency = xp.matmul(latent[:, :, None], y[:, :h])  # [B, H, block, M, n]
        scores = xp.matmul(xp.permute_dims(by_frequency, (0, 1, 3, 4, 2)), self.time)  # [B, H, M, n, block]
        offset = xp.matmul(queries, xp.permute_dims(self.mean[:h], (0, 2, 1)))  # q . mu, [B, H, M, 1]
        scores = (scores.reshape(batch, h, query_rows, n * block) + offset) * scale
        p, m, l = attention.partial_from_scores(xp, scores)
        weights = xp.matmul(p.reshape(batch, h, query_rows, n, block), xp.permute_dims(self.time, (1, 0)))
        weights = xp.permute_dims(weights, (0, 1, 4, 2, 3))  # [B, H, block, M, n]
        pooled = xp.sum(xp.matmul(weights, xp.permute_dims(y[:, h:], (0, 1, 2, 4, 3))), axis=2)  # [B, H, M, R]
        output = xp.matmul(pooled, xp.permute_dims(self.basis[h:], (0, 2, 1))) + l * self.mean[h:]
        return output, m, l

    def _attend_rotated(self, chunk: Chunk, queries, scale: float):
        """`attend` where scores need keys that are rebuilt and rotated; values are pooled as latents all the same.

        A head's values take one product with the basis per query row instead of one per token.
        """
        xp, h = self.xp, self.kv_heads
        (batch, _, query_rows, dim), tokens = queries.shape, chunk.tokens
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
        pooled = xp.matmul(p.reshape(batch, value_z.shape[1], -1, tokens), value_z).reshape(batch, h, query_rows, -1)
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
        """Every array that all sequences share and that this one has made."""
        faster = [x for way in (self.decoder, self.kernel) if way for x in way.tables()]
        return super().tables() + faster


class LayerView(SpectralReader):
    """Layer number `number` of those that `codec` codes together, whose tables it has; it encodes nothing."""

    def __init__(self, codec: SpectralReader, number: int):
        self.codec, self.number = codec, number
        self.xp, self.method, self.rope = codec.xp, codec.method, codec.rope
        self.axes = codec.axes[number : number + 1]
        self.kv_heads, self.head_dim = codec.kv_heads // len(codec.axes), codec.head_dim
        self.block, self.groups, self.rank = codec.block, codec.groups, codec.rank
        self.time, self.normalize, self.quantizers = codec.time, codec.normalize, codec.quantizers
        self.bits, self.order, self.numbers = codec.bits, codec.order, codec.numbers
        self.scale, self.levels = codec.scale, codec.levels
        self.coupled, self.paths = codec.coupled, codec.paths

    def spectrum(self, chunk: Chunk):
        return self.codec.spectrum(chunk)

    def offsets(self, adaptation: Adaptation) -> tuple:
        return split_layers(adaptation.keys, adaptation.values, len(self.codec.axes))[self.number]

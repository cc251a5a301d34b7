"""Keys or values of one head as packed codes of its principal components, scored without being rebuilt.

The quick start of the first spectral-kv library. The live caches do more: they take blocks of tokens together and share
their bits over all heads of a model (`codec`, `plan`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..arrays.namespace import ArrayNamespace
from ..codecs.chunk import check_finite
from ..errors import UsageError
from ..planning.allocation import allocate_bits
from ..planning.loss import distortions
from ..profile.projection import Projection
from ..quantization.packing import interleave, pack_rows, unpack_rows
from ..quantization.quantizer import BIT_WIDTHS, CoefficientTables, dequantize, flat_tables

HALF = 16  # bits of an element that is not compressed


@dataclass(frozen=True, eq=False)
class CompressedKV:
    """Packed codes of `tokens` tokens of one head, width by width (`packing.pack_rows`).

    dtype: of what went in; made_by: what a compressor must agree in to read them.
    """

    tokens: int
    arrays: tuple
    dtype: object
    made_by: tuple

    @property
    def nbytes(self) -> int:
        """Bytes of every array held."""
        return sum(x.nbytes for x in self.arrays)


class Compressor:
    """Compresses tokens of one head in the space of a `Projection`; a backend adds its array library as `xp`.

    The interface of the first library, spectral-kv 1.0. Widths are allocated by reverse water-filling (Cover and Thomas,
    Elements of Information Theory, section 10.3.3). How good the scores are depends on the keys: what lies outside the
    components is lost, and isotropic noise at rank 4 of 128 keeps sqrt(4 / 128) of their correlation.

    Args:
        projection: Components of the keys or values of one head: `SpectralProfile.get_projection`.
        bits: Average stored bits of a kept component, a ceiling, between 1 / rank and 8. Components of large variance get
            more. A token takes at most rank * bits bits, and nothing else is stored per token.

    Raises:
        TypeError: `projection` is none.
        UsageError: `bits` are out of range. `compress` and `approximate_attention` raise it for arrays of another shape
            than [tokens, head_dim], for NaN, and for infinity.
    """

    xp: ArrayNamespace

    def __init__(self, projection: Projection, bits: float = 4):
        if not isinstance(projection, Projection):
            raise TypeError(
                f"Expected a projection, received a {type(projection).__name__}. Take one of a profile: "
                "profile.get_projection(layer=0, head=0)"
            )
        if not (isinstance(bits, (int, float)) and 1 / projection.rank <= bits <= BIT_WIDTHS[-1]):
            raise UsageError(
                f"Expected bits between {1 / projection.rank:.2g} and {BIT_WIDTHS[-1]} per component, received {bits!r}."
            )
        self.projection, self.bits = projection, bits
        cost = projection.variance[:, None] * np.array(distortions(projection.levels))
        self.widths = allocate_bits(cost, np.ones(projection.rank, np.int64), math.floor(bits * projection.rank))
        self._made: dict[str, dict] = {}

    @property
    def bits_per_token(self) -> int:
        """Bits that one token takes."""
        return int(self.widths.sum())

    def compress(self, x) -> CompressedKV:
        """Codes of `x` [T, D], keys after RoPE or values; raises UsageError for another shape, NaN and infinity."""
        self._check(x, "tokens", self.projection.side)
        xp, made = self.xp, self._tables(x)
        z = xp.matmul(xp.astype(x, xp.float32) - made["mean"], made["basis"]) * made["normalize"]
        check_finite(xp, z)
        codes = xp.permute_dims(made["quantizers"].quantize(z), (1, 0))[None]  # [1, R, T]
        packed = [pack_rows(xp, xp.take(codes, rows, axis=1), b) for b, rows, _, _ in made["widths"]]
        return CompressedKV(x.shape[0], interleave(packed), x.dtype, self._identity)

    def decompress(self, compressed: CompressedKV):
        """What codes stand for, [T, D] in the dtype that went in."""
        self._check_codes(compressed)
        xp, made = self.xp, self._tables(compressed.arrays[0])
        z = xp.permute_dims(self._latents(compressed, made), (1, 0))
        return xp.astype(xp.matmul(z, xp.permute_dims(made["basis"], (1, 0))) + made["mean"], compressed.dtype)

    def approximate_attention(self, compressed: CompressedKV, query):
        """Scores [L, T] of `query` [L, D], unscaled like `query @ keys.T`: the query is projected, no key is rebuilt."""
        self._check_codes(compressed)
        self._check(query, "queries", "queries")
        xp, made = self.xp, self._tables(query)
        q = xp.astype(query, xp.float32)
        scores = xp.matmul(xp.matmul(q, made["basis"]), self._latents(compressed, made))
        return xp.astype(scores + xp.matmul(q, made["mean"][:, None]), query.dtype)

    def compression_ratio(self, compressed: CompressedKV | None = None) -> float:
        """16-bit bytes over stored bytes: of many tokens, or of `compressed`, whose last bytes may not be full."""
        dense = HALF * self.projection.head_dim
        if compressed is None:
            return dense / self.bits_per_token
        return dense * compressed.tokens / (8 * compressed.nbytes)

    def vram_saved_mb(self, original_mb: float) -> float:
        """Of `original_mb` megabytes of such vectors at 16 bits, how many are saved."""
        if not original_mb >= 0:
            raise UsageError(f"Expected a size of 0 MB or more, received {original_mb!r}.")
        return original_mb * (1 - 1 / self.compression_ratio())

    def _latents(self, compressed: CompressedKV, made: dict):
        """Components [R, T] float32 of the codes."""
        xp, pairs = self.xp, zip(compressed.arrays[0::2], compressed.arrays[1::2])
        parts = [
            dequantize(xp, unpack_rows(xp, pair, b, compressed.tokens), levels)[0] * scale
            for pair, (b, _, levels, scale) in zip(pairs, made["widths"])
        ]
        parts.append(xp.zeros((1, compressed.tokens), dtype=xp.float32, like=made["basis"]))  # components without bits
        return xp.take(xp.concat(parts, axis=0), made["order"], axis=0)

    @property
    def _identity(self) -> tuple:
        p = self.projection
        return p.model, p.layer, p.head, p.side, p.rank, tuple(self.widths.tolist())

    def _check_codes(self, compressed: CompressedKV) -> None:
        made_by = getattr(compressed, "made_by", f"a {type(compressed).__name__}")
        if made_by != self._identity:
            raise UsageError(
                f"Expected codes of a compressor with this projection and these bits, {self._identity}, received {made_by}. "
                "Decompress with the compressor that compressed."
            )

    def _check(self, x, rows: str, what: str) -> None:
        dim = self.projection.head_dim
        if len(x.shape) != 2 or x.shape[1] != dim:
            raise UsageError(
                f"Expected {what} of shape ({rows}, {dim}), the head_dim of the profile of {self.projection.model}, "
                f"received {tuple(x.shape)}. Take the profile of the model that they come from, one head at a time."
            )

    def _tables(self, like) -> dict:
        """Arrays that all tokens share, on the device of `like`, made once."""
        xp, key = self.xp, str(getattr(like, "device", None))
        if key in self._made:
            return self._made[key]
        p, widths = self.projection, self.widths

        def table(x, dtype=np.float32):
            return xp.asarray(np.ascontiguousarray(x, dtype), like=like)

        sigma = np.sqrt(p.variance)
        sigma = np.where(sigma > 0, sigma, 1)
        used = [int(b) for b in np.unique(widths) if b]
        rows = [np.flatnonzero(widths == b) for b in used]
        order = np.full(len(widths), sum(map(len, rows)), np.int32)
        order[np.concatenate(rows)] = np.arange(len(order[widths > 0]))
        flat = tuple(xp.asarray(t, like=like) for t in flat_tables(p.levels, p.levels))
        self._made[key] = {
            "mean": table(p.mean),
            "basis": table(p.basis),
            "normalize": table(1 / sigma),
            "quantizers": CoefficientTables(xp, flat, widths),
            "order": table(order, np.int32),
            "widths": [
                (b, table(r, np.int32), table(p.levels[b]), table(sigma[r][:, None])) for b, r in zip(used, rows)
            ],
        }
        return self._made[key]

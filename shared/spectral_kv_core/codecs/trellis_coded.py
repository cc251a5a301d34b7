"""The family of spectral codecs whose codes are chosen together, along a path (`quantization.trellis`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..quantization import trellis
from ..quantization.quantizer import dequantize
from .spectral import SpectralCodec, SpectralPlan
from .transform import by_frequency, kept_components


@dataclass(frozen=True, eq=False)
class TrellisPlan(SpectralPlan):
    """A plan whose codes of 1 to 4 bits lie along the path of a trellis."""

    ERROR_RATIOS = trellis.ERROR_RATIOS

    @property
    def codec_class(self) -> type[TrellisCodec]:
        return TrellisCodec

    @cached_property
    def nearest_levels(self) -> dict[int, np.ndarray]:
        """The profile's levels, and codebooks in the place of those of coupled widths."""
        return {**self.basis_set.levels, **trellis.codebooks(self.basis_set.levels)}

    def decides(self) -> dict[str, Any]:
        """The order of the path follows from losses."""
        return super().decides() | {
            "loss": np.stack([self.loss(layer_group) for layer_group in range(len(self.widths))])
        }


class TrellisCodec(SpectralCodec):
    """The codec with codes of `trellis`: stored as those of `SpectralCodec`, chosen and decoded together."""

    def __init__(self, xp, plan: TrellisPlan, layer_group: int, like=None):
        super().__init__(xp, plan, layer_group, like)
        kept = kept_components(plan.coded[layer_group])
        widths, gain, cost = (
            by_frequency(x, kept, self.block)
            for x in (plan.widths[layer_group], plan.gain(layer_group), plan.loss(layer_group))
        )
        self.search = trellis.Coefficients(widths, gain, cost, xp.to_numpy(self.time), plan.search_tables)
        self.coupled = sum(b in trellis.WIDTHS for b in self.bits)
        stored = [xp.to_numpy(numbers) for numbers in self.numbers[: self.coupled]]
        if self.coupled:
            numbers = np.concatenate(stored)
            sequences = self.search.sequences()
            self.paths = trellis.Paths(xp, sequences, numbers, widths.reshape(-1)[numbers], plan.levels, like)
            self.paths_scale = xp.concat(self.scale[: self.coupled], axis=0)

    def quantize(self, z, weights=None):
        """As `SpectralCodec.quantize`; the host searches, wherever `z` is."""
        xp = self.xp
        codes = self.search.search(xp.to_numpy(z), None if weights is None else xp.to_numpy(weights))
        return xp.asarray(codes, like=self.time)

    def _dequantized(self, codes: list) -> list:
        """Coefficients [B, n, blocks] of codes, width by width."""
        xp, n = self.xp, self.coupled
        alone = [dequantize(xp, *x) * scale for *x, scale in zip(codes[n:], self.levels[n:], self.scale[n:])]
        if not n:
            return alone
        return [self.paths.levels_of(xp.concat(codes[:n], axis=1)) * self.paths_scale, *alone]

    def tables(self) -> list:
        """Every array that all sequences share."""
        return super().tables() + ([*self.paths.arrays(), self.paths_scale] if self.coupled else [])

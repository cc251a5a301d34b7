"""The architecture numbers of a model: what a profile, a plan and a stored prompt must agree with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ..arrays.rope import Rope
from ..errors import UsageError


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
        """Indices of the layers of every layer group of a basis set of `group` (`basis_set.GROUPS`) stands for.

        One; for `layer2` and `layer4` up to so many that follow each other in the model, from the first on, what finds
        no neighbor staying alone; for `model` all. Raises UsageError for `layer2` where no two layers follow each other.
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
        if self.rope is None or other.rope is None:
            return None if self.rope is other.rope else "no rotary embedding on one side"
        if not self.rope.matches(other.rope):
            return (
                f"RoPE frequencies ending in {other.rope.inv_freq[-1]:.4g} rad/token (rotary_dim {other.rope.rotary_dim}), "
                f"{owner} has {self.rope.inv_freq[-1]:.4g} (rotary_dim {self.rope.rotary_dim}); a checkpoint saved by "
                "transformers 5 keeps its RoPE base where mlx-lm does not look: load it with "
                "spectral_kv_mlx.load_model"
            )
        return None

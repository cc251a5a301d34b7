"""The architecture numbers of a model: what a profile, a plan and a stored prompt must agree with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..arrays.rope import Rope
from ..errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """Architecture numbers of a model: what a profile must agree with, whatever the weights' precision.

    layers: indices of the layers whose cache can be compressed; the others are passed through.
    rope: how the keys of these layers are rotated. ropes: by index those that are rotated otherwise, None for not at all.
    widths: channels of keys and of values, where they differ: zeros stand behind the narrower side, up to head_dim.
    """

    num_layers: int
    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[int, ...]
    rope: Rope | None
    ropes: tuple[tuple[int, Rope | None], ...] = ()
    widths: tuple[int, int] | None = None

    @property
    def side_widths(self) -> tuple[int, int]:
        """Channels that the model gives a key, and a value."""
        return self.widths or (self.head_dim, self.head_dim)

    @property
    def filled(self) -> float:
        """Share of the channels of keys and values that are not the zeros behind the narrower side."""
        return sum(self.widths) / (2 * self.head_dim) if self.widths else 1.0

    def rope_of(self, layer_idx: int) -> Rope | None:
        """How the keys of layer `layer_idx` are rotated."""
        return dict(self.ropes).get(layer_idx, self.rope)

    def common_rope(self, layers: Sequence[int]) -> Rope | None:
        """How the keys of `layers` are rotated; raises UsageError where they differ."""
        found = {self.rope_of(layer_idx) for layer_idx in layers}
        if len(found) > 1:
            raise UsageError(
                "Expected layers whose keys are rotated alike for a method that codes them together, received layers that are "
                f"rotated in {len(found)} ways. Use a method that codes every layer alone, such as spectral-dense."
            )
        return found.pop() if found else self.rope

    @property
    def rotary_pairs(self) -> int:
        """The most pairs of channels that a layer rotates."""
        return max((rope.rotary_dim // 2 for rope in (self.rope, *dict(self.ropes).values()) if rope), default=0)

    def layer_groups(self, group: str) -> tuple[tuple[int, ...], ...]:
        """Indices of the layers of every layer group of a basis set of `group` (`basis_set.GROUPS`) stands for.

        One; for `layer2` and `layer4` up to so many that follow each other in the model and are rotated alike, from the
        first on, what finds no neighbor staying alone; for `model` all. Raises UsageError for `layer2` where no two layers
        follow each other.
        """
        if group == "model":
            return (self.layers,)
        size = {"layer2": 2, "layer4": 4}.get(group, 1)
        groups: list[tuple[int, ...]] = []
        for layer_idx in self.layers:
            follows = bool(groups) and groups[-1][-1] == layer_idx - 1
            if follows and len(groups[-1]) < size and self.rope_of(layer_idx) == self.rope_of(layer_idx - 1):
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
        others = [[layer_idx, rope.to_json() if rope else None] for layer_idx, rope in self.ropes]
        fields |= {"layers": list(self.layers), "rope": self.rope.to_json() if self.rope else None}
        fields |= {"ropes": others} if others else {}
        return fields | ({"widths": list(self.widths)} if self.widths else {})

    @classmethod
    def from_json(cls, fields: dict) -> ModelShape:
        rope = Rope.from_json(fields["rope"]) if fields["rope"] else None
        ropes = tuple((int(i), Rope.from_json(other) if other else None) for i, other in fields.get("ropes", ()))
        widths = tuple(fields["widths"]) if "widths" in fields else None
        return cls(**{**fields, "layers": tuple(fields["layers"]), "rope": rope, "ropes": ropes, "widths": widths})

    def mismatch(self, other: ModelShape, owner: str = "the profile") -> str | None:
        """What differs from `other`, as words, or None; `owner` is what this shape stands in."""
        for name in ("num_layers", "hidden_size", "q_heads", "kv_heads", "head_dim", "layers", "side_widths"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs}, {owner} has {mine}"
        mine, theirs = [i for i, _ in self.ropes], [i for i, _ in other.ropes]
        if mine != theirs or not all(_alike(self.rope_of(i), other.rope_of(i)) for i in mine):
            return f"layers {theirs} that are rotated in another way than most, {owner} has {mine}"
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


def _alike(rope: Rope | None, other: Rope | None) -> bool:
    return rope is other or (rope is not None and other is not None and rope.matches(other))

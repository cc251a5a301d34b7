"""What a trial run tells of every layer of a model, and which layers can be compressed by that.

Configurations have a name for a thing in one model and another in the next, and say nothing of what a layer's code does.
So a backend runs the model on a few tokens, looks at what reaches the cache and attention, and says it here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..arrays.rope import Rope
from .model_shape import ModelShape

SLIDING_WINDOW = "sliding window"  # the reason of layers that see their last tokens only
CODES, DECODED, PASSED = "as codes", "decoded", "passed through"
WAYS = (CODES, DECODED, PASSED)


@dataclass(frozen=True)
class LayerSurvey:
    """How one layer of a model was seen to use its cache.

    way: `CODES`, attention reads the codes; `DECODED`, the history is decoded for the host's own attention; `PASSED`, the
    layer keeps the host's own cache.
    reason: Why it is not attended as codes, in words; "" where it is.
    q_heads, kv_heads, key_dim, value_dim: Of the keys and values that the layer gave its cache; 0 where it gave none.
    rope: How its keys are rotated; None for keys that carry no position.
    limit: What is otherwise at larger positions than were tried, or was not seen; "" where nothing is known to be.
    """

    way: str
    reason: str = ""
    q_heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    rope: Rope | None = None
    limit: str = ""

    @property
    def form(self) -> tuple[int, int, int, int]:
        """What layers that are compressed together have in common: query heads, KV heads, widths of keys and values."""
        return self.q_heads, self.kv_heads, self.key_dim, self.value_dim


def surveyed_shape(
    hidden_size: int, layers: Sequence[LayerSurvey], widens: bool = False
) -> tuple[ModelShape, dict[int, str]]:
    """The shape of a model with `layers`, and by index the layers that are passed through, with the reason.

    One shape holds for all layers that are compressed: the one that most of them have, the first one among equals. What
    is rotated in another way than most is told layer by layer. widens: a backend adds zeros to keys or values, so that both
    have one width; others pass layers through whose keys and values differ.

    Examples:
        >>> few, many = (LayerSurvey(CODES, "", 8, heads, 64, 64) for heads in (2, 4))
        >>> shape, passed = surveyed_shape(512, [few, many, many])
        >>> shape.layers, shape.kv_heads, passed
        ((1, 2), 4, {0: '2 KV heads of 64 channels where most layers have 4 of 64'})
    """
    passed = {i: layer.reason for i, layer in enumerate(layers) if layer.way == PASSED}
    for i, layer in enumerate(layers):
        if i not in passed and layer.key_dim != layer.value_dim and not widens:
            passed[i] = f"keys of {layer.key_dim} channels and values of {layer.value_dim}"
    forms = Counter(layer.form for i, layer in enumerate(layers) if i not in passed)
    if not forms:
        return ModelShape(len(layers), hidden_size, 0, 0, 0, (), None), passed
    form = q_heads, kv_heads, key_dim, value_dim = forms.most_common(1)[0][0]
    for i, layer in enumerate(layers):
        if i not in passed and layer.form != form:
            passed[i] = _differences(layer, q_heads, kv_heads, key_dim, value_dim)
    kept = tuple(i for i in range(len(layers)) if i not in passed)
    rope = Counter(layers[i].rope for i in kept).most_common(1)[0][0]
    others = tuple((i, layers[i].rope) for i in kept if layers[i].rope != rope)
    widths = None if key_dim == value_dim else (key_dim, value_dim)
    head_dim = max(key_dim, value_dim)
    return ModelShape(len(layers), hidden_size, q_heads, kv_heads, head_dim, kept, rope, others, widths), passed


def _differences(layer: LayerSurvey, q_heads: int, kv_heads: int, key_dim: int, value_dim: int) -> str:
    """What `layer` has otherwise than most layers of its model, in words."""
    if (layer.kv_heads, layer.key_dim) != (kv_heads, key_dim):
        own = f"{layer.kv_heads} KV heads of {layer.key_dim} channels"
        return f"{own} where most layers have {kv_heads} of {key_dim}"
    if layer.value_dim != value_dim:
        return f"values of {layer.value_dim} channels where most layers have {value_dim}"
    return f"{layer.q_heads} query heads where most layers have {q_heads}"


def surveyed_windows(hidden_size: int, layers: Sequence[LayerSurvey]) -> tuple[ModelShape, dict[int, str]]:
    """`surveyed_shape` of the layers with a sliding window, and of no others."""
    other = LayerSurvey(PASSED, "no sliding window")
    windows = [replace(x, way=CODES, reason="") if x.reason == SLIDING_WINDOW else other for x in layers]
    return surveyed_shape(hidden_size, windows)

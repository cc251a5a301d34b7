"""What the layers of a host's own hold beside compressed ones, told by a run of a few tokens that computes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..hosts.protocol import Host

RUN_TOKENS = 4  # enough for a state: it is as large after any number
UNLIMITED = 1 << 26  # tokens; of a layer or a model that does not say what it was made for


@dataclass(frozen=True)
class PassedLayer:
    """One layer that passes through.

    kind: of its tokens, as in `cache.size.KINDS`; most_tokens: how many it keeps; token_elements: K and V elements of one;
    fixed: bytes by kind that do not grow with the context; state_elements: elements of the states among them.
    """

    kind: str = "exact"
    most_tokens: int = 0
    token_elements: int = 0
    fixed: Mapping[str, int] = field(default_factory=dict)
    state_elements: int = 0


def passed_layers(
    host: Host, layers: list, passed: Iterable[int], windows: Mapping[int, int]
) -> dict[int, PassedLayer]:
    """Those of `layers` at `passed`, which have read `RUN_TOKENS` tokens. `windows`: tokens that some keep at most."""
    found = {}
    for layer_idx in passed:
        arrays, elements = host.held(layers[layer_idx])
        states = sum(x.nbytes // x.itemsize for x in arrays.get("state", ()))
        fixed: dict[str, int] = {
            kind: sum(x.nbytes for x in arrays[kind]) for kind in ("state", "other") if kind in arrays
        }
        tokens = elements - states  # a host may allocate ahead: bytes tell less
        kind = "sliding window" if layer_idx in windows else "exact"
        most = windows.get(layer_idx, UNLIMITED if tokens else 0)
        found[layer_idx] = PassedLayer(kind, most, tokens // RUN_TOKENS, fixed, states)
    return found


def windows_alone(windows: Mapping[int, int], token_elements: int) -> dict[int, PassedLayer]:
    """The layers with `windows`, of a model that cannot be run: nothing is known of the others."""
    return {i: PassedLayer("sliding window", most, token_elements) for i, most in windows.items()}

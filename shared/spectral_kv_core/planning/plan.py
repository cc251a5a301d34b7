"""The plan: what one method stores of a model under one budget. Codec families subclass it (package `codecs`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..arrays.equality import same_fields
from ..arrays.rope import Rope
from ..errors import UsageError
from ..profile.basis_set import BasisSet
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from .budget import CHUNK_TOKENS, elements_per_token
from .methods import Method

T = TypeVar("T")
HASH_VERSION = 2  # of what a plan's hash is made of; 1 was the representation of Python objects
DECIDING = ("codec", "rope", "group", "time", "block", "group_size", "quantizer", "rounding")  # fields of a method


def needed(x: T | None) -> T:
    """`x`, which is never None where a plan is made of it: `codecs.registry.make_plan` has asked."""
    assert x is not None
    return x


def read_set(profile: Profile | None, method: Method) -> BasisSet:
    """The basis set of `profile` that `method` reads."""
    return needed(profile).basis_set(needed(method.basis_set))


class Made:
    """What is made of a plan on a device, once: tables that the codecs of all its layer groups share."""

    def __init__(self):
        self._made: dict = {}

    def once(self, what: str, xp, like, make: Callable[[], Any]) -> Any:
        """What `make()` gave when it was first asked for on the device of `like` (an array, a device or None)."""
        key = what, xp.__name__, str(getattr(like, "device", like))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one method stores under one budget. Plans are equal that say the same of the same profile.

    bits: the ceiling asked for, average stored bits per K or V element of the sealed region. A family of codecs is a
    subclass, a dataclass with `eq=False`: it says how its plans are made and in which range of bits, what they store, and
    which codec codes by them. `layer_group` is the number of a group of layers in `layer_groups`.
    """

    method: Method
    bits: float
    shape: ModelShape
    profile: Profile | None = None
    made: Made = field(default_factory=Made, init=False, repr=False, compare=False)

    CODEC: ClassVar[type | None] = None
    bits_by_shape: ClassVar[bool] = False  # whether the range of bits depends on the model

    def __eq__(self, other) -> bool:
        return same_fields(self, other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), self.method, self.bits, self.shape))

    def __deepcopy__(self, memo) -> Plan:
        """Itself: nothing in a plan changes, and caches that are copied share what was made of it."""
        return self

    @classmethod
    def default_bits(cls, shape: ModelShape, method: Method) -> float:
        """Stored bits per element where nobody asks for others; of a published method what its paper recommends."""
        raise NotImplementedError

    @classmethod
    def bits_range(cls, shape: ModelShape, method: Method) -> tuple[float, float]:
        """Lowest and highest stored bits per element."""
        raise NotImplementedError

    @classmethod
    def bits_options(cls, shape: ModelShape, method: Method) -> tuple[float, ...]:
        """The stored bits per element that can be reached, where they are few; empty for a whole range."""
        return ()

    @classmethod
    def flat_bits(cls, method: Method, width: float) -> float:
        """Stored bits per element where every code has `width` bits."""
        return width

    @classmethod
    def make(cls, shape: ModelShape, profile: Profile | None, method: Method, bits: float) -> Plan:
        """The plan of most bits within `bits`; raises UsageError that says what can be reached."""
        raise NotImplementedError

    @classmethod
    def check_bits(cls, shape: ModelShape, method: Method, bits: float) -> None:
        """Raise UsageError unless `bits` lie within what `method` can reach."""
        low, high = cls.bits_range(shape, method)
        if not low <= bits <= high:
            raise UsageError(f"Expected bits between {low:g} and {high:g} for {method.name}, received {bits:g}.")

    @property
    def drops(self) -> bool:
        """Whether a cache of this plan drops tokens."""
        return self.method.scorer is not None

    @property
    def codec_class(self) -> type | None:
        """The codec that codes by this plan; None for a plan that compresses nothing."""
        return self.CODEC

    def make_codec(self, xp, layer_group: int, like=None):
        """Codec of a layer group, by number, on the device of `like`, or None for a plan that compresses nothing."""
        return self.codec_class(xp, self, layer_group, like) if self.codec_class else None

    @property
    def remake(self) -> Callable[[Profile | None], Plan]:
        """Makes this plan again of its profile. It keeps no array alive."""
        return partial(type(self).make, self.shape, method=self.method, bits=self.bits)

    @cached_property
    def layer_groups(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the layers of every layer group of the plan."""
        return self.shape.layer_groups(self.method.group)

    def chunk_arrays(self, layer_group: int, batch: int, tokens: int) -> list[tuple]:
        """(shape, dtype name) of every array of a chunk; shape None for bytes whose number depends on the text."""
        raise NotImplementedError

    @property
    def bits_per_element(self) -> float:
        """Average bits per element that a sealed token really takes, everything stored per token included.

        In full chunks: the bytes of `chunk_arrays`.
        """
        groups = range(len(self.layer_groups))
        sizes = [size for layer_group in groups for size in self.chunk_arrays(layer_group, 1, CHUNK_TOKENS)]
        stored = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in sizes)
        return 8 * stored / (CHUNK_TOKENS * elements_per_token(self.shape))

    @property
    def staging(self) -> Plan | None:
        """What holds a prompt until it ends; None where the plan's own codec does."""
        return None

    @property
    def read_set(self) -> BasisSet:
        """The basis set of the profile that the method reads."""
        return read_set(self.profile, self.method)

    def query_statistics(self, layer_group: int) -> dict[str, np.ndarray]:
        """What `scorers.Tokens` takes of the profile for the heads of `layer_group`; empty where it has nothing."""
        queries = self.profile.queries if self.profile is not None else None
        if queries is None:
            return {}
        numbers = [self.shape.layers.index(layer_idx) for layer_idx in self.layer_groups[layer_group]]
        found = {f"query_{name}": np.concatenate(getattr(queries, name)[numbers]) for name in queries.ARRAYS}
        if self.shape.ropes:  # amplitudes have room for the layer that rotates most
            rope = self.rope(layer_group)
            found["query_amplitude"] = found["query_amplitude"][:, : rope.rotary_dim // 2 if rope else 0]
        return found

    def rope(self, layer_group: int) -> Rope | None:
        """How the keys of the layers of `layer_group` are rotated; raises UsageError where they differ."""
        return self.shape.common_rope(self.layer_groups[layer_group])

    def decides(self) -> dict[str, Any]:
        """By name, the arrays and numbers that say what codes mean."""
        return {}

    def shared_tables(self, xp, like=None) -> tuple:
        """Arrays that the codecs of all layer groups share."""
        return ()

    @cached_property
    def hash(self) -> str:
        """Identifies what codes mean: the first digits of SHA-256 of versioned JSON of all that decides them.

        RoPE frequencies are not part of it: hosts differ in their last bits, and files compare them by a tolerance
        (`ModelShape.mismatch`).
        """
        shape = self.shape
        fields = {
            "version": HASH_VERSION,
            "method": {name: getattr(self.method, name) for name in DECIDING},
            "layers": list(shape.layers),
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            **dict(zip(("rotary_dim", "interleaved"), _rotated(shape.rope))),
            **({"ropes": [[i, *_rotated(rope)] for i, rope in shape.ropes]} if shape.ropes else {}),
            "arrays": {name: array_digest(x) for name, x in self.decides().items()},
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _rotated(rope: Rope | None) -> tuple[int, bool]:
    """Channels that are rotated, and whether neighbors pair up."""
    return (rope.rotary_dim, rope.interleaved) if rope else (0, False)


def array_digest(x) -> str:
    """SHA-256 of the dtype, the shape and the bytes of an array, little-endian."""
    x = np.ascontiguousarray(x)
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(f"{x.dtype.str}{x.shape}".encode() + x.tobytes()).hexdigest()

"""What fits in memory: weights, cache and what reading a prompt needs on top, counted without loading a weight.

Bytes of a cache are those of its arrays, exactly. What a prompt needs on top is an estimate of the large arrays that are
alive at a time. What the process itself takes (interpreter and libraries) is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..arrays.transform import band_sizes
from ..cache.size import KINDS
from ..codecs.registry import bits_range, check_bits, family_of, make_plan
from ..errors import UsageError
from ..planning.budget import CHUNK_TOKENS, SEAL, SINKS, WINDOW, elements_per_token, whole_number
from ..planning.methods import METHODS, Method
from ..planning.plan import Plan
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile
from ..quantization.quantizer import BIT_WIDTHS
from .passed_layers import UNLIMITED, PassedLayer
from .stored_bytes import Ceiling, Stored
from .synthetic import synthetic_plan, synthetic_profile

UNITS = {"B": 1} | {f"{p}{i}B": (1024 if i else 1000) ** n for n, p in enumerate("KMGT", 1) for i in ("", "i")}
DEFAULT_BITS = (4.0, 3.0, 2.0, 1.0)
FIRST_CONTEXT, LAST_CONTEXT = 4096, 131072  # of the contexts shown when nobody asked for others: powers of two
BITS_STEP = 0.05  # of the bits that a context allows
ENCODE_COPIES = 6  # float32 copies of a chunk of keys and values alive while it is encoded or decoded
HIDDEN_COPIES, MLP_COPIES, PARTIAL_COPIES = 4, 3, 4  # arrays of a call's tokens: residuals, MLP, attention outputs


@dataclass(frozen=True)
class Footprint:
    """What a backend says about a model without loading it.

    passed: layers that are not compressed, with the reason; held: what such a layer holds, where that is known;
    element_bytes: size of an exact element; intermediate: channels of the MLP that
    one token goes through; context: tokens that the model was made for; call: tokens of a prompt per forward pass;
    decodes_history: whether a call of a prompt decodes the whole history of a layer, or chunk by chunk; pair_bytes: what
    attention needs per query and key of a call that is no first one (a mask, or scores where no kernel is fused);
    shares_memory: whether a loaded profile takes of the same memory, as it does on a CPU and on Apple silicon.
    """

    shape: ModelShape
    passed: dict[int, str]
    held: dict[int, PassedLayer]
    weights_bytes: int
    element_bytes: int
    intermediate: int
    context: int | None
    call: int
    decodes_history: bool
    pair_bytes: int
    shares_memory: bool

    @property
    def layer_elements(self) -> int:
        """K and V elements of one token in one layer."""
        return self.shape.kv_heads * sum(self.shape.side_widths)

    @property
    def elements(self) -> int:
        """K and V elements of one token in all compressible layers."""
        return elements_per_token(self.shape)


def parse_bytes(text: str) -> int:
    """Bytes that `8GB` (decimal), `8GiB` (binary), `512MB` or a plain number of bytes stand for; raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    number, name = (found[1], found[2]) if found else ("0", "")
    unit = {known.lower(): size for known, size in UNITS.items()}.get((name or "B").lower(), 0)
    size = int(float(number) * unit) if "." in number else int(number) * unit
    if size <= 0 or ("." in number and not name):
        raise UsageError(
            f"Expected an amount of memory such as 8GB, 8GiB, 512MB or a number of bytes, received {text!r}."
        )
    return size


@dataclass(frozen=True)
class Budget:
    """Bytes of a model with a cache of one kind; `stored` None keeps every token as it is, at `exact_bytes` an element."""

    model: Footprint
    stored: Stored | Ceiling | None
    sinks: int
    window: int
    exact_bytes: int
    profile_bytes: int = 0

    def _sealed(self, context: int) -> int:
        if self.stored is None:
            return 0
        return max(context - self.sinks - self.window, 0) // self.stored.seal * self.stored.seal

    def bytes_by_kind(self, context: int) -> dict[str, int]:
        """Bytes of every array held for one sequence of `context` tokens, by `KINDS`."""
        sealed, kinds = self._sealed(context), dict.fromkeys(KINDS, 0)
        kinds["codes"] = self.stored.nbytes(sealed) if self.stored is not None and sealed else 0
        kinds["exact"] = (context - sealed) * self.model.elements * self.exact_bytes
        for layer in self.model.held.values():
            kinds[layer.kind] += min(context, layer.most_tokens) * layer.token_elements * self.exact_bytes
            for kind, size in layer.fixed.items():
                kinds[kind] += size
        return kinds

    def cache_bytes(self, context: int) -> int:
        """The sum of `bytes_by_kind`."""
        return sum(self.bytes_by_kind(context).values())

    def exact_tokens(self, context: int) -> int:
        """Tokens that a compressed layer holds as they came, or a plain one."""
        return context - self._sealed(context)

    def dense_bytes(self, context: int) -> int:
        """Bytes of the plain cache at 16 bits, of tokens and states."""
        kinds = replace(self, stored=None, exact_bytes=2).bytes_by_kind(context)
        states = 2 * sum(layer.state_elements for layer in self.model.held.values())
        return kinds["exact"] + kinds["sliding window"] + states

    def staged(self, context: int, turns: bool) -> int:
        """Tokens that wait at more bits until the prompt ends: all but its first call, or of a turn no more than a call."""
        if self.stored is None or self.stored.staging is None:
            return 0
        sealed = self._sealed(context)
        later = sealed - self._sealed(min(context, self.model.call))
        return min(later, self.model.call) // SEAL * SEAL if turns else later

    def table_bytes(self, context: int) -> int:
        """Bytes that all sequences share; a prompt of more than one call needs the tables of its staging too."""
        if self.stored is None:
            return 0
        staging = self.stored.staging if self.staged(context, False) else None
        return self.stored.table_bytes + (0 if staging is None else staging.table_bytes)

    def prefill_bytes(self, context: int, turns: bool = False) -> int:
        """What reading needs on top of the final cache: a prompt of `context` tokens, or the last call of turns."""
        model, call = self.model, min(context, self.model.call)
        held = call * (HIDDEN_COPIES * model.shape.hidden_size + MLP_COPIES * model.intermediate) * model.element_bytes
        held += call * context * model.pair_bytes
        if self.stored is None:  # the host joins a layer's keys, then its values, while the old ones are still there
            return held + context * model.layer_elements // 2 * self.exact_bytes
        layer = min(context, CHUNK_TOKENS) * model.layer_elements * 4 * ENCODE_COPIES
        if context > model.call:
            if model.decodes_history:
                layer = max(layer, 2 * context * model.layer_elements * self.exact_bytes)
            else:
                layer += call * model.shape.q_heads * model.shape.head_dim * 4 * PARTIAL_COPIES
        extra, staged, staging = 0, self.staged(context, turns), self.stored.staging
        if staging is not None and staged:
            extra = staging.nbytes(staged) - self.stored.nbytes(staged)
        return held + layer + max(extra, 0)

    def peak_bytes(self, context: int, turns: bool = False) -> int:
        """Everything at the worst moment; `turns`: the context comes in pieces of at most one call."""
        held = self.model.weights_bytes + self.profile_bytes + self.cache_bytes(context) + self.table_bytes(context)
        return held + self.prefill_bytes(context, turns)

    def longest(self, memory: int, turns: bool = False) -> int:
        """Most tokens that `memory` bytes hold, as far as the model goes; 0 when not one fits."""
        low, high = 0, self.model.context or UNLIMITED
        if self.peak_bytes(high, turns) <= memory:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle, turns) <= memory else (low, middle)
        return low


@dataclass(frozen=True)
class Wanted:
    """The caches that `fit` counts. bits, contexts: none for those that the method and the model suggest.

    window, sinks: last and first tokens that stay exact.
    """

    method: Method
    bits: Iterable[float] = ()
    contexts: Iterable[int] = ()
    window: int = WINDOW
    sinks: int = SINKS


def fit(
    model: Footprint, memory: int, wanted: Wanted, profile: Profile | None, tables: Callable[[Plan], tuple[int, int]]
) -> dict:
    """`rows` for every pair of bits and context, `limits` by bits, `contexts` with the bits that they allow.

    profile None: tables and widths of a typical plan for this shape. tables: (bytes of the layer groups, bytes that all groups
    share) of a plan. Raises UsageError for bits that the method cannot reach, contexts out of range, or memory that the
    weights alone exceed.
    """
    method, bits, contexts = wanted.method, tuple(dict.fromkeys(wanted.bits)), tuple(dict.fromkeys(wanted.contexts))
    check_wanted(wanted, model.context)
    _check_model(model, memory)
    contexts = contexts or _default_contexts(model.context)
    made = {b: _stored(model, method, profile, tables, b) for b in bits or _default_bits(model.shape, method)}
    own = 8 * model.element_bytes
    budgets = {("plain", float(b)): Budget(model, None, 0, 0, b // 8) for b in sorted({16, own}, reverse=True)}
    profile_bytes = _profile_nbytes(model.shape, profile) if method.basis_set and model.shares_memory else 0
    sizes = wanted.sinks, wanted.window, model.element_bytes, profile_bytes
    budgets |= {(method.name, b): Budget(model, s, *sizes) for b, s in made.items()}
    table_bytes = max((stored.table_bytes for stored in made.values()), default=0)
    options = model, method, table_bytes, sizes, memory
    return {
        "rows": [_record(*key, budget, context, memory) for context in contexts for key, budget in budgets.items()],
        "limits": [_limit(*key, budget, memory) for key, budget in budgets.items()],
        "contexts": [
            {
                "context": c,
                "max_bits": _highest_bits(*options, c, turns=False),
                "max_bits_in_turns": _highest_bits(*options, c, turns=True),
            }
            for c in contexts
        ],
    }


def check_wanted(wanted: Wanted, limit: int | None = None) -> None:
    """Raise UsageError for what cannot be counted; `limit`: tokens that the model was made for, where that is known."""
    method = wanted.method
    for name in ("window", "sinks"):
        whole_number(name, getattr(wanted, name), 0)
    if method.scorer is not None:
        raise UsageError(
            f"Expected a method that keeps every token, received {method.name}: a cache that drops tokens has the size of its "
            "`budget_tokens` at any context."
        )
    for asked in wanted.bits:
        if not method.compresses:
            raise UsageError(f"Expected no `bits` for {method.name}, which stores what the plain cache does.")
        check_bits(method, asked)
    for context in wanted.contexts:
        if context < 1 or (limit and context > limit):
            most = f" and at most {limit:,}, the model's context" if limit else ""
            raise UsageError(f"Expected `contexts` of at least 1 token{most}, received {context:,}.")


def _check_model(model: Footprint, memory: int) -> None:
    if memory <= model.weights_bytes:
        raise UsageError(
            f"Expected memory for the weights, {model.weights_bytes:,} bytes, received {memory:,}. Give more `memory`, or "
            "take a model with fewer or smaller weights."
        )
    if not model.shape.layers:
        raise UsageError(
            f"Expected full-attention layers to compress, received only: {', '.join(sorted(set(model.passed.values())))}."
        )


def _default_contexts(limit: int | None) -> tuple[int, ...]:
    most = min(limit or LAST_CONTEXT, LAST_CONTEXT)
    powers = [FIRST_CONTEXT << i for i in range(32) if FIRST_CONTEXT << i <= most]
    return tuple(powers) or (most,)


def _default_bits(shape: ModelShape, method: Method) -> tuple[float, ...]:
    if not method.compresses:
        return ()
    family = family_of(method)
    if options := family.bits_options(shape, method):
        return tuple(sorted(options, reverse=True))
    low, high = family.bits_range(shape, method)
    own = [family.default_bits(shape, method)] if family.bits_by_shape else []
    return tuple(sorted({*own, *(b for b in DEFAULT_BITS if low <= b <= high)}, reverse=True))


def _stored(model: Footprint, method: Method, profile: Profile | None, tables, bits: float) -> Stored:
    if not method.transforms or profile is not None:  # raises for a method that cannot do without its profile
        return Stored(make_plan(model.shape, profile, method, bits), tables)
    family_of(method).check_bits(model.shape, method, bits)
    one = replace(model.shape, num_layers=1, layers=(0,))
    plan = synthetic_plan(one, synthetic_profile(one, [method]), method, bits, "typical")
    return Stored(plan, tables, len(model.shape.layers))


def _profile_nbytes(shape: ModelShape, profile: Profile | None) -> int:
    """What a loaded profile takes; without one, that of all methods: bases, and numbers of every coefficient."""
    if profile is not None:
        sets = [[getattr(b, name) for name in b.ARRAYS] for b in profile.basis_sets.values()]
        queries = profile.queries and [getattr(profile.queries, name) for name in profile.queries.ARRAYS]
        return sum(x.nbytes for arrays in [*sets, queries or []] for x in arrays)
    total, heads = 0, 2 * shape.kv_heads
    for method in (METHODS[name] for name in ("spectral", "spectral-dense")):
        groups = heads if method.group == "head" else 1
        rank = heads // groups * shape.head_dim
        total += groups * rank * 4 * (rank + len(band_sizes(method.block)) * (len(BIT_WIDTHS) + 2))
    return total * len(shape.layers)


def _limit(name: str, bits: float, budget: Budget, memory: int) -> dict:
    """How far a cache gets in `memory`, and what stops it."""
    longest = budget.longest(memory, turns=True)
    return {
        "method": name,
        "bits": bits,
        "bits_per_element": budget.stored.bits_per_element if budget.stored else bits,
        "max_prompt": budget.longest(memory),
        "max_context": longest,
        "limited_by": "model" if longest == budget.model.context else "memory",
    }


def _record(name: str, bits: float, budget: Budget, context: int, memory: int) -> dict:
    cache, dense = budget.cache_bytes(context), budget.dense_bytes(context)
    peak, turns = budget.peak_bytes(context), budget.peak_bytes(context, turns=True)
    return {
        "method": name,
        "bits": bits,
        "bits_per_element": budget.stored.bits_per_element if budget.stored else bits,
        "context": context,
        "weights_bytes": budget.model.weights_bytes,
        "cache_bytes": cache,
        "bytes_by_kind": budget.bytes_by_kind(context),
        "exact_tokens": budget.exact_tokens(context),
        "table_bytes": budget.table_bytes(context),
        "profile_bytes": budget.profile_bytes,
        "prefill_bytes": budget.prefill_bytes(context),
        "peak_bytes": peak,
        "peak_bytes_in_turns": turns,
        "dense_bytes": dense,
        "compression": dense / cache,
        "fits": peak <= memory,
        "fits_in_turns": turns <= memory,
    }


def _highest_bits(
    model: Footprint, method: Method, table_bytes: int, sizes: tuple, memory: int, context: int, turns: bool
) -> float | None:
    """Highest bits with which `context` fits; those of the plain cache where it does, None where nothing does."""
    if Budget(model, None, 0, 0, model.element_bytes).peak_bytes(context, turns) <= memory:
        return 8.0 * model.element_bytes
    options = list(_default_bits(model.shape, method))
    if method.compresses and not family_of(method).bits_options(model.shape, method):
        low, high = bits_range(method, model.shape)
        steps = np.arange(np.ceil(low / BITS_STEP - 1e-9), np.floor(high / BITS_STEP + 1e-9) + 1)
        options = (steps * BITS_STEP).tolist()
    for bits in sorted(options, reverse=True):
        staged = method.transforms
        stored = Ceiling(bits, model.elements, table_bytes, staged, max(SEAL, method.block))
        if Budget(model, stored, *sizes).peak_bytes(context, turns) <= memory:
            return round(bits, 2)
    return None

"""From what a cache layer gives back in place of keys and values to attention: handles, and our attention function.

transformers calls `update` before attention and gives the attention function no cache, so the way to the codes leads
through the returned tensors. Any operation of torch on a handle decodes the cache and goes on with a plain tensor: what
does not reach our attention function attends to the whole history all the same.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spectral_kv_core.errors import UsageError

from .kernels.flash import causal_attention

ATTENTION = "spectralkv"
# arguments that leave scores as they are: the mask says what they say, or they are for other parts of the model
NEUTRAL = frozenset(
    (
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "labels", "logits_to_keep", "max_length_k", "max_length_q",
        "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids",
        "return_dict", "seq_idx", "sliding_window", "use_cache",
    )
)  # fmt: skip
USUAL = {"dropout": 0.0, "is_causal": True, "output_attentions": False}  # values that leave scores as they are
OF_SDPA = frozenset(("dropout", "is_causal", "position_bias"))  # others, which transformers' sdpa honors


class RoutedName(str):
    """`ATTENTION` in the configuration of a model, in place of the name `before`, which `restore` gives back.

    Models ask whether their attention is "eager" or "sdpa", and compute something else for a name they do not know. Ours
    takes what sdpa takes, and is equal to its name. decode: the model has no sdpa, so its own function must attend.
    """

    before: str | None
    decode: bool

    def __new__(cls, before: str | None = "sdpa", decode: bool = False) -> RoutedName:
        name = super().__new__(cls, ATTENTION)
        name.before, name.decode = before, decode
        return name

    def __getnewargs__(self) -> tuple:
        """What copies and pickles of it are made from."""
        return self.before, self.decode

    def __eq__(self, other) -> bool:
        return str.__eq__(self, other) is True or other == "sdpa"

    def __ne__(self, other) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(ATTENTION)  # tables of transformers find what is registered as that


UNKNOWN = RoutedName()  # of a module without a configuration


class Pending:
    """Tokens [B, H, L, D] that `layer` took in for layer number `number` of its group, behind `slots` slots of history."""

    def __init__(self, layer, keys: torch.Tensor, values: torch.Tensor, number: int = 0, slots: int = 0, widths=None):
        """widths: channels of keys and values as the model gave them, where zeros stand behind."""
        self.layer, self.keys, self.values, self.number, self.slots = layer, keys, values, number, slots
        self.widths = widths or (keys.shape[3], values.shape[3])
        self._dense = None

    def __iter__(self):
        return iter((self.keys, self.values))

    def handles(self) -> tuple[Handle, Handle]:
        """Handles for keys and values [B, H, slots + L, D], shaped as the dense tensors would be."""
        return Handle.make(self, 0, self.keys), Handle.make(self, 1, self.values)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoded keys and values of everything up to these tokens, laid out as handles say: torch plans views by that."""
        if self._dense is None:
            self._dense = tuple(x[..., :width].contiguous() for x, width in zip(self.layer.dense(self), self.widths))
        return self._dense


class Handle(torch.Tensor):
    """Stands for the dense keys (side 0) or values (side 1) of a layer."""

    pending: Pending
    side: int

    @staticmethod
    def make(pending: Pending, side: int, new: torch.Tensor) -> Handle:
        shape = (*new.shape[:2], pending.slots + new.shape[2], pending.widths[side])
        handle = torch.Tensor._make_wrapper_subclass(Handle, shape, dtype=new.dtype, device=new.device)
        handle.pending, handle.side = pending, side
        return handle

    def __repr__(self) -> str:
        return f"Handle({'keys' if self.side == 0 else 'values'}, shape={tuple(self.shape)})"

    def data_ptr(self) -> int:
        """Refused: code that takes an address would find no memory there."""
        raise UsageError(
            "Expected torch operations on the keys and values of a compressed cache, received a request for their address. "
            "Give a copy: keys.clone()."
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                if any(isinstance(x, Handle) for x in tree_leaves(given)):
                    raise UsageError(
                        f"Expected the keys and values of a compressed cache to stay as they are, received {func} on them. "
                        "Change a copy: keys.clone()."
                    )

        def decode(x):
            return x.pending.dense()[x.side] if isinstance(x, Handle) else x

        return func(*tree_map(decode, args), **tree_map(decode, kwargs))


class Decoding:
    """`function` of the host with decoded keys and values in place of handles, which its compiler does not know."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, module, query, key, value, *args, **kwargs):
        key, value = (x.pending.dense()[x.side] if isinstance(x, Handle) else x for x in (key, value))
        return self.function(module, query, key, value, *args, **kwargs)


def pending_of(key: torch.Tensor, value: torch.Tensor) -> Pending | None:
    """Whose handles `key` and `value` are; None where one of them is a tensor that something was done to."""
    both = isinstance(key, Handle) and isinstance(value, Handle)
    return key.pending if both and key.pending is value.pending and (key.side, value.side) == (0, 1) else None


class LastPadding:
    """`left_padding`, read once per call of the model: all layers get the same mask, and reading waits for the device.

    A mask that was made in inference mode does not count its changes. It is read again when its reader asks again.
    """

    def __init__(self):
        self._mask: Callable[[], torch.Tensor | None] = lambda: None
        self._version, self._padding, self._reader = None, None, None

    def __call__(self, mask: torch.Tensor, length: int, module=None) -> list[int] | None:
        """The padding of `mask` for a call of `length` tokens, for the attention of `module`."""
        version = None if mask.is_inference() else mask._version, length
        again = mask.is_inference() and module is not None and self._reader == id(module)
        if again or self._mask() is not mask or self._version != version:
            self._reader = id(module)
            self._padding = left_padding(mask, length)
            self._mask, self._version = weakref.ref(mask), version
        return self._padding


_last_padding = LastPadding()


@torch.compiler.disable
def attention_forward(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    """Attention function for `AttentionInterface`: our handles are attended as codes, anything else goes to the host.

    A mask or an argument that changes scores in another way than left padding does sends the decoded history to the
    host's own function, and so does a call that gradients may go through. Raises UsageError where there is none.
    """
    pending, length = pending_of(key, value), query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pending is None:
        function = _function_for_plain(module, kwargs)
        return _by_host(function, module, query, key, value, attention_mask, scale, kwargs, 0)
    function, layer = _function_for(module, kwargs), pending.layer
    if (owner := getattr(layer, "owner", None)) is not None:
        owner.meet(module)
    padding, is_padding = None, True
    if attention_mask is not None:
        padding = _last_padding(attention_mask, length, module)
        is_padding = padding is not None
        if padding is not None and len(padding) == 1:
            padding = padding * query.shape[0]
    if function is None and is_padding and not _wants_gradients(query, pending) and layer.can_attend(pending, padding):

        def fused(q, k, v, scale):
            return _fused(module, q, k, v, scale)

        out = layer.attend(pending, query, scale, fused, padding)
        return out.transpose(1, 2).contiguous(), None
    held = layer.decoded(pending, query, scale, padding)
    before = held[0].shape[2] - length
    return _by_host(function or sdpa_attention_forward, module, query, *held, attention_mask, scale, kwargs, before)


def _wants_gradients(query: torch.Tensor, pending: Pending) -> bool:
    """Whether somebody may go back through this attention, which our kernels know nothing of."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (query, pending.keys, pending.values))


def _by_host(function, module, query, key, value, mask, scale: float, kwargs: dict, before: int) -> tuple:
    """What `function` of the host gives for L queries behind `before` of N keys: [B, L, Hq, D], and weights or None.

    Without a mask it is causal where the module is. That leaves the keys out that a static cache has room for.
    """
    length, is_sdpa = query.shape[2], function is sdpa_attention_forward
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and length > 1 and causal and (before or not is_sdpa):
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(before)[None, None]
    if mask is not None and mask.dtype == torch.bool and not is_sdpa:  # functions of models add their mask
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    return function(module, query, key, value, mask, scaling=scale, **kwargs)


def _function_for(module, kwargs: dict) -> Callable | None:
    """The host's function that honors what `kwargs` and the model ask for; None where ours does."""
    asked, own = _asked(module, kwargs)
    if not own:
        return sdpa_attention_forward if asked else None
    function = _own_function(module)
    if function is None:
        what = ", ".join(sorted(asked)) or "its own kind of scores"
        raise UsageError(
            f"Expected a function that attends with {what}, found none: the module of a {type(module).__name__} has no "
            "eager_attention_forward. Call restore(model) of spectral_kv_torch: the model then decodes the cache."
        )
    return function


def _function_for_plain(module, kwargs: dict) -> Callable:
    """What attends to a plain cache: sdpa, or what the model had before where only that does as it did."""
    if _name(module).before != "sdpa" and _asked(module, kwargs)[1]:
        return _own_function(module) or sdpa_attention_forward
    return sdpa_attention_forward


def _asked(module, kwargs: dict) -> tuple[set[str], bool]:
    """Names of arguments that change scores, and whether only the model's own function honors them."""
    asked = {
        name
        for name, value in kwargs.items()
        if value is not None and name not in NEUTRAL and not (name in USUAL and _is_usual(name, value))
    }
    if getattr(getattr(module, "config", None), "output_attentions", False):
        asked.add("output_attentions")
    return asked, _name(module).decode or not asked <= OF_SDPA


def changed_scores(module, kwargs: dict) -> list[str]:
    """Names of arguments that change scores in a way that only the host's own functions honor."""
    return sorted(_asked(module, kwargs)[0])


def is_decoded(module, kwargs: dict) -> bool:
    """Whether a function of the host attends for `module`, to the decoded history."""
    asked, own = _asked(module, kwargs)
    return own or bool(asked)


def _is_usual(name: str, value) -> bool:
    return not isinstance(value, torch.Tensor) and value == USUAL[name]


def _name(module) -> RoutedName:
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name if isinstance(name, RoutedName) else UNKNOWN


def _own_function(module) -> Callable | None:
    """The eager attention of the file that has the class of `module`, which no registered function takes the place of."""
    found = (
        getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None) for kind in type(module).__mro__
    )
    return next((function for function in found if function is not None), None)


def _fused(module, q, k, v, scale):
    """The host's fused kernel for L queries at the end of N keys, causal: [B, Hq, L, D]."""
    length, total, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    if length == 1:  # query heads of a KV head as rows: one row with enable_gqa is 1.6 to 3.5 times slower on CPU
        rows = q.view(q.shape[0], kv_heads, -1, q.shape[3])
        out = torch.nn.functional.scaled_dot_product_attention(rows, k, v, scale=scale)
        return out.reshape(*q.shape[:3], v.shape[3])
    if (out := causal_attention(q, k, v, scale)) is not None:
        return out
    mask = None
    if length < total:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)[None, None]
    return sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0].transpose(1, 2)


def left_padding(mask: torch.Tensor, length: int) -> list[int] | None:
    """Left padding of every row, from a [B, 1, L, N] mask; None for one that is not causal with left padding."""
    if mask.dtype == torch.bool:
        seen = mask
    else:  # what is added to scores: nothing, or so much that a token is not seen
        seen = mask == 0
        if not torch.equal(mask <= torch.finfo(mask.dtype).min / 2, ~seen):
            return None
    last = seen[:, 0, -1]
    padding = (~last).sum(-1)
    total = last.shape[-1]
    expected = torch.arange(total, device=mask.device)[None] >= padding[:, None]
    causal = torch.ones(length, total, dtype=torch.bool, device=mask.device).tril(total - length)
    if seen.shape[1] != 1 or not torch.equal(seen[:, 0], expected[:, None] & causal):
        return None
    return padding.tolist()

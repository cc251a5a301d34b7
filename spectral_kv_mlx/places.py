"""Where a model calls its attention: functions of ours stand there while the model has compressed caches."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from .handles import is_ours, make_dispatcher, replacing, routing
from .masks import MaskCheck

ATTENTION = "scaled_dot_product_attention"


_unrouted: dict[int, weakref.ref] = {}  # by id, parts of models whose layers get the decoded cache


def install(model, own: Collection[int] = ()) -> None:
    """Let `model` attend to compressed caches as codes; plain caches keep going to mlx-lm's own attention.

    own: indices of layers that get decoded caches all the same, since their attention is code of their own.
    """
    for owner, name, make in _places(model):
        if not is_ours(getattr(owner, name)):
            setattr(owner, name, make(getattr(owner, name)))
        getattr(owner, name).users[id(model)] = weakref.ref(model)
    for i, layer in enumerate(model.layers):
        for part in parts_of(layer):
            if i in own:
                _unrouted[id(part)] = weakref.ref(part, partial(_forget, id(part)))
            else:
                _unrouted.pop(id(part), None)


def _forget(key: int, part: weakref.ref) -> None:
    if _unrouted.get(key) is part:
        del _unrouted[key]


def parts_of(layer) -> list[nn.Module]:
    """`layer` and all modules inside, in no order: every cache that is made asks, and `named_modules` takes its time."""
    found, left = [], [layer]
    while left:
        x = left.pop()
        if isinstance(x, nn.Module):
            found.append(x)
        if isinstance(x, dict):
            left += x.values()
        elif isinstance(x, (list, tuple)):
            left += x
    return found


def dispatcher(host: Callable) -> Callable:
    """Attention that attends to our caches as codes; all else goes to `host`."""
    return make_dispatcher(host, _fused, MaskCheck())


def restore(model) -> None:
    """Give `model` its host's attention back; compressed caches then decode for it.

    Models of one family share their attention: it is given back when the last of them is restored.

    Args:
        model: A model that `make_prompt_cache` or `load_prompt_cache` has been called with.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import load_model, make_prompt_cache, restore
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model)
        >>> restore(model)
    """
    for part in (part for layer in model.layers for part in parts_of(layer)):
        _unrouted.pop(id(part), None)
    for owner, name, _ in _places(model):
        function = getattr(owner, name)
        if not is_ours(function):
            continue
        function.users.pop(id(model), None)
        if not any(user() is not None for user in function.users.values()):
            setattr(owner, name, function.host)


def _places(model) -> list[tuple[Any, str, Callable]]:
    """Where functions of ours stand while `model` is installed: owner, name, and what makes one of the host's own.

    The modules that `model` calls attention from, and the classes in them that its layers are made of.
    """
    names = attention_modules(model)
    classes: dict[type, set[str]] = {}
    for part in (part for layer in model.layers for part in parts_of(layer)):
        bases = type(part).__mro__
        owner = next((base for base in bases if "__call__" in vars(base)), None)  # that says how `part` is called
        if owner is not None and owner.__module__ in names:
            classes.setdefault(owner, set()).update(names & {base.__module__ for base in bases})
    found = [(sys.modules[name], ATTENTION, dispatcher) for name in names]
    return found + [(owner, "__call__", partial(_routing_call, of)) for owner, of in classes.items()]


def _routing_call(modules: set[str], host: Callable) -> Callable:
    """How a part of a model is called: with a route while all `modules` that it may call attention from have ours."""

    def __call__(self, *args, **options):
        if id(self) in _unrouted or not all(is_ours(getattr(sys.modules[name], ATTENTION)) for name in modules):
            return host(self, *args, **options)
        with routing(self):
            return host(self, *args, **options)

    return replacing(host, __call__)


@contextmanager
def routed(model, own: Collection[int] = ()) -> Iterator[None]:
    """Route the attention of `model` through ours for a while; own: as `install` takes it."""
    functions = [getattr(owner, name) for owner, name, _ in _places(model)]
    before = any(is_ours(function) and id(model) in function.users for function in functions)
    known = {i for i, layer in enumerate(model.layers) if any(id(part) in _unrouted for part in parts_of(layer))}
    install(model, own)
    try:
        yield
    finally:
        if before:
            install(model, known)
        else:
            restore(model)


@contextmanager
def replaced_attention(model, around: Callable[[Callable], Callable]) -> Iterator[None]:
    """Put `around(dispatcher)` where `model`, which is installed, calls attention, for a while."""
    before = {name: getattr(sys.modules[name], ATTENTION) for name in attention_modules(model)}
    try:
        for name, function in before.items():
            setattr(sys.modules[name], ATTENTION, replacing(function.host, around(function), function.users))
        yield
    finally:
        for name, function in before.items():
            setattr(sys.modules[name], ATTENTION, function)


def attention_modules(model) -> set[str]:
    """Modules of mlx-lm that `model` calls attention from."""
    return set().union(*(attention_modules_of(layer) for layer in model.layers if layer is not None))


def attention_modules_of(layer: nn.Module) -> set[str]:
    """Modules of the classes in `layer` that have mlx-lm's attention, or our dispatcher, under its usual name."""
    names = {cls.__module__ for kind in set(map(type, parts_of(layer))) for cls in kind.__mro__}
    found = {name: getattr(sys.modules.get(name), ATTENTION, None) for name in names if name != base.__name__}
    return {name for name, f in found.items() if f is base.scaled_dot_product_attention or is_ours(f)}


def _fused(q, k, v, scale, sinks=None):
    """The host's fused kernel for L queries at the end of N keys, causal: [B, Hq, L, D]; sinks: logits [Hq]."""
    mask = "causal" if q.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

"""The name of our attention in a model's configurations: put there, taken out, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from .handles import ATTENTION, Decoding, RoutedName, attention_forward

FLEX = "flex_attention"  # attention that torch compiles


def register() -> None:
    """Make `attn_implementation="spectralkv"` known, for attention and for masks."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    flex = AttentionInterface._global_mapping.get(FLEX)
    if flex is not None and not isinstance(flex, Decoding):  # for models that `restore` gives it back to
        AttentionInterface.register(FLEX, Decoding(flex))


def install(model) -> None:
    """Let `model` attend to compressed caches as codes; plain caches go to sdpa."""
    register()
    if is_routed(model):
        return
    configurations = _configurations(model)
    before = [config._attn_implementation for config, _ in configurations]
    model.set_attn_implementation(ATTENTION)
    for (config, has_sdpa), name in zip(configurations, before):
        if config._attn_implementation == ATTENTION:
            if name == ATTENTION:  # a part that was installed alone, or a model that was loaded with our name
                name = getattr(name, "before", "sdpa")
            config._attn_implementation_internal = RoutedName(name, decode=not has_sdpa)


def is_routed(model) -> bool:
    """Whether `model` attends to compressed caches as codes."""
    return any(isinstance(config._attn_implementation, RoutedName) for config, _ in _configurations(model))


def restore(model) -> None:
    """Give `model` its host's attention back; compressed caches then decode for it.

    Every part of the model gets the attention that it had before.

    Args:
        model: A model that `make_prompt_cache` or `load_prompt_cache` has been called with.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import load_model, make_prompt_cache, restore
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model)
        >>> restore(model)
        >>> model.config._attn_implementation
        'sdpa'
    """
    for config, _ in _configurations(model):
        if isinstance(name := config._attn_implementation, RoutedName):
            config._attn_implementation_internal = name.before


@contextmanager
def routed(model) -> Iterator[None]:
    """Let `model` attend to compressed caches as codes, for a while."""
    was_routed = is_routed(model)
    install(model)
    try:
        yield
    finally:
        if not was_routed:
            restore(model)


def _configurations(model) -> list[tuple]:
    """Every configuration of `model` and of its parts, and whether the part that reads it has sdpa."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = {id(part.config): (part.config, bool(part._supports_sdpa)) for part in parts}
    waiting = [(model.config, bool(getattr(model, "_supports_sdpa", True)))]
    while waiting:
        config, has_sdpa = waiting.pop()
        config, has_sdpa = found.setdefault(id(config), (config, has_sdpa))
        inner = (getattr(config, name, None) for name in config.sub_configs)
        waiting += [(one, has_sdpa) for one in inner if one is not None]
    return list(found.values())


def routes(model) -> list[tuple]:
    """Every configuration of `model`, and the name of the attention that stands in it."""
    return [(config, config._attn_implementation) for config, _ in _configurations(model)]


def set_routes(before: list[tuple]) -> None:
    """Put names of `routes` back."""
    for config, name in before:
        config._attn_implementation_internal = name

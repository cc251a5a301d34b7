"""A trial run of a model: how every layer uses its cache, seen instead of read from a configuration.

Once per model. Nine tokens go through a cache and an attention function that only look on, and again at other positions.
Some seventy go through a cache that seals them at once without a loss, and through the host's own: the logits must be the
same. The model is afterwards as it was.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.arrays.rope_fit import SHIFTS, fit_rope, is_rotated_by
from spectral_kv_core.codecs.exact import ExactPlan
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.profile.model_shape import ModelShape
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED, LayerSurvey, surveyed_shape, surveyed_windows
from spectral_kv_core.profile.store import warn_once

from . import ops, routing
from .arguments import device_of, known_ropes, max_context, read_layers, read_rope, text_config, window_kind
from .cache import SpectralCache
from .handles import ATTENTION, attention_forward, changed_scores, is_decoded, left_padding
from .host_cache import cache_argument, cache_of, host_layers, plain_cache

FIRST = 9  # tokens of the call that is looked at
MOVED = 4  # of them, those that are tried at other positions
PIECES = (48, 18, 1, 1)  # tokens of the calls that are compared: all but the first attend to sealed ones
KEPT = 8  # logits that are compared of every call
SMALL = 4096  # elements of a buffer that is put back
IDS = 32000  # ids that are tried lie below
ENCODED = 5  # states of an encoder that a decoder is given
# how far logits of a compressed cache may be from the plain cache's, as a share of their spread
SAME = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
SWITCHES = "keys are rotated in another way in long texts"
OWN_KIND = "a cache of its own kind"
WORDS = {  # of arguments of attention functions
    "is_causal": "attention in both directions",
    "output_attentions": "attention weights that the config asks for",
    "position_bias": "position bias",
    "s_aux": "sink logits",
    "softcap": "capped logits",
}


@dataclass
class Call:
    """What attention was given by a layer: its query heads, whether that was what a cache layer gave back, and arguments."""

    q_heads: int
    source: int | None
    changed: str = ""


@dataclass
class Trace:
    """What was seen of every layer in one call of a model: keys and values of its updates, and calls of attention."""

    updates: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    given: list[tuple] = field(default_factory=list)

    def watch(self, layers: Sequence) -> None:
        """Note every update of `layers`, which go on as they do."""
        for i, layer in enumerate(layers):
            if hasattr(layer, "update"):
                layer.update = self._watched(i, layer.update)

    def _watched(self, i: int, update: Callable) -> Callable:
        def watched(keys, values, *args, **kwargs):
            back = update(keys, values, *args, **kwargs)
            self.updates[i].append((keys.detach(), values.detach()))
            self.given.append((i, *back))
            return back

        return watched

    def attention(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        """An attention function that notes what it is given."""
        source = next((i for i, k, v in reversed(self.given) if k is key and v is value), None)
        layer = getattr(module, "layer_idx", None)
        layer = source if layer is None else layer
        if layer is not None:
            changed = [WORDS.get(name, f"the argument {name}") for name in changed_scores(module, kwargs)]
            if not changed and is_decoded(module, kwargs):
                changed.append("scores of its own kind")
            seen = attention_mask is not None and not attention_mask.is_meta
            if seen and left_padding(attention_mask, query.shape[2]) is None:
                changed.append("a mask that is not causal")
            self.calls[layer].append(Call(query.shape[1], source, " and ".join(changed)))
        return attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


_surveys: dict[tuple, list[LayerSurvey]] = {}


def survey(model) -> list[LayerSurvey]:
    """How every layer of `model` uses its cache, tried out once per class, configuration and attention code."""
    model = _unwrapped(model)
    key = _key(model)
    if key not in _surveys:
        found, is_seen = _surveyed(model)
        if not is_seen:
            return found
        _surveys[key] = found
    return _surveys[key]


def model_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """Architecture numbers of `model`, and the layers that are passed through with the reason.

    Raises UsageError for a model without attention.
    """
    config, layers = text_config(model), survey(model)
    if not any(layer.kv_heads or layer.reason == OWN_KIND for layer in layers):
        raise UsageError(
            f"Expected a model with attention, received a {type(_unwrapped(model)).__name__}, which has none: it keeps states "
            "of one size and no cache that grows. Use it as it is."
        )
    shape, passed = surveyed_shape(config.hidden_size, layers, widens=True)
    return replace(
        shape, num_layers=max(shape.num_layers, config.num_hidden_layers)
    ), passed  # some share all they have


def window_shape(model) -> tuple[ModelShape, dict[int, str]]:
    """`model_shape` of the layers with a sliding window, and of no others."""
    return surveyed_windows(text_config(model).hidden_size, survey(model))


def _unwrapped(model):
    """The model of transformers inside of one that is compiled, or that has adapters around it."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def _key(model) -> tuple:
    """What a survey depends on: weights are not part of it."""
    attention = {type(m) for m in model.modules() if hasattr(m, "layer_idx") or "attention" in type(m).__name__.lower()}
    code = sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in attention)
    names = [str(getattr(name, "before", name)) for _, name in routing.routes(model)]
    config = model.config
    return (
        type(model),
        str(config),
        tuple(code),
        tuple(names),
        str(model.dtype),
        device_of(model).type,
        _has_memory(model),
    )


def _surveyed(model) -> tuple[list[LayerSurvey], bool]:
    """`survey`, and whether it was seen: read from the configuration where the model cannot be called here."""
    try:
        with _untouched(model):
            return _tried(model) if _has_memory(model) else _without_memory(model)
    except Exception as error:  # whatever a model raises that needs other inputs
        if not _has_memory(model):  # and what a number decides, such as which experts take a token
            return read_layers(model), False
        if _runs_alone(model):
            return [LayerSurvey(PASSED, OWN_KIND)] * len(host_layers(model)), True
        warn_once(
            f"A {type(model).__name__} cannot be tried out with text alone: {first_line(error)} Its layers are taken as its "
            "configuration names them.",
            str(_key(model)),
        )
        return read_layers(model), False


def _runs_alone(model) -> bool:
    """Whether `model` runs without the cache that it would not take."""
    try:
        with _untouched(model):
            _call(model, _ids(model)[:, :FIRST], None)
    except Exception:  # of a model that needs other inputs
        return False
    return True


def _tried(model) -> tuple[list[LayerSurvey], bool]:
    trace = _traced(model)
    ropes, switched = _ropes(model, trace)
    limits = dict.fromkeys(switched, SWITCHES)
    held = host_layers(model)
    layers = [
        replace(_layer(model, i, layer, trace, ropes.get(i)), limit=limits.get(i, "")) for i, layer in enumerate(held)
    ]
    shape, passed = surveyed_shape(0, layers, widens=True)
    layers = [replace(layer, way=PASSED, reason=passed[i]) if i in passed else layer for i, layer in enumerate(layers)]
    if not shape.layers:
        return layers, True
    expected = _logits(model, plain_cache(model))
    if not torch.isfinite(expected).all():
        return layers, False
    if not _is_same(model, shape, expected):
        for i in shape.layers:
            if not _is_same(model, replace(shape, layers=(i,)), expected):
                layers[i] = replace(layers[i], way=PASSED, reason="attention that a compressed cache changes")
    return layers, True


def _without_memory(model) -> tuple[list[LayerSurvey], bool]:
    """The sizes of a model whose weights are a shape and a dtype: what can be seen without a number."""
    rope = read_rope(model)
    for module in model.modules():
        module._buffers.update({name: x.to("meta") for name, x in module._buffers.items() if x is not None})
    trace = _traced(model)
    return [_layer(model, i, layer, trace, rope) for i, layer in enumerate(host_layers(model))], True


def _layer(model, i: int, layer, trace: Trace, rope: Rope | None) -> LayerSurvey:
    """What `trace` tells of layer `i`, for which the host has the cache layer `layer`."""
    updates = trace.updates.get(i, [])
    calls = [call for call in trace.calls.get(i, []) if call.source == i]
    sizes = {}
    if updates:
        keys, values = updates[0]
        q_heads = calls[0].q_heads if calls else text_config(model).num_attention_heads
        sizes = {
            "q_heads": q_heads,
            "kv_heads": keys.shape[1],
            "key_dim": keys.shape[-1],
            "value_dim": values.shape[-1],
        }
    if reason := _kept_by_host(model, i, layer, trace):
        return LayerSurvey(PASSED, reason, **sizes, rope=rope)
    changed = next((call.changed for call in calls if call.changed), "")
    if not calls:
        changed = (
            "keys and values that are changed before attention" if trace.calls.get(i) else "attention code of its own"
        )
    return LayerSurvey(DECODED if changed else CODES, changed, **sizes, rope=rope)


def _kept_by_host(model, i: int, layer, trace: Trace) -> str:
    """Why layer `i` keeps the host's own cache; "" where it need not."""
    updates = trace.updates.get(i, [])
    if getattr(layer, "is_sliding", False):
        return window_kind(model, i)
    if not updates:
        sources = {call.source for call in trace.calls.get(i, [])} - {None, i}
        if sources:
            return f"keys and values of layer {min(sources)}"
        return "linear attention" if hasattr(layer, "recurrent_states") else "no cache"
    if type(layer) is not DynamicLayer:
        if isinstance(layer, DynamicLayer) and hasattr(layer, "recurrent_states"):
            return "attention and linear attention in one layer"
        return OWN_KIND
    if len(updates) > 1:
        return f"a cache that is filled {len(updates)} times in a call"
    keys, values = updates[0]
    if keys.ndim != 4 or keys.shape[1] != values.shape[1] or keys.shape[2] != FIRST:
        return f"keys of shape {tuple(keys.shape)} and values of {tuple(values.shape)}"
    return ""


# --- calls of a model


def _traced(model) -> Trace:
    """What the first tokens show."""
    trace, layers = Trace(), host_layers(model)
    trace.watch(layers)
    try:
        with routing.routed(model):
            AttentionInterface.register(ATTENTION, trace.attention)
            _call(model, _ids(model)[:, :FIRST], cache_of(layers))
    finally:
        routing.register()
    return trace


def _ropes(model, trace: Trace) -> tuple[dict[int, Rope | None], set[int]]:
    """How the keys of every layer are rotated, where that is seen or said, and the layers that are so in short texts only."""
    if "position_ids" not in _arguments(model):
        return dict.fromkeys(trace.updates, read_rope(model)), set()
    first = {i: ops.to_numpy(updates[0][0][0, :, :MOVED]) for i, updates in trace.updates.items()}
    known = known_ropes(model)
    context = max_context(model)
    shifts = [n for n in SHIFTS if n + FIRST <= (context or n + FIRST)]
    found: dict[int, Rope | None] = {}
    switched: set[int] = set()
    for tried in (shifts, shifts[:2]):  # a rotation that changes with the length of a text is seen in short ones
        moved = _keys_at(model, tried)
        for i in set(first) - {i for i in found if found[i] or i not in switched}:
            found[i], is_seen = fit_rope(first[i], moved[i], known)
            known += [found[i]] if found[i] and found[i] not in known else []  # the next layer may be rotated alike
            switched |= set() if is_seen else {i}
        if not switched:
            break
    switched &= {i for i, rope in found.items() if rope}
    return found, switched | _switched_far(model, {i: rope for i, rope in found.items() if rope}, 2 * (context or 0))


def _switched_far(model, ropes: dict[int, Rope], start: int) -> set[int]:
    """Those of the layers of `ropes` whose keys are rotated otherwise from position `start` on."""
    if not start or not ropes:
        return set()
    try:
        far = _keys_at(model, [start + n for n in (0, *SHIFTS)])
    except (IndexError, RuntimeError):  # of a model that has a table of so many positions and no more
        return set()
    switched = set()
    for i, rope in ropes.items():
        keys, *moved = far[i].values()
        if not is_rotated_by(rope, keys, dict(zip(SHIFTS, moved))):
            switched.add(i)
    return switched


def _keys_at(model, shifts: Sequence[int]) -> dict[int, dict[int, np.ndarray]]:
    """By layer and by shift, keys [H, T, D] of the `MOVED` first tokens so many positions later."""
    trace, layers = Trace(), host_layers(model)
    trace.watch(layers)
    positions = torch.arange(MOVED)[None] + torch.tensor(shifts)[:, None]
    ids = _ids(model)[:, :MOVED].expand(len(shifts), -1)
    _call(model, ids, cache_of(layers), position_ids=positions.to(ids.device))
    return {i: dict(zip(shifts, ops.to_numpy(updates[0][0]))) for i, updates in trace.updates.items()}


def _is_same(model, shape: ModelShape, expected: torch.Tensor) -> bool:
    """Whether the logits are `expected` when the layers of `shape` are compressed without a loss, all sealed at once."""
    plan, layers = ExactPlan.of(shape), host_layers(model)
    try:
        with routing.routed(model):
            got = _logits(model, SpectralCache(plan=plan, layers=layers, sinks=0, window=0))
    except Exception as error:  # of a model that does with keys what our cache refuses
        logging.getLogger("spectralkv").debug("a survey met %s", error)
        return False
    difference = (got - expected).square().mean().sqrt() / expected.std().clamp(min=1e-30)
    return bool(difference <= SAME.get(model.dtype, SAME[torch.bfloat16]))


def _logits(model, cache: Cache) -> torch.Tensor:
    """The last logits [N, vocabulary] float32 of every call of a text in pieces."""
    cache = _paired(model, cache)
    parts = [_call(model, ids, cache)[0, -KEPT:].float() for ids in _ids(model).split(PIECES, dim=1)]
    return torch.cat(parts)


def _paired(model, cache: Cache) -> Cache:
    """`cache` as `model` takes it: a decoder behind an encoder has another for what it reads from there."""
    if not model.config.is_encoder_decoder or isinstance(cache, EncoderDecoderCache):
        return cache
    return EncoderDecoderCache(cache, DynamicCache())


def _call(model, ids: torch.Tensor, cache: Cache | None, **options) -> torch.Tensor:
    """What `model` gives for `ids` [B, L]: logits, or states where it has none."""
    given = {"use_cache": cache is not None, **options}
    if cache is not None:
        given |= cache_argument(model, _paired(model, cache))
    if "logits_to_keep" in _arguments(model):
        given["logits_to_keep"] = KEPT
    if model.config.is_encoder_decoder:
        width = model.get_encoder().config.hidden_size
        states = torch.linspace(-1, 1, ENCODED * width, dtype=model.dtype, device=ids.device).view(1, ENCODED, width)
        given |= {"encoder_outputs": MoEModelOutput(states.expand(len(ids), -1, -1)), "decoder_input_ids": ids}
    else:
        given["input_ids"] = ids
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out[0]


def _has_memory(model) -> bool:
    """Whether the weights of `model` are numbers, here or where they wait until they are used."""
    return model.device.type != "meta" or any(hasattr(module, "_hf_hook") for module in model.modules())


def _device(model) -> torch.device:
    """Where token ids for `model` go."""
    return device_of(model) if _has_memory(model) else model.device


def _arguments(model) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _ids(model) -> torch.Tensor:
    """Token ids [1, sum(PIECES)] that are nothing special to `model`."""
    special, waiting = set(), [model.config.to_dict()]
    while waiting:
        for name, value in ((str(name), value) for name, value in waiting.pop().items()):
            if isinstance(value, dict):
                waiting.append(value)
            elif "token" in name or name.endswith(("_id", "_ids", "_index")):
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    count = min(IDS, int(text_config(model).vocab_size))
    usual = [i for i in range(count) if i not in special] or [0]
    return torch.tensor([np.random.default_rng(0).choice(usual, sum(PIECES)).tolist()], device=_device(model))


@contextmanager
def _untouched(model) -> Iterator[None]:
    """A while in which `model` answers as it does at inference, under the host's own attention, and leaves no trace."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    small = [x for x in model.buffers() if x.numel() <= SMALL]  # such as frequencies, which some models change in place
    values = [x.clone() for x in small]
    routes = routing.routes(model)
    devices = [_device(model)] if _device(model).type == "cuda" else []
    verbosity = transformers.logging.get_verbosity()
    try:
        eager = torch.compiler.set_stance("force_eager")  # nothing is compiled for the sizes of a trial
        with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings(), eager:
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity(logging.CRITICAL)
            routing.restore(model)
            for module in model.modules():
                module.training = False
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        routing.set_routes(routes)
        for module, attributes, buffers in before:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for x, value in zip(small, values):
                x.copy_(value)

"""Capture of the true queries, keys and values of a forward pass, and of score gradients, on any decoder of the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

from spectral_kv_core.errors import UsageError

from . import ops
from .handles import ATTENTION, Pending, attention_forward
from .integration import cache_argument, device_of, host_layers, model_shape, register, routed


class CaptureLayer(CacheLayerMixin):
    """Keeps keys and values exactly and remembers the queries; `leaves` lets gradients reach what it keeps."""

    def __init__(self, is_sliding: bool = False):
        super().__init__()
        self.is_sliding = is_sliding  # what the host makes a mask by; tokens stay all the same
        self.queries: torch.Tensor | None = None
        self.scale = 1.0
        self.leaves = False

    def lazy_initialization(self, key_states, value_states) -> None:
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if self.leaves:
            return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        return Pending(self, key_states, value_states, slots=self.get_seq_length()).handles()

    def can_attend(self, pending, padding) -> bool:
        """As `SpectralKVLayer.can_attend`: of one sequence, which has no padding."""
        return True

    def attend(self, pending, queries, scale, fused, padding=None):
        """Keep the queries [B, Hq, L, D], keys and values [B, H, L, D] of one forward pass and attend as usual."""
        self.queries, self.keys, self.values, self.scale = queries, pending.keys, pending.values, scale
        return fused(queries, pending.keys, pending.values, scale)

    def decoded(self, pending, queries, scale, padding=None):
        """As `attend`, for attention of the host's own: the keys and values that it attends to."""
        self.queries, self.keys, self.values, self.scale = queries, pending.keys, pending.values, scale
        return pending.keys, pending.values

    def dense(self, pending):
        """What the host attends to that goes around our attention function; no queries are seen then."""
        self.keys, self.values = pending.keys, pending.values
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


@contextmanager
def frozen(model) -> Iterator[None]:
    """Keep gradients away from the weights of `model`, and route its attention through ours, for a while.

    Dropout stays away too: what is measured is the model that generates.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    in_training = [module for module in model.modules() if module.training]
    for p in trained:
        p.requires_grad_(False)
    for module in in_training:
        module.training = False
    try:
        with routed(model):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for module in in_training:
            module.training = True


def capture(model, tokens: list[int], layers: Sequence[int] | None = None) -> Cache:
    """Run `tokens` through `model` and keep what its layers attend with.

    Args:
        model: A model of transformers.
        tokens: Token ids of one sequence, T of them.
        layers: Indices of the layers to look into. Default: those that can be compressed.

    Returns:
        A `Cache` of the host with one entry per layer. Those of `layers` hold `queries` [1, q_heads, T, head_dim],
        `keys` and `values` [1, kv_heads, T, head_dim], all after RoPE; the others are the host's own. The queries of layers
        with attention code of their own are not seen: None.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import capture, load_model
        >>> model, tokenizer = load_model(demo_model_path())
        >>> layer = capture(model, tokenizer.encode("The sea is a place of endless wonder.")).layers[8]
        >>> tuple(layer.queries.shape), tuple(layer.keys.shape)
        ((1, 9, 9, 64), (1, 3, 9, 64))
    """
    held = host_layers(model)
    for i in model_shape(model)[0].layers if layers is None else layers:
        held[i] = CaptureLayer(getattr(held[i], "is_sliding", False))
    cache = Cache(layers=held)
    with frozen(model), torch.no_grad():
        model(_batch(model, tokens), use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    unseen = [i for i, layer in enumerate(held) if isinstance(layer, CaptureLayer) and layer.keys is None]
    if unseen:
        raise UsageError(
            f"Expected every layer to attend to what its cache gives back, received nothing of layers "
            f"{', '.join(map(str, unseen))}: their keys cannot be captured. Choose a method without a profile."
        )
    return cache


@dataclass(frozen=True)
class Attended:
    """One call of a layer's attention: post-RoPE `queries` [1, Hq, L, D], `keys`, `values` [1, H, L, D] of its L new tokens.

    outputs: [Hq, L, D] float32, before the output projection. module, mask, scale, options: the rest of the call.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    outputs: np.ndarray
    module: torch.nn.Module
    mask: torch.Tensor | None
    scale: float
    options: dict


@contextmanager
def recorded(model, cache: Cache, layers: Sequence[int]) -> Iterator[dict[int, list[Attended]]]:
    """By layer, what the attention of `layers` is given and gives back while `model` runs with the plain `cache`."""
    calls = {i: [] for i in layers}

    def recording(module, query, key, value, attention_mask=None, scaling=None, **options):
        out, weights = attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        if module.layer_idx in calls:
            new = (ops.copy(x[:, :, -query.shape[2] :]) for x in (key, value))  # not views of the whole cache
            calls[module.layer_idx].append(
                Attended(query, *new, _heads_first(out), module, attention_mask, scaling, options)
            )
        return out, weights

    with routed(model):
        AttentionInterface.register(ATTENTION, recording)
        try:
            yield calls
        finally:
            register()


@torch.inference_mode()
def attend(cache: Cache, layer_idx: int, call: Attended) -> np.ndarray:
    """What layer `layer_idx` of `cache`, plain or compressed, gives for `call` [Hq, L, D]; its tokens enter the cache."""
    held = cache.layers[layer_idx].update(call.keys, call.values)
    out, _ = attention_forward(call.module, call.queries, *held, call.mask, scaling=call.scale, **call.options)
    return _heads_first(out)


def _heads_first(out: torch.Tensor) -> np.ndarray:
    """[1, L, Hq, D] as an attention function returns it -> [Hq, L, D] float32."""
    return ops.to_numpy(out[0].transpose(0, 1))


def captured(cache: Cache, layer_idx: int) -> CaptureLayer:
    """Layer `layer_idx` of what `capture` gives."""
    return cache.layers[layer_idx]


def score_gradients(model, cache: Cache, tokens: list[int], samples: int, seed: int) -> list[dict]:
    """Gradients of log p(label) with respect to what `cache` holds, for labels drawn from the model itself.

    `tokens` follow the captured ones; one dict per sample of layer index -> (key, value) gradients [H, T, D]. Their
    second moment is the Fisher information of the cached vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, CaptureLayer)}
    inputs = []
    for layer in leaves.values():
        layer.keys = layer.keys.detach().clone().requires_grad_(True)
        layer.values = layer.values.detach().clone().requires_grad_(True)
        layer.leaves = True
        inputs += [layer.keys, layer.values]
    result = []
    with frozen(model), torch.enable_grad(), _states_may_change(cache):
        logits = model(_batch(model, tokens), use_cache=True, **cache_argument(model, cache)).logits[0].float()
        log_p = torch.log_softmax(logits, dim=-1)
        if not torch.isfinite(log_p).all():
            raise UsageError("Expected finite logits, received NaN or infinity: check the weights and the dtype.")
        for sample in range(samples):
            labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            gradients = torch.autograd.grad(log_p.gather(1, labels).sum(), inputs, retain_graph=sample + 1 < samples)
            result.append({i: (gradients[2 * n][0], gradients[2 * n + 1][0]) for n, i in enumerate(leaves)})
    return result


def _states_may_change(cache: Cache) -> AbstractContextManager:
    """Where a backward pass is right though layers of the host write into the states that they read, as linear ones do."""
    others = any(not isinstance(layer, CaptureLayer) for layer in cache.layers)
    return torch.autograd.graph.allow_mutation_on_saved_tensors() if others else nullcontext()


@torch.no_grad()
def probed_log_probabilities(
    model, cache: Cache, tokens: list[int], changed: dict[int, tuple], outputs: dict[int, object]
) -> torch.Tensor:
    """Log probabilities [len(tokens), vocabulary] float32 after what a captured `cache` holds, which stays as it is.

    changed: by layer index the keys and values [1, H, T, D], NumPy, that take the place of the captured ones; outputs: of
    decoder layers without a change, left here by a call without, so that others need not run what lies below one.
    """
    layers = []
    for i, layer in enumerate(cache.layers):
        layer = copy.copy(layer) if isinstance(layer, CaptureLayer) else copy.deepcopy(layer)
        if isinstance(layer, CaptureLayer):
            layer.leaves = True
        if i in changed:
            layer.keys, layer.values = (torch.from_numpy(x).to(layer.keys) for x in changed[i])
        layers.append(layer)
    with frozen(model), _replayed(model, changed, outputs):
        given = cache_argument(model, Cache(layers=layers))
        logits = model(_batch(model, tokens), use_cache=True, **given).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


@contextmanager
def _replayed(model, changed: dict[int, tuple], outputs: dict[int, object]) -> Iterator[None]:
    """Decoder layers below the first of `changed` give what `outputs` has of them; without any, all leave theirs there."""
    modules = _decoder_layers(model)
    below = range(min(changed, default=0))
    kept = {i: module.__dict__.get("forward") for i, module in modules.items() if i in below and i in outputs}
    for i in kept:
        modules[i].forward = lambda *args, i=i, **options: outputs[i]
    hooks = []
    if not changed:
        for i, module in modules.items():
            hooks.append(module.register_forward_hook(lambda module, args, out, i=i: outputs.update({i: out})))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for i, forward in kept.items():
            del modules[i].forward
            if forward is not None:  # accelerate sets it where layers lie on several devices
                modules[i].forward = forward


def _decoder_layers(model) -> dict[int, torch.nn.Module]:
    """By number the modules whose attention, a part of theirs, says that it is of layer `layer_idx`."""
    return {part.layer_idx: m for m in model.modules() for part in m.children() if hasattr(part, "layer_idx")}


def _batch(model, tokens: list[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=device_of(model))

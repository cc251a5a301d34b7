"""What a transformers model takes in memory, read from its configuration: no weight is loaded."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from spectral_kv_core.benchmark.footprint import Footprint
from spectral_kv_core.benchmark.passed_layers import RUN_TOKENS, PassedLayer, passed_layers, windows_alone
from spectral_kv_core.benchmark.stored_bytes import table_nbytes as core_table_nbytes
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.hosts.weights import safetensors_nbytes

from . import host, ops
from .generation import PREFILL_CHUNK
from .integration import cache_argument, cache_of, host_layers, max_context, model_shape

log = logging.getLogger("spectralkv")

__all__ = ["footprint", "skeleton", "table_nbytes"]


def _unknown(name: str, error: ValueError) -> UsageError:
    return UsageError(f"Expected a model that transformers knows, cannot load {name!r}: {first_line(error)}")


def skeleton(name: str, dtype: str | None = None):
    """The model of a directory or hub id with parameters that have a shape and a dtype but no memory.

    Raises FileNotFoundError where there is no configuration, UsageError for a model that transformers cannot build.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"Expected a model directory, a hub id or demo, cannot read the config.json of {name!r}: {first_line(error)}"
        ) from None
    except ValueError as error:
        raise _unknown(name, error) from error
    text = config.get_text_config(decoder=True)
    stored = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype) if dtype else stored)
    except ValueError as error:
        raise _unknown(name, error) from error
    model.tie_weights()
    for path, module in list(model.named_modules()):
        if path.endswith("rotary_emb"):  # its frequencies are numbers that a profile is found by
            model.set_submodule(path, type(module)(model.config.get_text_config(decoder=True)))
    return model.eval()


def footprint(name: str, dtype: str | None = None) -> Footprint:
    """Sizes of the model `name`, as `load_model` would load it with `dtype`."""
    model = skeleton(name, dtype)
    shape, passed = model_shape(model)
    config, layers = model.config.get_text_config(decoder=True), host_layers(model)
    windows = {i: layers[i].sliding_window for i in passed if getattr(layers[i], "sliding_window", None)}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = (getattr(config, "num_experts_per_tok", 0) or 0) * (getattr(config, "moe_intermediate_size", 0) or 0)
    on_card, query = torch.cuda.is_available(), torch.empty(1, 1, 1, shape.head_dim, device="cpu")
    return Footprint(
        shape=shape,
        passed=passed,
        held=_held(model, passed, windows, 2 * shape.kv_heads * shape.head_dim),
        weights_bytes=_stored_nbytes(name) if getattr(model.config, "quantization_config", None) else parameters,
        element_bytes=torch.empty((), dtype=model.dtype).element_size(),
        intermediate=max(getattr(config, "intermediate_size", 0) or 0, experts),
        context=max_context(model),
        call=PREFILL_CHUNK,
        decodes_history=on_card or not ops.kernels or not ops.kernels.supports_partial_attention(query),
        pair_bytes=4,  # the mask that transformers makes, and what it is made of
        shares_memory=not on_card,
    )


table_nbytes = partial(core_table_nbytes, host)


def _held(model, passed, windows: dict[int, int], token_elements: int) -> dict[int, PassedLayer]:
    """What the layers that pass through hold, from a run on parameters without memory, where transformers can do that."""
    if not passed:
        return {}
    for path, module in model.named_modules():
        if path.endswith("rotary_emb"):
            module.to("meta")
    cache = cache_of(host_layers(model))
    try:
        with torch.no_grad(), torch.device("meta"):
            model(torch.zeros(1, RUN_TOKENS, dtype=torch.long), use_cache=True, **cache_argument(model, cache))
    except (RuntimeError, NotImplementedError) as error:
        log.debug("Sizes of passed layers are not known: %s", first_line(error))
        return windows_alone(windows, token_elements)
    return passed_layers(host, cache.layers, passed, windows)


def _stored_nbytes(name: str) -> int:
    """Bytes of quantized weights, which only their files know."""
    folder = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
    return safetensors_nbytes(folder)

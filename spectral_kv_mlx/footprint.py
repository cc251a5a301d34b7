"""What an mlx-lm model takes in memory, read from its configuration: no weight is loaded."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _download, load_config
from mlx_lm.utils import load_model as load_mlx_model

from spectral_kv_core.benchmark.footprint import Footprint
from spectral_kv_core.benchmark.passed_layers import RUN_TOKENS, PassedLayer, passed_layers
from spectral_kv_core.benchmark.stored_bytes import table_nbytes as core_table_nbytes
from spectral_kv_core.errors import UsageError, first_line

from . import host
from .arguments import field
from .generation import PREFILL_CHUNK
from .integration import config_corrections, host_layers, max_context, model_dtype
from .survey import sketched_shape

__all__ = ["footprint", "skeleton", "table_nbytes"]


def skeleton(name: str, dtype: str | None = None):
    """The model of a directory or hub id with parameters that have a shape and a dtype but were never read.

    MLX reads an array when it is first used. Raises FileNotFoundError where there is no configuration.
    """
    if not Path(name).exists() and str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"Expected a model directory, found nothing at {name}.")
    try:
        path = _download(str(name), allow_patterns=["*.json"])
        config = load_config(path)
        whole = any(path.glob("model*.safetensors"))
        model, _ = load_mlx_model(path, lazy=True, strict=whole, model_config=config_corrections(config))
    except OSError as error:
        raise FileNotFoundError(
            f"Expected a model directory, a hub id or demo, cannot read the config.json of {str(name)!r}: {first_line(error)}"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"Expected a model that mlx-lm knows, cannot load {str(name)!r}: {first_line(error)}"
        ) from error
    if not whole:
        _as_stored(model, config)
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):  # as load_model
        dtype = "float32"
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    return model


def footprint(name: str | os.PathLike, dtype: str | None = None) -> Footprint:
    """Sizes of the model `name`, as `load_model` would load it with `dtype`."""
    model = skeleton(name, dtype)
    shape, passed = sketched_shape(model)
    layers = host_layers(model)
    windows = {i: layers[i].max_size for i in passed if i < len(layers) and hasattr(layers[i], "max_size")}
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    experts = (field(model, "num_experts_per_tok") or 0) * (field(model, "moe_intermediate_size") or 0)
    return Footprint(
        shape=shape,
        passed=passed,
        held=_held(model, passed, windows),
        weights_bytes=sum(p.nbytes for _, p in tree_flatten(model.parameters())),
        element_bytes=model_dtype(model).size,
        intermediate=max(field(model, "intermediate_size") or 0, experts),
        context=max_context(model),
        call=PREFILL_CHUNK,
        decodes_history=True,
        pair_bytes=4 * shape.q_heads if on_cpu else 0,  # its attention is fused on Metal only
        shares_memory=True,
    )


table_nbytes = partial(core_table_nbytes, host)


def _held(model, passed, windows: dict[int, int]) -> dict[int, PassedLayer]:
    """What the layers that pass through hold, from a run of which MLX computes nothing."""
    layers = host_layers(model)
    if passed:
        model(mx.zeros((1, RUN_TOKENS), mx.int32), cache=layers)
    return passed_layers(host, layers, [i for i in passed if i < len(layers)], windows)


def _as_stored(model: nn.Module, config: dict) -> None:
    """Give a model that was made without its files the dtype and the quantization that its configuration names."""
    text = config.get("text_config") or {}
    stored = next((c[key] for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), "float32")
    model.set_dtype(getattr(mx, stored))
    quantization = config.get("quantization") or config.get("quantization_config")
    if not quantization:
        return
    if not {"group_size", "bits"} <= set(quantization):
        raise UsageError(
            f"Expected weights beside config.json for a model quantized by {quantization.get('quant_method', 'others')}, "
            "found none: their size is not known. Download the model first."
        )

    def quantized(path: str, module: nn.Module):
        return quantization.get(path, hasattr(module, "to_quantized"))

    mode = quantization.get("mode", "affine")
    nn.quantize(model, quantization["group_size"], quantization["bits"], mode=mode, class_predicate=quantized)

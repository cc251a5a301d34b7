"""What must not change by accident: plans, codes, files and public names, as `golden.json` has them.

`python tests/golden_values.py` writes the file anew. A change of it is a commit of its own that says which line and why.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from spectral_kv_core.arrays import ops
from spectral_kv_core.cache.file_layers import ExactLayer
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.planning.methods import METHODS
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.profile.store import packaged_profiles

FILE = Path(__file__).with_name("golden.json")
BITS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
CODED = {"spectral": 2.0, "spectral-trellis": 2.0, "spectral-dense": 1.5, "spectral-stored": 1.0}
AS_THEY_ARE = {"affine": 4.5, "kivi": 3.0}  # codes of keys and values themselves
TOKENS = 160


def shipped_profile() -> Profile:
    """The profile that the package has."""
    (path,) = packaged_profiles()
    return Profile.load(path)


def plans(profile: Profile) -> dict:
    """Per method and bits the hash of the plan and its real bits, or why there is none."""
    found: dict[str, dict] = {}
    for name, method in METHODS.items():
        for bits in BITS if method.codec != "none" else (16.0,):
            try:
                plan = make_plan(profile.shape, profile if method.profile_set else None, method, bits)
                entry = {"hash": plan.hash, "bits_per_element": round(plan.bits_per_element, 9)}
            except ValueError as error:
                entry = {"refused": str(error).replace(str(profile.path), "PROFILE")}
            found.setdefault(name, {})[f"{bits:g}"] = entry
    return found


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers float32 that look normal: sums of integers, the same on every machine."""
    count = int(np.prod(shape))
    state = np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003)
    total = np.zeros(count, np.int64)
    for step in range(4):  # splitmix64 (Steele, Lea and Flood 2014)
        state = (state + np.uint64(0x9E3779B97F4A7C15 + step)) & np.uint64(0xFFFFFFFFFFFFFFFF)
        x = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        total += ((x ^ (x >> np.uint64(31))) >> np.uint64(44)).astype(np.int64) - 2**19
    return (total.astype(np.float64) / 2**19 * 0.75**0.5).astype(np.float32).reshape(shape)


def coded(xp, profile: Profile, name: str, bits: float, row: int, tokens: int = TOKENS):
    """A chunk of layer number `row`, from coefficients that are given: what makes them may differ in the last bit."""
    plan = make_plan(profile.shape, profile if METHODS[name].profile_set else None, METHODS[name], bits)
    codec = plan.make_codec(xp, row)
    keys, values = (
        xp.asarray(numbers((1, profile.shape.kv_heads, tokens, profile.shape.head_dim), seed)) for seed in (1, 2)
    )
    if name in CODED:
        z = numbers((1, codec.groups, tokens // codec.block, codec.block, codec.rank), 3 + row)
        codec.coefficients = lambda *_: (xp.asarray(z), None)
    return plan, codec.encode(keys, values, 4)


def chunk_digest(xp, chunk) -> str:
    """SHA-256 of every array of a chunk."""
    digest = hashlib.sha256()
    for x in chunk.arrays:
        array, dtype = xp.to_file(x)
        digest.update(f"{dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def chunks(xp, profile: Profile) -> dict:
    """Digests of encoded chunks of three layers, by method."""
    found = {}
    for name, bits in (CODED | AS_THEY_ARE).items():
        for row in (0, 11, 29):
            found[f"{name} at {bits:g} bits, layer {row}"] = chunk_digest(xp, coded(xp, profile, name, bits, row)[1])
    return found


def stored_prompt(profile: Profile) -> dict:
    """Digest of a stored prompt's bytes, and its header without the version of the library."""
    layers: list[LayerCache | ExactLayer] = []
    for row in range(len(profile.shape.layers)):
        plan, chunk = coded(ops, profile, "spectral", 2.0, row, 64)
        store = LayerCache(ops, plan.make_codec(ops, row), 4, 64)
        size = (1, profile.shape.kv_heads, 4 + 64, profile.shape.head_dim)
        keys, values = (numbers(size, seed + row).astype(np.float16) for seed in (40, 80))
        store.seen = store.open_group([0], 0, exact_keys=keys, exact_values=values, chunks=[chunk]).seen
        layers.append(store)
    file = PromptFile.of(
        ops, replace(plan, profile=replace(profile, path="profile.safetensors")), layers, tokens=list(range(132))
    )
    with tempfile.TemporaryDirectory() as folder:
        data = file.save(Path(folder) / "prompt.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["spectralkv"])
    header.pop("library_version")
    header.pop("sha256")  # of the library's version too
    return {"arrays": hashlib.sha256(data[8 + length :]).hexdigest(), "header": header, "bytes": len(data) - length}


def public_names(package: str) -> dict:
    """Signature of every public name of a backend, and of the public methods of its classes."""
    module, found = importlib.import_module(package), {}
    for name in module.__all__:
        item = getattr(module, name)
        found[name] = _signature(item)
        if inspect.isclass(item):
            for method, function in inspect.getmembers(item):
                ours = getattr(function, "__module__", "") or ""
                if not method.startswith("_") and callable(function) and ours.startswith("spectral_kv"):
                    found[f"{name}.{method}"] = _signature(function)
    return found


def _signature(item) -> str:
    bare = inspect.signature(item)
    parameters = []
    for p in bare.parameters.values():
        default = p.default.__name__ if inspect.isroutine(p.default) else p.default  # else an address
        parameters.append(p.replace(annotation=inspect.Parameter.empty, default=default))
    return str(bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def write() -> None:
    profile = shipped_profile()
    golden = {
        "plans": plans(profile),
        "chunks": chunks(ops, profile),
        "stored_prompt": stored_prompt(profile),
        "public_names": {name: public_names(name) for name in ("spectral_kv_torch", "spectral_kv_mlx")},
    }
    FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()

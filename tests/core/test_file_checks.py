"""Files that lie with a right checksum: every field is checked for meaning, and NaN is neither kept nor read."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import ToyModel

from spectral_kv_core.arrays import ops
from spectral_kv_core.cache import prompt_cache_file
from spectral_kv_core.cache.file_layers import ExactLayer
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.codecs import kvtc
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.profile import profile as profile_file
from spectral_kv_core.profile.profile import Profile

MODEL = ToyModel(head_dim=64, kv_heads=2)
SHAPE = replace(MODEL.shape, num_layers=3)  # the last layer passes through
SINKS, WINDOW, SEALED, PAD = 4, 16, 32, 5
SEEN = SINKS + SEALED + WINDOW
PLAN = make_plan(SHAPE, None, "affine", 4.5)


def stored(dtype=np.float32) -> PromptFile:
    """Two sequences without padding and one with some, as a prompt cache file."""
    layers: list = []
    for row in range(2):
        store = LayerCache(ops, PLAN.make_codec(ops, row), SINKS, WINDOW)
        store.seen = SEEN
        for sequences, pad in (([0, 2], 0), ([1], PAD)):
            keys, values = (x.astype(dtype) for x in MODEL.sample(row, SEEN - pad, len(sequences)))
            sealed = slice(SINKS, SINKS + SEALED)
            exact_keys, exact_values = (np.delete(x, sealed, axis=2) for x in (keys, values))
            chunk = store.codec.encode(keys[:, :, sealed], values[:, :, sealed], SINKS)
            store.open_group(sequences, pad, exact_keys=exact_keys, exact_values=exact_values, chunks=[chunk])
        layers.append(store)
    layers.append(ExactLayer(*(x[:, :, -9:].copy() for x in MODEL.sample(7, SEEN, 3)), SEEN))
    return PromptFile.of(ops, PLAN, layers, tokens=np.arange(3 * SEEN).reshape(3, SEEN))


@pytest.fixture
def prompt(tmp_path) -> Path:
    return stored().save(tmp_path / "prompt.safetensors")


@pytest.fixture
def profile(toy_profile, tmp_path) -> Path:
    return toy_profile.save(tmp_path / "profile.safetensors")


def lie(path: Path, file_format, change) -> None:
    """Write `path` again with what `change` makes of its arrays and header, and with the checksum of that."""
    arrays, header = file_format.load(path)
    change(arrays, header)
    file_format.save(path, arrays, header)


def refused(load, path: Path) -> str:
    started = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert type(caught.value).__name__ == "UsageError", repr(caught.value)
    assert message.startswith("Expected") and "\n" not in message and str(path) in message
    assert time.perf_counter() - started < 2, "work is bounded"
    return message


def setting(*place, value):
    """A change that puts `value` at `place` of the header."""

    def change(arrays, header):
        fields = header
        for key in place[:-1]:
            fields = fields[key]
        fields[place[-1]] = value

    return change


def in_array(name: str, value, place=0):
    """A change that puts `value` at the flat `place` of an array."""

    def change(arrays, header):
        arrays[name].reshape(-1)[place] = value

    return change


def scaled(name: str, factor):
    def change(arrays, header):
        arrays[name] = (arrays[name] * factor).astype(arrays[name].dtype)

    return change


def group(*place, value, layer=0, number=0):
    return setting("layers", layer, "padding_groups", number, *place, value=value)


def test_what_is_true_is_read(prompt, profile):
    file = PromptFile.load(prompt)
    Profile.load(profile)
    assert file.padding == [0, PAD, 0] and file.plan().hash == PLAN.hash and file == stored()


PROMPT_LIES = {
    "sequences twice": group("sequences", value=[0, 0]),
    "sequences permuted": group("sequences", value=[2, 0]),
    "a sequence in two groups": group("sequences", value=[0, 1]),
    "a sequence missing": group("sequences", value=[0, 3]),
    "no sequences": group("sequences", value=[]),
    "sequences of text": group("sequences", value=["0", "2"]),
    "other sequences in another layer": group("pad", value=4, layer=1, number=1),
    "no padding groups": setting("layers", 0, "padding_groups", value=[]),
    "negative padding": group("pad", value=-1, number=1),
    "padding beyond what was seen": group("pad", value=SEEN + 1, number=1),
    "half a padding": group("pad", value=2.5, number=1),
    "sinks beyond memory": setting("sinks", value=2**40),
    "negative sinks": setting("sinks", value=-4),
    "sinks true": setting("sinks", value=True),
    "a window beyond memory": setting("window", value=2**40),
    "negative window": setting("window", value=-1),
    "nothing seen": setting("seen", value=0),
    "more seen than memory": setting("seen", value=2**50),
    "chunks with a gap": group("chunks", value=[[SINKS + 16, SEALED]]),
    "chunks beyond what was seen": group("chunks", value=[[SINKS, 2**20]]),
    "an empty chunk": group("chunks", value=[[SINKS, SEALED], [SINKS + SEALED, 0]]),
    "a negative chunk": group("chunks", value=[[SINKS, 2 * SEALED], [SINKS + 2 * SEALED, -SEALED]]),
    "chunks of three numbers": group("chunks", value=[[SINKS, SEALED, 0]]),
    "chunks that are none": group("chunks", value=["ab"]),
    "a layer less": lambda arrays, header: header["layers"].pop(),
    "a layer without fields": setting("layers", 1, value={}),
    "a layer that is a list": setting("layers", 1, value=[]),
    "an unknown dtype": setting("layers", 0, "dtype", value="float64"),
    "a size of two": setting("layers", 2, "size", value=[2, 9]),
    "a negative size": setting("layers", 2, "size", value=[2, -9, 64]),
    "a block beyond memory": setting("method", "block", value=2**40),
    "a block of none": setting("method", "block", value=0),
    "a negative group": setting("method", "group_size", value=-64),
    "an unknown codec": setting("method", "codec", value="zip"),
    "a list as a name": setting("method", "name", value=["affine"]),
    "another field in the method": setting("method", "scorer", value="knorm"),
    "a rounding that is a number": setting("method", "rounding", value=1),
    "bits of text": setting("bits", value="4.5"),
    "bits beyond all": setting("bits", value=1e9),
    "metadata of a list": setting("metadata", value=[]),
    "a model that is a number": setting("model", value=3),
    "layers that do not ascend": setting("shape", "layers", value=[1, 0]),
    "a layer that the model lacks": setting("shape", "layers", value=[0, 7]),
    "a negative head_dim": setting("shape", "head_dim", value=-64),
    "heads beyond memory": setting("shape", "kv_heads", value=2**40),
    "no shape": setting("shape", value=None),
    "a negative id": in_array("tokens", -1),
    "NaN in keys": in_array("layers/1/padding_groups/0/keys", np.nan, 70),
    "infinity in values": in_array("layers/0/padding_groups/1/values", -np.inf),
    "NaN in a layer that passes": in_array("layers/2/keys", np.nan),
    "NaN in scales": in_array("layers/0/padding_groups/0/chunks/0/1", np.nan),
    "a number whose square is none": in_array("layers/0/padding_groups/0/keys", 1e30),
}


@pytest.mark.parametrize("name", PROMPT_LIES)
def test_prompt_caches_that_lie_are_refused(prompt, name):
    lie(prompt, prompt_cache_file.FORMAT, PROMPT_LIES[name])
    assert "Make it again: spectralkv cache-prompt" in refused(PromptFile.load, prompt)


@pytest.mark.parametrize("field", [*PromptFile.PLAIN_FIELDS, "method", "shape"])
def test_a_prompt_cache_without_a_field_is_refused(prompt, field):
    lie(prompt, prompt_cache_file.FORMAT, lambda arrays, header: header.pop(field))
    assert field in refused(PromptFile.load, prompt)


SET = "head.post"
PROFILE_LIES = {
    "a basis of zeros": scaled(f"{SET}/basis", 0),
    "a column of zeros": lambda arrays, header: arrays[f"{SET}/basis"].__setitem__((0, 1, slice(None), 3), 0),
    "a column twice": lambda arrays, header: arrays[f"{SET}/basis"].__setitem__(
        (1, 0, slice(None), 3), arrays[f"{SET}/basis"][1, 0, :, 2]
    ),
    "a basis too long": scaled(f"{SET}/basis_scale", 3),
    "NaN in a scale": in_array(f"{SET}/basis_scale", np.nan),
    "NaN in levels": in_array(f"{SET}/levels/3", np.nan),
    "levels that fall": scaled(f"{SET}/levels/4", -1),
    "levels that are one": scaled(f"{SET}/levels/1", 0),
    "negative variance": in_array(f"{SET}/variance", -1),
    "infinite variance": in_array(f"{SET}/variance", np.inf),
    "negative sensitivity": in_array(f"{SET}/sensitivity", -1e-3),
    "NaN in a cost": in_array(f"{SET}/cost", np.nan),
    "a weight of zero": in_array(f"{SET}/weight", 0),
    "NaN in a mean": in_array(f"{SET}/mean", np.nan),
    "no counts": scaled(f"{SET}/histogram", 0),
    "negative counts": in_array(f"{SET}/histogram", -1),
    "NaN in queries": in_array("queries/root", np.nan),
    "a negative length": in_array("queries/amplitude", -1),
    "an array more": lambda arrays, header: arrays.update(more=np.zeros(3, np.float32)),
    "an array less": lambda arrays, header: arrays.pop(f"{SET}/mean"),
    "no basis": lambda arrays, header: arrays.pop(f"{SET}/basis"),
    "levels less": lambda arrays, header: arrays.pop(f"{SET}/levels/8"),
    "another dtype": lambda arrays, header: arrays.update({f"{SET}/mean": arrays[f"{SET}/mean"].astype(np.float64)}),
    "a block beyond memory": setting("basis_sets", SET, "block", value=2**40),
    "a block of 12": setting("basis_sets", SET, "block", value=12),
    "an unknown transform": setting("basis_sets", SET, "time", value="fft"),
    "another name": setting("basis_sets", SET, "group", value="layer"),
    "a set that is a number": setting("basis_sets", SET, value=3),
    "no sets": setting("basis_sets", value={}),
    "tokens of text": setting("calibration", "tokens", value="many"),
    "an energy of two": setting("calibration", "target_energy", value=2),
    "a model that is a list": setting("model", value=["a"]),
    "more layers than arrays": setting("shape", "layers", value=[0]),
    "heads that do not divide": setting("shape", "q_heads", value=3),
    "negative RoPE frequencies": setting("shape", "rope", "inv_freq", 3, value=-1.0),
    "more RoPE channels than there are": setting("shape", "rope", "inv_freq", value=64 * [0.5]),
    "no scaling of RoPE": setting("shape", "rope", "scaling", value=0),
    "a RoPE of text": setting("shape", "rope", value="yes"),
}


@pytest.mark.parametrize("name", PROFILE_LIES)
def test_profiles_that_lie_are_refused(profile, name):
    lie(profile, profile_file.FORMAT, PROFILE_LIES[name])
    assert "Make it again: spectralkv profile" in refused(Profile.load, profile)


@pytest.mark.parametrize("field", ["library_version", "model", "shape", "calibration", "weights_digest", "basis_sets"])
def test_a_profile_without_a_field_is_refused(profile, field):
    lie(profile, profile_file.FORMAT, lambda arrays, header: header.pop(field))
    assert field in refused(Profile.load, profile)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "place", ["layers/1/padding_groups/0/keys", "layers/0/padding_groups/1/values", "layers/2/keys"]
)
def test_nan_is_not_saved(tmp_path, dtype, place):
    file = stored(dtype)
    file.arrays[place][0, 1, 3, 5] = np.nan
    with pytest.raises(ValueError, match=rf"finite numbers in {place}, not nan at \[0, 1, 3, 5\]. Nothing was saved"):
        file.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [0x7FC0, 0xFF80], ids=["NaN", "-infinity"])
def test_nan_of_bfloat16_is_neither_saved_nor_read(tmp_path, bad):
    file = stored()
    for name in (f"layers/1/padding_groups/0/{side}" for side in ("keys", "values")):
        file.arrays[name] = (file.arrays[name].view(np.uint32) >> 16).astype(np.uint16)
    for name in (f"layers/1/padding_groups/1/{side}" for side in ("keys", "values")):
        file.arrays[name] = (file.arrays[name].view(np.uint32) >> 16).astype(np.uint16)
    file.layers[1]["dtype"] = "bfloat16"
    path = file.save(tmp_path / "file")
    PromptFile.load(path).plan()
    name = "layers/1/padding_groups/1/values"
    lie(path, prompt_cache_file.FORMAT, in_array(name, bad, 70))
    assert f"finite numbers in {name}, not NaN or infinity at [0, 0, 1, 6]" in refused(PromptFile.load, path)
    file.arrays[name].reshape(-1)[70] = bad
    with pytest.raises(ValueError, match="Nothing was saved"):
        file.save(path)


def test_nan_is_not_saved_in_a_profile(toy_profile, tmp_path):
    queries = replace(toy_profile.queries, mean=np.full_like(toy_profile.queries.mean, np.nan))
    with pytest.raises(ValueError, match=r"finite numbers in queries/mean, not nan at \[0, 0, 0\]. Nothing was saved"):
        replace(toy_profile, queries=queries).save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_little_that_inflates_to_much_is_refused():
    with pytest.raises(ValueError, match="deflated bytes"):
        kvtc._inflate(zlib.compress(bytes(1000))[:-6], 1000)
    assert len(kvtc._inflate(zlib.compress(bytes(10**8)), 1000)) == 1001, "one more than there can be, no more"

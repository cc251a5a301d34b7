"""The profile file: what is written, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import ToyModel
from safetensors.numpy import load_file, save_file

from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.files import container, tensors
from spectral_kv_core.profile.model_shape import ModelShape
from spectral_kv_core.profile.profile import Profile, QueryStatistics

FIELDS = ("model", "shape", "basis_sets", "version", "sha256")


@pytest.fixture
def path(toy_profile, tmp_path) -> Path:
    return toy_profile.save(tmp_path / "folder" / "toy.safetensors")


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def rewrite(path: Path, **changes) -> None:
    """Write the file again with other metadata fields; None drops one."""
    metadata = json.loads(header_of(path)["__metadata__"]["spectralkv"]) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(path), path, {"spectralkv": json.dumps(metadata)})


def refused(path: Path, kind: type = ValueError) -> str:
    with pytest.raises(kind) as caught:
        Profile.load(path)
    message = str(caught.value)
    assert "\n" not in message and "Expected" in message
    assert str(path) in message
    return message


def test_round_trip(toy_profile, path):
    toy_profile = replace(toy_profile, weights_digest="abc")
    toy_profile.save(path)
    loaded = Profile.load(path)
    assert loaded.path == str(path)
    for name in ("shape", "model", "calibration", "weights_digest", "library_version"):
        assert getattr(loaded, name) == getattr(toy_profile, name), name
    for key in QueryStatistics.ARRAYS:
        np.testing.assert_array_equal(getattr(loaded.queries, key), getattr(toy_profile.queries, key))
    assert loaded.basis_sets.keys() == toy_profile.basis_sets.keys()
    for name, ours in toy_profile.basis_sets.items():
        theirs = loaded.basis_sets[name]
        assert (theirs.name, theirs.time, theirs.block, theirs.rank) == (name, ours.time, ours.block, ours.rank)
        for key in ours.ARRAYS:
            np.testing.assert_array_equal(getattr(theirs, key), getattr(ours, key), err_msg=key)
        for bits, levels in ours.levels.items():
            np.testing.assert_array_equal(theirs.levels[bits], levels)


def test_file_is_the_same_twice(toy_profile, path, tmp_path):
    assert toy_profile.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_pinned_header(path):
    header = header_of(path)
    assert header["__metadata__"].keys() == {"spectralkv"}
    metadata = json.loads(header.pop("__metadata__")["spectralkv"])
    assert sorted(metadata) == [
        "basis_sets", "calibration", "format", "library_version", "model", "sha256", "shape", "version",
        "weights_digest",
    ]  # fmt: skip
    assert (metadata["format"], metadata["version"]) == ("spectralkv-profile", 2)
    assert metadata["basis_sets"] == {"head.post": {"group": "head", "rope": "post", "time": "dct", "block": 16}}
    assert sorted(metadata["shape"]) == [
        "head_dim", "hidden_size", "kv_heads", "layers", "num_layers", "q_heads", "rope",
    ]  # fmt: skip
    assert sorted(metadata["shape"]["rope"]) == ["interleaved", "inv_freq", "scaling"]
    # layers 2, groups 4 (K heads, then V heads), channels 64, bands 5, widths 8
    assert {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()} == {
        "head.post/mean": ("F32", [2, 4, 64]),
        "head.post/weight": ("F32", [2, 4, 1]),
        "head.post/basis": ("I8", [2, 4, 64, 64]),
        "head.post/basis_scale": ("F32", [2, 4, 1, 64]),
        "head.post/variance": ("F32", [2, 4, 64, 5]),
        "head.post/sensitivity": ("F32", [2, 4, 64, 5]),
        "head.post/cost": ("F16", [2, 4, 64, 5, 8]),
        "head.post/histogram": ("I64", [1500]),
        **{f"head.post/levels/{bits}": ("F32", [2**bits]) for bits in (1, 2, 3, 4, 5, 6, 8)},
        "queries/mean": ("F32", [2, 4, 64]),
        "queries/root": ("F16", [2, 2, 64, 64]),
        "queries/amplitude": ("F32", [2, 4, 32]),
    }


def test_missing_file_says_how_to_make_one(tmp_path):
    assert "spectralkv profile --model" in refused(tmp_path / "none.safetensors", FileNotFoundError)
    assert "--output" in refused(tmp_path / "none.safetensors", FileNotFoundError)


def test_what_is_no_profile_is_named(tmp_path):
    """Each line is true and useful: not everything that cannot be read is damaged."""
    assert "received the folder" in refused(tmp_path)
    kinds = {
        '{"rows": []}': "JSON text. Results are shown by: spectralkv report",
        "Hello, here is text.": "another kind",
    }
    for text, words in kinds.items():
        (tmp_path / "file").write_text(text)
        assert words in refused(tmp_path / "file") and "damaged" not in refused(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"")
    assert "truncated" in refused(tmp_path / "file")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "weights").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    assert "another safetensors file" in refused(tmp_path / "weights")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "device")
    for name in ("pipe", "device"):
        assert "is a pipe, a device or a socket" in refused(tmp_path / name)


def tensor_file(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


DEEP = b"[" * 100_000
NAMED = {"__metadata__": {"spectralkv": json.dumps({"format": "spectralkv-profile", "version": 2})}}


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + DEEP,
        {"__metadata__": {"spectralkv": DEEP.decode()}},
        {"__metadata__": {"spectralkv": "1" * 5000}},
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":1,"a":1}',
        b"[]",
        {"__metadata__": {"spectralkv": '{"format": NaN}'}},
        {"__metadata__": {"spectralkv": '{"format": 1e999}'}},
        {"__metadata__": {"spectralkv": '{"format": ["spectralkv-profile"]}'}},
        {"__metadata__": {"spectralkv": {"format": "spectralkv-profile"}}},
        {"__metadata__": 3},
        NAMED | {"a": {"dtype": "F32", "shape": 65 * [1], "data_offsets": [0, 4]}},
        NAMED | {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        NAMED | {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        NAMED | {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
        NAMED | {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        NAMED | {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        NAMED | {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        NAMED | {"a": {"dtype": "F32", "shape": [1]}},
        NAMED | {"a": [1]},
        NAMED | {"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ],
)  # fmt: skip
def test_odd_headers_are_one_line(tmp_path, header):
    """Deep nesting, long integers, many axes, names given twice: neither a traceback nor a wait."""
    assert len(refused(tensor_file(tmp_path / "file", header, b"abcd"))) < 600
    container.format_name(tmp_path / "file")


def test_a_file_that_is_overwritten_while_it_is_read_ends_nothing(path, monkeypatch):
    """It was mapped once: the process that looked at what another one had cut off was killed."""
    real = tensors.TensorFile.arrays

    def cut_off(self):
        with open(path, "r+b") as file:
            file.truncate(5000)
        return real(self)

    monkeypatch.setattr(tensors.TensorFile, "arrays", cut_off)
    assert "became shorter" in refused(path)
    monkeypatch.undo()


def test_what_was_read_stays_when_the_file_is_overwritten(toy_profile, path):
    loaded = Profile.load(path)
    with open(path, "r+b") as file:
        file.truncate(0)
    assert loaded == toy_profile


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_file_is_refused(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert "Make it again" in refused(path)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_altered_array_is_refused(path, place):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    assert "altered" in refused(path)


@pytest.mark.parametrize("field", ["format", *FIELDS])
def test_header_without_a_field_is_refused(path, field):
    rewrite(path, **{field: None})
    refused(path)


def test_altered_header_is_refused(path):
    metadata = json.loads(header_of(path)["__metadata__"]["spectralkv"])
    metadata["shape"]["rope"]["inv_freq"][3] *= 1.5
    rewrite(path, shape=metadata["shape"])
    refused(path)


def test_every_flipped_header_byte_is_refused(path):
    """No flip gives a traceback of another kind; flips inside the JSON text that still parse must not pass."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    for place in range(0, 8 + size, 37):
        altered = bytearray(data)
        altered[place] ^= 1
        path.write_bytes(altered)
        refused(path)


def test_newer_version_says_upgrade(path):
    rewrite(path, version=3)
    message = refused(path)
    assert "version 2" in message and "received 3" in message and "pip install -U" in message


def test_older_version_says_calibrate_again(path):
    rewrite(path, version=1)
    message = refused(path)
    assert "version 2" in message and "received 1" in message
    assert f"Make it again: spectralkv profile --model MODEL --output {path}" in message


def test_other_files_are_named(path, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(3, np.float32)}, other)
    assert "another safetensors file" in refused(other)
    rewrite(path, format="spectralkv-prompt-cache")
    assert "spectralkv-prompt-cache" in refused(path)
    other.write_bytes(b"PK\x03\x04 not at all a safetensors file")
    refused(other)


def test_arrays_must_fit_the_shape(toy_profile, tmp_path):
    wrong = replace(toy_profile, shape=replace(toy_profile.shape, kv_heads=4))
    assert "fit the model shape" in refused(wrong.save(tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize("step", ["write_tensors", "os.replace"])
def test_failed_write_leaves_what_was_there(toy_profile, tmp_path, monkeypatch, step):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(container if step == "write_tensors" else os, step.split(".")[-1], fail)
    with pytest.raises(OSError, match="disk full"):
        toy_profile.save(tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.safetensors").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        toy_profile.save(tmp_path / "old.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_text() == "old"


def test_check_names_what_differs(toy_profile):
    shape = toy_profile.shape
    toy_profile.check(shape)
    others = {
        "num_layers": replace(shape, num_layers=3),
        "head_dim 80, the profile has 64": replace(shape, head_dim=80),
        "kv_heads": replace(shape, kv_heads=1),
        "layers": replace(shape, layers=(0,)),
        "RoPE": replace(shape, rope=Rope(tuple(2 * f for f in shape.rope.inv_freq))),
        "no rotary embedding": replace(shape, rope=None),
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words) as caught:
            toy_profile.check(other)
        assert "toy" in str(caught.value) and "spectralkv profile --model" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_basis_set_says_calibrate(toy_profile):
    with pytest.raises(ValueError, match=r"layer\.pre.*head\.post.*spectralkv profile --model toy"):
        toy_profile.basis_set("layer.pre")


def test_fingerprint_is_of_numbers_only():
    shape = ToyModel().shape
    assert len(shape.fingerprint) == 12
    rounded = replace(shape, rope=Rope(tuple(float(np.float32(f)) for f in shape.rope.inv_freq)))
    assert rounded.fingerprint == shape.fingerprint
    assert replace(shape, head_dim=80).fingerprint != shape.fingerprint
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    bare = replace(shape, rope=None)
    assert ModelShape.from_json(bare.to_json()) == bare


def test_summary_text(toy_profile):
    lines = toy_profile.summary().splitlines()
    assert lines[0] == "SpectralProfile: toy"
    assert lines[1] == "  Architecture: 2 layers (2 compressible), 4 query heads, 2 KV heads, head_dim 64"
    assert lines[2] == "  Calibration: 1,500 tokens of toy"
    assert lines[3].startswith("  head.post keys: rank at 95% energy median ") and " of 64; " in lines[3]
    assert lines[4].startswith("  head.post values: ") and len(lines) == 5
    rank = int(lines[3].split("median ")[1].split(",")[0])
    assert ToyModel().planted - 3 <= rank <= ToyModel().planted
    assert "at 50% energy" in toy_profile.summary(0.5)

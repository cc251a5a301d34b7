"""How files are written: whole or not at all, with the rights that belong to them, and with nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from spectral_kv_core.evaluation.records import RecordFile
from spectral_kv_core.files import container, replacing
from spectral_kv_core.files.container import FileFormat
from spectral_kv_core.files.replacing import write_whole
from spectral_kv_core.files.tensors import TensorFile, open_regular, write_tensors

OPEN = FileFormat("test", 1, "test", "make test")
PRIVATE = FileFormat("test", 1, "test", "make test", private=True)
ARRAYS = {"x": np.arange(12, dtype=np.float32)}
ROOT = Path(replacing.__file__).parents[2]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o000], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_gets_what_the_umask_leaves(tmp_path, umask):
    assert mode_of(OPEN.save(tmp_path / "a", ARRAYS, {})) == 0o666 & ~umask
    write_whole(tmp_path / "b", b"text")
    assert mode_of(tmp_path / "b") == 0o666 & ~umask


def test_a_new_private_file_is_for_its_owner(tmp_path, umask):
    assert mode_of(PRIVATE.save(tmp_path / "a", ARRAYS, {})) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o664])
@pytest.mark.parametrize("kind", [OPEN, PRIVATE], ids=["open", "private"])
def test_an_existing_file_keeps_its_mode(tmp_path, mode, kind, umask):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    kind.save(path, ARRAYS, {})
    assert mode_of(path) == mode and kind.load(path)[0]["x"].sum() == 66


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("file", "missing"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / "there" / name)
        if name == "file":
            link.write_bytes(b"old")
        assert OPEN.save(link, ARRAYS, {}) == link
        assert link.is_symlink() and OPEN.load(tmp_path / "there" / name)[0]["x"].sum() == 66
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["file", "missing"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(ValueError, match="is a folder, a pipe or a device. Name another file"):
            OPEN.save(path, ARRAYS, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


WRITER = """
import sys, time
from spectral_kv_core.files.replacing import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_killed_writers_go_at_the_next_save(tmp_path):
    """Those of other files stay, as does what a living process is writing, however long that takes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = []
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
        assert writers[-1].stdout.readline() == "writing\n"
    for writer in writers[:2]:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (tmp_path / ".another.1-2.part").write_bytes(b"")
    (tmp_path / ".a.txt").write_bytes(b"")
    try:
        OPEN.save(tmp_path / "a", ARRAYS, {})
        assert len(list(tmp_path.iterdir())) == 6, "they are young: their writers may not have locked them yet"
        for path in tmp_path.iterdir():
            os.utime(path, (0, time.time() - 2 * replacing.YOUNG))
        OPEN.save(tmp_path / "a", ARRAYS, {})
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == 4 and left[1:] == [".a.txt", ".another.1-2.part", "a"] and str(writers[2].pid) in left[0]
    finally:
        writers[2].kill()
        writers[2].wait()
        writers[2].stdout.close()
    OPEN.save(tmp_path / "a", ARRAYS, {})
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=["disk", "quota"],
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def full(file, arrays, metadata):
        file.write(b"half")
        raise error

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(container, "write_tensors", full)
    with pytest.raises(OSError, match="Expected room for 48 bytes for .*a, the disk or the quota is full") as caught:
        OPEN.save(tmp_path / "a", ARRAYS, {})
    assert "Free some, or name another place" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_between_records_is_one_line(tmp_path):
    records = RecordFile(tmp_path / "rows.jsonl")
    records.append({"method": "a"})
    records.path = Path("/dev/full")
    with pytest.raises(OSError, match=r"room for \d+ bytes for /dev/full, the disk .* The records before it are kept"):
        records.append({"method": "b"})
    assert list(records.records) == list(RecordFile(tmp_path / "rows.jsonl").records)


def test_any_other_error_is_as_it_was(tmp_path):
    with pytest.raises(PermissionError, match="nobody may"), replacing.replacing(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "nobody may")
    assert not list(tmp_path.iterdir())


def test_files_are_those_that_safetensors_writes(tmp_path):
    """To the byte: types, names in their order, an array of no axis, one of no number, text that is not ASCII."""
    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    arrays = {f"{name}/{kind}": np.arange(5).astype(kind) for kind in kinds for name in ("b", "a", "\u00e9")}
    arrays |= {"none": np.zeros((0, 3), np.float32), "one": np.array(3, np.int64)}
    metadata = {"spectralkv": 'caf\u00e9 "\\ \n\x1f\x7f \u2028'}
    save_file(arrays, tmp_path / "theirs", metadata)
    with replacing.replacing(tmp_path / "ours") as file:
        write_tensors(file, arrays, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with open_regular(tmp_path / "theirs", "test") as file:
        found = TensorFile(file)
        assert found.metadata == metadata
        for name, x in found.arrays().items():
            assert x.dtype == arrays[name].dtype and x.shape == arrays[name].shape and (x == arrays[name]).all()

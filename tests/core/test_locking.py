"""Two at once: the second waits, and finds the work done."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cases import ToyModel, toy_profile_of

from spectral_kv_core.errors import UsageError
from spectral_kv_core.files import locking
from spectral_kv_core.files.locking import one_process
from spectral_kv_core.profile.store import auto_profile, cached_profile_path

ROOT = Path(locking.__file__).parents[2]
HOLDER = """
import sys
from spectral_kv_core.files.locking import one_process
with one_process(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen:
    """Another process, in there with the lock file `path`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes
    )
    assert process.stdout.readline() == "in\n"
    return process


def test_the_second_waits_until_the_first_has_ended_however_that_is(tmp_path, caplog):
    path = tmp_path / "new folder" / "lock"
    first, entered = holder(path), threading.Event()

    def second():
        with one_process(path, "Waiting for the other one."):
            entered.set()

    thread = threading.Thread(target=second)
    with caplog.at_level(logging.WARNING, "spectralkv"):
        thread.start()
        assert not entered.wait(0.5)
        first.kill()
        assert entered.wait(10)
    thread.join()
    first.communicate()
    assert caplog.messages == ["Waiting for the other one."]


def test_nobody_waits_where_there_can_be_no_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with one_process(tmp_path / "file" / "lock"), one_process(tmp_path):
        pass


def test_two_that_need_a_profile_calibrate_once(tmp_path, monkeypatch, caplog):
    """The profile comes from the one who was first."""
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path))
    model = ToyModel(head_dim=16)
    made, calls = toy_profile_of(model), []

    def calibrate():
        calls.append(1)
        time.sleep(0.5)
        return made

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(auto_profile(model.shape, "head.post", calibrate)))
        for _ in range(3)
    ]
    with caplog.at_level(logging.WARNING, "spectralkv"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(calls) == 1 and len(found) == 3 and found[0] == found[1] == found[2]
    assert "waiting for its profile" in caplog.text and cached_profile_path(model.shape).is_file()


def test_a_folder_that_cannot_be_written_is_told_before_a_calibration(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="SPECTRALKV_CACHE, or give a profile"):
        auto_profile(ToyModel(head_dim=16).shape, "head.post", lambda: pytest.fail("calibrates"))

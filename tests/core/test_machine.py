"""Peak memory belongs to one process, not to the one that started it."""

from __future__ import annotations

import subprocess
import sys

from spectral_kv_core.benchmark.machine import cpu_cores, cpu_name, process_peak_bytes


def test_a_child_does_not_inherit_the_peak_of_its_parent():
    held = bytearray(300_000_000)
    code = "from spectral_kv_core.benchmark.machine import process_peak_bytes; print(process_peak_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < len(held) <= process_peak_bytes()


def test_the_machine_has_a_name():
    assert cpu_name() and cpu_cores() >= 1

"""The core stands alone, and the backends mirror each other."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = ("spectral_kv_torch", "spectral_kv_mlx")


def public_names(path: Path) -> list[str] | None:
    """The list `__all__` of a source file, read without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_core_loads_no_framework():
    code = """
import importlib, pkgutil, sys
import spectral_kv_core
names = [m.name for m in pkgutil.walk_packages(spectral_kv_core.__path__, "spectral_kv_core.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
loaded = {"torch", "mlx", "mlx_lm", "transformers"} & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded
print(len(names))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 20


def test_core_source_names_no_backend_package():
    for path in (ROOT / "shared" / "spectral_kv_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"torch", "mlx", "mlx_lm", "transformers", *BACKENDS}, path


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_do_not_import_each_other(name):
    (other,) = set(BACKENDS) - {name}
    for path in (ROOT / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not any(module.startswith(other) for module in modules), path


def test_backends_have_the_same_files():
    first, second = ({p.name for p in (ROOT / name).glob("*.py")} for name in BACKENDS)
    assert first == second


def test_backends_have_the_same_names():
    torch_names, mlx_names = (public_names(ROOT / name / "__init__.py") for name in BACKENDS)
    assert set(torch_names) - {"SpectralCache"} == set(mlx_names)
    for name, names in zip(BACKENDS, (torch_names, mlx_names)):
        assert names == sorted(set(names)), f"{name}: sorted and without repeats"


def test_every_ops_module_has_the_same_names(xp):
    core = importlib.import_module("spectral_kv_core.arrays.ops")
    assert xp.__all__ == core.__all__
    assert all(hasattr(xp, name) for name in xp.__all__)

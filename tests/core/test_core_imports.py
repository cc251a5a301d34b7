"""The core stands alone, and the backends mirror each other."""

from __future__ import annotations

import ast
import importlib
import inspect
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
    """But for what mlx-lm alone has: batches that sequences join and leave, options of its own cache, commands, and
    many modules that call attention, each for a family of models. transformers has one name that stands for them all.
    """
    alone = {"batch", "commands", "limits", "masks", "places", "rotation", "trace"}
    first, second = ({p.stem for p in (ROOT / name).glob("*.py")} for name in BACKENDS)
    assert first - {"routing"} == second - alone


def test_backends_have_the_same_names():
    torch_names, mlx_names = (public_names(ROOT / name / "__init__.py") for name in BACKENDS)
    assert set(torch_names) - {"SpectralCache"} == set(mlx_names)
    for name, names in zip(BACKENDS, (torch_names, mlx_names)):
        assert names == sorted(set(names)), f"{name}: sorted and without repeats"


def test_every_ops_module_has_the_same_names(xp):
    core = importlib.import_module("spectral_kv_core.arrays.ops")
    assert xp.__all__ == core.__all__
    assert all(hasattr(xp, name) for name in xp.__all__)


@pytest.mark.parametrize(
    "module, protocol", [("host", "Host"), ("integration", "Models"), ("generation", "Generation")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_have_the_functions_of_the_protocols(backend, module, protocol):
    """Under the same names, with the arguments that the core gives, behind which a backend may have some of its own."""
    pytest.importorskip(backend.replace("spectral_kv_mlx", "mlx_lm").replace("spectral_kv_torch", "transformers"))
    of = getattr(importlib.import_module("spectral_kv_core.hosts.protocol"), protocol)
    found = importlib.import_module(f"{backend}.{module}")
    assert all(hasattr(found, name) for name in of.__annotations__)
    functions = [name for name, item in vars(of).items() if inspect.isfunction(item) and not name.startswith("_")]
    assert len(functions) >= 6
    for name in functions:
        _, *expected = inspect.signature(getattr(of, name)).parameters.values()
        parameters = list(inspect.signature(getattr(found, name)).parameters.values())
        assert len(parameters) >= len(expected), name
        assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters[len(expected) :]), name
        if module != "host" or name not in ("copy_layer", "no_gradients"):  # functions of other libraries
            assert [p.name for p in parameters[: len(expected)]] == [p.name for p in expected], name

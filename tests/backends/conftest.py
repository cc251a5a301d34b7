"""One suite for both hosts: `host` and `family` as parameters, and the mark `mlx` on whatever runs on MLX.

PyTorch and MLX are tested in processes of their own: `pytest -m "not mlx"` and `pytest -m mlx`.
"""

from __future__ import annotations

import importlib

import hosts
import pytest

LIBRARIES = {"torch": ("torch", "transformers"), "mlx": ("mlx.core", "mlx_lm")}


def pytest_generate_tests(metafunc):
    if "host" not in metafunc.fixturenames:
        return
    exception = metafunc.definition.get_closest_marker("only")
    names = [exception.args[0]] if exception else hosts.NAMES
    if "family" not in metafunc.fixturenames:
        metafunc.parametrize("host", [pytest.param(name, marks=_marks(name)) for name in names], indirect=True)
        return
    wanted = metafunc.definition.get_closest_marker("of_families")
    cases = [
        pytest.param(name, family, marks=_marks(name), id=f"{name}-{family}")
        for name in names
        for family in hosts.FAMILIES[name]
        if wanted is None or family in (*wanted.args, *wanted.kwargs.get(name, ()))
    ]
    metafunc.parametrize("host, family", cases, indirect=["host"])


def _marks(name: str) -> list:
    return [pytest.mark.mlx] if name == "mlx" else []


def pytest_itemcollected(item):
    exception = item.get_closest_marker("only")
    if item.path.name.startswith("test_mlx_") or (exception and exception.args[0] == "mlx"):
        item.add_marker(pytest.mark.mlx)


@pytest.fixture(scope="session")
def host(request):
    """The module `torch_host` or `mlx_host`; a test is skipped where its libraries are not installed."""
    for library in LIBRARIES[request.param]:
        pytest.importorskip(library)
    return importlib.import_module(f"{request.param}_host")

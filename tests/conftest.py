"""Fixtures of the whole suite: the array libraries, and a small profile."""

from __future__ import annotations

import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # arrays here are tiny: threads that wait for each other cost more than they do

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from cases import ToyModel, toy_profile_of  # noqa: E402
from quick import one_of_each  # noqa: E402

from spectral_kv_core.codecs import outliers  # noqa: E402
from spectral_kv_core.profile.profile import Profile  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one case of every test that is not marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        chosen = one_of_each(items)
        left_out = set(items).difference(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = chosen


@pytest.fixture(scope="session", params=["numpy", "torch", "mlx"])
def xp(request):
    """The core's array operations on one library."""
    if request.param == "numpy":
        return importlib.import_module("spectral_kv_core.arrays.ops")
    if request.param == "torch":
        pytest.importorskip("torch").set_num_threads(1)
        return importlib.import_module("spectral_kv_torch.ops")
    pytest.importorskip("mlx.core")
    return importlib.import_module("spectral_kv_mlx.ops")


@pytest.fixture(scope="session")
def toy_profile() -> Profile:
    """Profile of `ToyModel()`, read back from its file."""
    return toy_profile_of(ToyModel())


@pytest.fixture
def text_is_known(monkeypatch):
    """No token lies outside the profile: those of tiny models come from too little text for that."""
    for name, limit in (("PEAK", np.inf), ("HIGH", np.inf), ("LOST", np.inf), ("FLAT", 0.0)):
        monkeypatch.setattr(outliers, name, limit)

"""Wrong use has an exception of its own: callers tell it from a fault, and it is still a ValueError."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint

import spectral_kv_core
from spectral_kv_core.calibration.text import load_texts
from spectral_kv_core.errors import UsageError, first_line
from spectral_kv_core.evaluation.settings import Settings
from spectral_kv_core.hosts.backends import load_backend
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.scorers import get_scorer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: Settings(()),
        lambda folder: load_texts([]),
        lambda folder: load_backend("jax"),
        lambda folder: get_scorer("nobody"),
        lambda folder: Profile.load(str(folder / "text.txt")),
    ],
    ids=["settings", "texts", "backend", "scorer", "file"],
)
def test_wrong_use_is_a_usage_error_and_a_value_error(tmp_path, use):
    (tmp_path / "text.txt").write_text("no profile")
    with pytest.raises(UsageError) as caught:
        use(tmp_path)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("function", ["integration.load_model", "footprint.skeleton"])
@pytest.mark.parametrize(("backend", "host"), [("torch", "transformers"), ("mlx", "mlx-lm")])
def test_a_model_that_the_host_does_not_know_is_wrong_use(tmp_path, backend, host, function):
    pytest.importorskip("torch")  # which writes the checkpoint
    pytest.importorskip("torch" if backend == "torch" else "mlx_lm")
    config = save_tiny_checkpoint(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "cups"}))
    module, name = function.split(".")
    load = getattr(importlib.import_module(f"spectral_kv_{backend}.{module}"), name)
    with pytest.raises(UsageError, match=f"a model that {host} knows, cannot load .*cups") as caught:
        load(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1 and isinstance(caught.value.__cause__, ValueError)


def test_the_first_line_of_an_error_without_text_is_its_name():
    assert first_line(OSError("\n one\ntwo")) == "one" and first_line(OSError()) == "OSError"


# what our own code hands to itself, the demo model, which nobody passes, and tensors, of which `container` tells the file
INTERNAL = {
    "arrays/hadamard.py", "evaluation/fidelity.py", "files/tensors.py", "hosts/demo_model.py", "quantization/entropy.py",
    "quantization/packing.py", "scorers/selection.py", "scorers/tokens.py",
}  # fmt: skip


def test_refusals_are_usage_errors():
    """A plain ValueError would end the command line with 1, as a fault does."""
    core = Path(spectral_kv_core.__file__).parent
    folders = [core, *(ROOT / name for name in ("spectral_kv_torch", "spectral_kv_mlx"))]
    plain = {
        path.relative_to(folder).as_posix()
        for folder in folders
        for path in folder.rglob("*.py")
        if "raise ValueError(" in path.read_text()
    }
    assert plain == INTERNAL

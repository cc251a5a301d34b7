"""Plans, codes, files and public names are those of `golden.json`."""

from __future__ import annotations

import json

import pytest
from golden_values import FILE, chunks, plans, public_names, shipped_profile, stored_prompt

from spectral_kv_core.quantization import trellis

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def profile():
    return shipped_profile()


@pytest.mark.slow
def test_plans_are_the_same(profile):
    got = plans(profile)
    assert set(got) == set(GOLDEN["plans"])
    for name, by_bits in got.items():
        assert by_bits == GOLDEN["plans"][name], name


def test_the_same_coefficients_give_the_same_bytes_on_every_array_library(xp, profile):
    for name, digest in chunks(xp, profile).items():
        if trellis.is_fast() or not any(word in name for word in ("trellis", "dense")):
            assert digest == GOLDEN["chunks"][name], name


@pytest.mark.slow
def test_a_stored_prompt_has_the_same_bytes(profile):
    assert stored_prompt(profile) == GOLDEN["stored_prompt"]


@pytest.mark.parametrize("package", ["spectral_kv_torch", "spectral_kv_mlx"])
def test_public_names_have_the_same_signatures(package):
    pytest.importorskip(package.replace("spectral_kv_mlx", "mlx_lm").replace("spectral_kv_torch", "transformers"))
    assert public_names(package) == GOLDEN["public_names"][package]

"""SmolLM2-135M-Instruct on the MLX backend. The CPU build is slow, so texts are short."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

pytest.importorskip("mlx_lm")

from test_readme import example, run

from spectral_kv_core.arrays.divergence import compare_logits
from spectral_kv_core.hosts.demo_model import demo_model_path
from spectral_kv_mlx import load_model, make_prompt_cache
from spectral_kv_mlx.generation import plain_cache, score

pytestmark = pytest.mark.slow


def test_quality_and_logits_of_both_backends():
    """KL at 4 and 2 bits over a few hundred tokens; logits of the compressed caches of both backends agree."""
    model, tokenizer = load_model(demo_model_path(), "float32")
    text = (files("spectral_kv_core") / "data" / "demo_prompt.txt").read_text()
    ids = tokenizer.encode(text)[:300]
    prompt, labels = ids[:284], ids[284:]
    reference = score(model, prompt, labels, plain_cache(model))
    got = {bits: score(model, prompt, labels, make_prompt_cache(model, bits=bits)) for bits in (4.0, 2.0)}
    assert compare_logits(reference, got[4.0], labels)["kl"] < 0.01
    assert compare_logits(reference, got[2.0], labels)["kl"] < 0.05
    torch_backend = pytest.importorskip("spectral_kv_torch.generation")
    twin, _ = torch_backend.load_model(demo_model_path(), "float32")
    np.testing.assert_allclose(
        torch_backend.score(twin, prompt, labels, torch_backend.plain_cache(twin)), reference, atol=1e-3
    )
    theirs = torch_backend.score(twin, prompt, labels, torch_backend.make_prompt_cache(twin, bits=4.0))
    assert compare_logits(theirs, got[4.0], labels)["kl"] < 1e-3


def test_quick_start_of_mlx():
    code = example("spectral_kv_mlx").replace("[:1500]", "[:400]")  # minutes on a Linux machine without OpenBLAS
    assert "times smaller" in run(code)

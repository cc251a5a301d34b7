"""SmolLM2-135M-Instruct on both hosts, with the shipped profile: bytes, quality and text that README claims."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from cases import decoded_paths
from hosts import only
from test_readme import example, run

from spectral_kv_core.arrays.basis import orthonormalize
from spectral_kv_core.arrays.divergence import compare_logits
from spectral_kv_core.cli import main as cli
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.hosts.demo_model import demo_model_path
from spectral_kv_core.planning.methods import get_method
from spectral_kv_core.profile.store import find_profile
from spectral_kv_core.quantization import trellis
from spectral_kv_core.quantization.quantizer import thresholds

pytestmark = pytest.mark.slow
LONG = "texts of a thousand tokens take MLX's CPU build too long"


@pytest.fixture(scope="module")
def prompt_text():
    return (files("spectral_kv_core") / "data" / "demo_prompt.txt").read_text()


@pytest.fixture(autouse=True)
def all_cores(host):
    if host.NAME == "mlx":
        yield
        return
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


@only("torch", LONG)
def test_quality_and_bytes_at_4_and_2_bits(host, tmp_path, capsys, prompt_text):
    """A real prefix of about a thousand tokens, the text after it scored: the limits of the first issue."""
    words = prompt_text.split(" ")
    (tmp_path / "prefix.txt").write_text(" ".join(words[:780]))
    (tmp_path / "after.txt").write_text(" " + " ".join(words[780:840]))
    rows = {}
    for bits in ("4", "2"):
        arguments = ["--model", "demo", "--backend", host.NAME, "--dtype", "float32", "--raw", "--json"]
        arguments += ["--prompt-file", str(tmp_path / "prefix.txt"), "--score-file", str(tmp_path / "after.txt")]
        assert cli.main(["generate", *arguments, "--bits", bits, "--max-tokens", "0"]) == 0
        rows[bits] = json.loads(capsys.readouterr().out)
    assert rows["4"]["prompt_tokens"] > 900 and rows["4"]["scored_tokens"] > 60
    assert rows["4"]["kl"] < 0.01 and rows["4"]["top1"] > 0.93
    assert rows["2"]["kl"] < 0.05 and rows["2"]["top1"] > 0.85
    # exact tokens are float32 here, the sealed ones take 2 and 4 bits
    assert rows["2"]["cache_bytes"] < 0.76 * rows["4"]["cache_bytes"] < 0.3 * rows["4"]["dense"]["cache_bytes"]


@only("torch", LONG)
@pytest.mark.parametrize("opening", ["\n" * 120, " the" * 300, "a" * 900], ids=["newlines", "the", "a"])
def test_nothing_clips_in_silence(host, opening, prompt_text):
    """A run of one token at the start of a prompt, whose coefficients lie far beyond the tables."""
    model, tokenizer = host.load_model(demo_model_path(), "float32")
    text = tokenizer.encode(prompt_text)
    prompt, labels = tokenizer.encode(opening) + text[:100], text[100:116]
    reference = host.score(model, prompt, labels, host.plain_cache(model))
    for bits in (3.0, 8.0):
        got = host.score(model, prompt, labels, host.make_prompt_cache(model, bits=bits))
        assert compare_logits(reference, got, labels)["kl"] < 0.01


@only("torch", LONG)
def test_greedy_text_at_4_bits_equals_the_plain_cache(host, prompt_text):
    """With `spectral-dense`; the tenth token of this answer is nearly a tie, which `spectral` turns at 6 bits still."""
    model, tokenizer = host.load_model(demo_model_path(), "float32")
    messages = [{"role": "user", "content": prompt_text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    texts = [
        host.generate(model, tokenizer, prompt, cache, 32, True, lambda token: None).tokens
        for cache in (host.plain_cache(model), host.make_prompt_cache(model, bits=4.0, method="spectral-dense"))
    ]
    assert texts[0] == texts[1]


BANDS = np.repeat(np.arange(5), [1, 1, 2, 4, 8])  # octaves of the 16 frequencies
DCT = np.sqrt(2 / 16) * np.cos(np.pi / 16 * (np.arange(16) + 0.5) * np.arange(16)[:, None])
DCT[0] /= np.sqrt(2)


def turned(x, angles):
    """Halves of the last axis of `x` [H, T, D] turned by `angles` [T, D / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def simulated(plan, row, keys, values, start):
    """Keys and values [H, T, D] as the plan would store them, in float64 and from the profile's arrays alone."""
    basis_set, heads = plan.basis_set, len(keys)
    angles = (start + np.arange(keys.shape[1]))[:, None] * np.array(plan.shape.rope.inv_freq)
    pre = plan.method.rope == "pre"
    x = np.concatenate([turned(keys, -angles) if pre else keys, values])
    groups, channels = basis_set.mean.shape[1:]
    x = x.reshape(groups, -1, *x.shape[1:]).transpose(0, 2, 1, 3).reshape(groups, -1, channels)
    weight = np.repeat(basis_set.weight[row].astype(np.float64), plan.shape.head_dim, axis=-1)[:, None]
    mean, basis = basis_set.mean[row][:, None], orthonormalize(basis_set.basis[row]).astype(np.float64)
    y = (((x - mean) * weight) @ basis).reshape(groups, -1, 16, basis.shape[-1])
    sigma = np.sqrt(basis_set.variance[row].astype(np.float64))[..., BANDS].transpose(0, 2, 1)[:, None]
    z, decoded = DCT @ y / sigma, np.zeros_like(y)
    widths = np.broadcast_to(plan.widths[row][..., BANDS].transpose(0, 2, 1)[:, None], z.shape)
    coupled = trellis.WIDTHS if plan.method.quantizer == "trellis" else ()
    for bits, levels in basis_set.levels.items():
        if bits not in coupled:
            code = np.searchsorted(thresholds(levels), z)
            decoded = np.where(widths == bits, plan.levels[bits][code], decoded)
    if coupled:
        cost = plan.loss(row)[..., BANDS].transpose(0, 2, 1)
        rows = trellis.Coefficients(widths[:, 0], np.ones(cost.shape), cost, DCT, plan.search_tables)
        along = decoded_paths(rows, plan.levels, rows.search(z[None], None))[0]
        decoded = np.where(np.isin(widths, coupled), along, decoded)
    x = (DCT.T @ (decoded * sigma)).reshape(groups, -1, basis.shape[-1]) @ basis.swapaxes(-1, -2) / weight + mean
    x = x.reshape(groups, x.shape[1], -1, plan.shape.head_dim).transpose(0, 2, 1, 3).reshape(2 * heads, x.shape[1], -1)
    return turned(x[:heads], angles) if pre else x[:heads], x[heads:]


@only("torch", LONG)
@pytest.mark.parametrize("name", ["spectral", "spectral-trellis", "spectral-dense"])
@pytest.mark.usefixtures("text_is_known")
def test_the_packed_cache_is_a_float_simulation_of_itself(host, name):
    torch = pytest.importorskip("torch")
    model, tokenizer = host.load_model(demo_model_path(), "float32")
    text = (files("spectral_kv_core") / "data" / "evaluation" / "prose.txt").read_text()
    tokens = tokenizer.encode(text[:6000])[: 4 + 640 + 64 + 16]
    prefix, after = tokens[:-16], tokens[-16:]  # one more token fed would seal the next block
    plain = host.plain_cache(model)
    before = host.backend.feed(model, prefix, plain)
    method = replace(get_method(name), rounding="nearest")
    packed = host.make_prompt_cache(model, bits=2.0, method=method)
    plan = make_plan(packed.plan.shape, find_profile(packed.plan.shape, method.basis_set), method, 2.0)
    assert plan.hash == packed.plan.hash
    host.fill(packed, plain)
    floating = copy.deepcopy(plain)
    for row, layer_idx in enumerate(plan.shape.layers):
        layer = floating.layers[layer_idx]
        held = (x[0, :, 4:644].double().numpy() for x in (layer.keys, layer.values))
        for x, stored in zip((layer.keys, layer.values), simulated(plan, row, *held, 4)):
            x[0, :, 4:644] = torch.from_numpy(stored)
    logits = [
        np.concatenate([before, *(host.backend.feed(model, [token], cache) for token in after[:-1])])
        for cache in (plain, floating, packed)
    ]
    cost = compare_logits(logits[0], logits[2], after)["kl"]
    assert cost > 3e-4  # something was lost, and both lose the same
    assert compare_logits(logits[1], logits[2], after)["kl"] < 0.005 * cost


@only("mlx", "both hosts on one model, in the process of MLX")
def test_quality_and_logits_of_both_backends(host, prompt_text):
    """KL at 4 and 2 bits over a few hundred tokens; logits of the compressed caches of both backends agree."""
    model, tokenizer = host.load_model(demo_model_path(), "float32")
    ids = tokenizer.encode(prompt_text)[:300]
    prompt, labels = ids[:284], ids[284:]
    reference = host.score(model, prompt, labels, host.plain_cache(model))
    got = {bits: host.score(model, prompt, labels, host.make_prompt_cache(model, bits=bits)) for bits in (4.0, 2.0)}
    assert compare_logits(reference, got[4.0], labels)["kl"] < 0.01
    assert compare_logits(reference, got[2.0], labels)["kl"] < 0.05
    torch_backend = pytest.importorskip("spectral_kv_torch.generation")
    twin, _ = torch_backend.load_model(demo_model_path(), "float32")
    np.testing.assert_allclose(
        torch_backend.score(twin, prompt, labels, torch_backend.plain_cache(twin)), reference, atol=1e-3
    )
    theirs = torch_backend.score(twin, prompt, labels, torch_backend.make_prompt_cache(twin, bits=4.0))
    assert compare_logits(theirs, got[4.0], labels)["kl"] < 1e-3


@only("mlx", "`test_readme.py` runs that of transformers")
def test_quick_start_of_mlx(host):
    code = example("spectral_kv_mlx").replace("[:1500]", "[:400]")  # minutes on a Linux machine without OpenBLAS
    assert "times smaller" in run(code)

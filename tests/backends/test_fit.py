"""`spectralkv fit`: the bytes that it counts are those of real caches, without a weight being loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cases import ToyModel, toy_profile_of  # noqa: E402
from tiny_checkpoint import save_tiny_checkpoint  # noqa: E402
from torch_models import ByteTokenizer, tiny_model, tokens  # noqa: E402

from spectral_kv_core.benchmark.footprint import Budget, Footprint, Stored, Wanted, fit, parse_bytes  # noqa: E402
from spectral_kv_core.cli import main as cli  # noqa: E402
from spectral_kv_core.codecs.registry import make_plan  # noqa: E402
from spectral_kv_core.hosts.weights import safetensors_nbytes  # noqa: E402
from spectral_kv_core.planning.methods import get_method  # noqa: E402
from spectral_kv_torch import SpectralProfiler, cache_nbytes, make_prompt_cache  # noqa: E402
from spectral_kv_torch import footprint as torch_footprint  # noqa: E402
from spectral_kv_torch.generation import PREFILL_CHUNK, feed, prefill  # noqa: E402

TEXT = ["The cups stood on the table, 23 of them, and nobody knew whose they were. " * 40]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return {name: save_tiny_checkpoint(folder / name, name) for name in ("llama", "gemma3")}


def profiled(name: str, method: str):
    model = tiny_model(name)
    profiler = SpectralProfiler(tokens=512, document=512, progress=False, basis_sets=(get_method(method).basis_set,))
    return model, profiler.profile_from_model(model, ByteTokenizer(), TEXT)


@pytest.mark.parametrize("name, method, bits", [
    ("llama", "spectral", 2.0), ("llama", "spectral", 4.0), ("gemma3", "spectral", 1.5), ("llama", "spectral-dense", 3.0),
])  # fmt: skip
def test_counts_are_those_of_a_filled_cache(folders, name, method, bits):
    """Codes, exact tokens, sliding windows and tables, before and after a prompt that takes several calls."""
    model, profile = profiled(name, method)
    found = torch_footprint.footprint(str(folders[name]))
    stored = Stored(make_plan(found.shape, profile, method, bits), torch_footprint.table_nbytes)
    budget = Budget(found, stored, sinks=4, window=64, exact_bytes=found.element_bytes)
    for context in (1, 60, 83, 84, 200, 1500, 2100, 3333):
        cache = make_prompt_cache(model, profile, bits, method=method)
        prompt = tokens(context, seed=context)[0].tolist()
        prefill(model, prompt[:-1] if context > 1 else prompt, cache)
        if context > 1:
            feed(model, prompt[-1:], cache)  # a step ends the prompt
        size = cache_nbytes(cache)
        assert budget.cache_bytes(context) == int(size), context
        one = len(found.passed) * found.layer_elements * 2  # of its window, transformers shows one token less
        assert 0 <= budget.dense_bytes(context) - size.dense_nbytes <= one, context
        assert budget.table_bytes(context) == size.table_nbytes, context


def test_affine_and_plain_counts(folders):
    model = tiny_model("qwen3")
    found = replace(torch_footprint.footprint(str(folders["llama"])), passed_tokens={})
    shape = replace(found.shape, head_dim=64, kv_heads=1)
    profile_free = make_plan(shape, None, "affine", 4.5)
    budget = Budget(replace(found, shape=shape), Stored(profile_free, lambda plan: (0, 0)), 4, 64, 4)
    from spectral_kv_core.arrays import ops
    from spectral_kv_core.cache.layer_cache import LayerCache
    from spectral_kv_core.codecs.registry import make_codec

    keys, values = ToyModel(64, 1, 2, layers=1).sample(0, 1500)
    layer = LayerCache(ops, make_codec(ops, profile_free, 0), 4, 64)
    layer.append(keys, values)
    assert budget.cache_bytes(1500) == 3 * sum(x.nbytes for x in layer.arrays())
    cache = make_prompt_cache(model, method="identity")
    prefill(model, tokens(300)[0].tolist(), cache)
    identity = Budget(replace(found, shape=torch_footprint.model_shape(model)[0]), None, 0, 0, 4)
    assert identity.cache_bytes(300) == int(cache_nbytes(cache)) and identity.table_bytes(300) == 0


def test_a_staged_prompt_holds_more_until_it_ends(folders):
    """What `prefill_bytes` adds for codes at 4 bits is what the cache really holds before the prompt ends."""
    model, profile = profiled("llama", "spectral")
    found = torch_footprint.footprint(str(folders["llama"]))
    stored = Stored(make_plan(found.shape, profile, "spectral", 1.0), torch_footprint.table_nbytes)
    budget = Budget(found, stored, 4, 64, 4)
    context = PREFILL_CHUNK + 1000
    cache = make_prompt_cache(model, profile, 1.0)
    prefill(model, tokens(context)[0].tolist(), cache)
    held = int(cache_nbytes(cache))
    staged = budget.staged(context, turns=False)
    extra = stored.staging.nbytes(staged) - stored.nbytes(staged)
    assert held - budget.cache_bytes(context) == pytest.approx(extra, rel=0.01) and extra > 0
    assert budget.prefill_bytes(context) > extra


def test_nothing_is_loaded(folders, monkeypatch):
    """Sizes and RoPE come from the configuration: the weights may even be missing."""
    model = tiny_model("llama")
    skeleton = torch_footprint.skeleton(str(folders["llama"]))
    assert all(p.is_meta for p in skeleton.parameters())
    found = torch_footprint.footprint(str(folders["llama"]))
    assert found.weights_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.shape.mismatch(torch_footprint.model_shape(model)[0]) is None
    assert torch_footprint.footprint(str(folders["llama"]), "bfloat16").weights_bytes == found.weights_bytes // 2
    (folders["llama"] / "model.safetensors").rename(folders["llama"] / "away")
    try:
        assert torch_footprint.footprint(str(folders["llama"])) == found
    finally:
        (folders["llama"] / "away").rename(folders["llama"] / "model.safetensors")
    gemma = torch_footprint.footprint(str(folders["gemma3"]))
    assert gemma.passed_tokens == {0: 31} or gemma.passed_tokens == {0: 32}
    sizes = sum(p.numel() * p.element_size() for p in tiny_model("gemma3").parameters())
    assert abs(safetensors_nbytes(folders["gemma3"]) - sizes) <= sizes  # tied weights are stored once


def test_quantized_weights_have_the_size_of_their_files(folders, tmp_path):
    config = json.loads((folders["llama"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights in safetensors files"):
        torch_footprint.footprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folders["llama"] / "model.safetensors").read_bytes())
    assert torch_footprint.footprint(str(tmp_path)).weights_bytes == safetensors_nbytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(ValueError, match="damaged"):
        torch_footprint.footprint(str(tmp_path))


def toy_footprint(**changes) -> Footprint:
    shape = ToyModel().shape
    fields = {
        "shape": shape, "passed": {}, "passed_tokens": {}, "weights_bytes": 10**6, "element_bytes": 2, "intermediate": 512,
        "context": 100_000, "call": 2048, "decodes_history": False,
        "pair_bytes": 0, "shares_memory": False,
    }  # fmt: skip
    return Footprint(**{**fields, **changes})


def toy_fit(memory, method="spectral", profile=None, **options):
    model = toy_footprint(**options.pop("model", {}))
    return fit(model, memory, Wanted(get_method(method), **options), profile, torch_footprint.table_nbytes)


def test_the_longest_context_fits_and_a_longer_one_does_not():
    result = toy_fit(50_000_000, profile=toy_profile_of(ToyModel()), bits=(4.0, 2.0, 1.0), contexts=(1000,))
    model, limits = toy_footprint(), {row["bits"]: row for row in result["limits"]}
    assert limits[16.0]["max_prompt"] < limits[4.0]["max_prompt"] <= limits[2.0]["max_context"]
    assert 0 < limits[4.0]["max_prompt"] < model.context and limits[4.0]["limited_by"] == "memory"
    plain = Budget(model, None, 0, 0, 2)
    longest = limits[16.0]["max_context"]
    assert plain.peak_bytes(longest) <= 50_000_000 < plain.peak_bytes(longest + 32)
    for row in result["rows"]:
        held = (
            row["weights_bytes"] + row["cache_bytes"] + row["table_bytes"] + row["prefill_bytes"] + row["profile_bytes"]
        )
        assert row["peak_bytes"] == held and row["fits"] == (held <= 50_000_000)
        assert row["compression"] == row["dense_bytes"] / row["cache_bytes"]
    assert {(row["method"], row["bits"]) for row in result["rows"]} == {
        ("plain", 16.0), ("spectral", 4.0), ("spectral", 2.0), ("spectral", 1.0)
    }  # fmt: skip


def test_bits_that_a_context_needs():
    profile = toy_profile_of(ToyModel())
    # as plain, as codes at some bits, in pieces only, not at all
    contexts = {c["context"]: c for c in toy_fit(60_000_000, profile=profile, contexts=(2000, 90_000))["contexts"]}
    assert contexts[2000]["max_bits"] == 16.0
    bits = contexts[90_000]["max_bits_in_turns"]
    assert 0.25 <= bits < 16
    row = toy_fit(60_000_000, profile=profile, bits=(bits,), contexts=(90_000,))["rows"][-1]
    assert row["fits_in_turns"]
    row = toy_fit(60_000_000, profile=profile, bits=(bits + 0.4,), contexts=(90_000,))["rows"][-1]
    assert not row["fits_in_turns"]
    few = toy_fit(3_000_000, profile=profile, contexts=(90_000,))["contexts"][0]
    assert few["max_bits"] is None and few["max_bits_in_turns"] is None


def test_without_a_profile_sizes_are_about_the_same():
    with_profile = toy_fit(10**9, profile=toy_profile_of(ToyModel()), bits=(3.0,), contexts=(5000,))["rows"][-1]
    without = toy_fit(10**9, bits=(3.0,), contexts=(5000,))["rows"][-1]
    assert without["cache_bytes"] == pytest.approx(with_profile["cache_bytes"], rel=0.02)
    assert without["table_bytes"] == pytest.approx(with_profile["table_bytes"], rel=0.5)


def test_reachable_bits_are_respected():
    with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
        toy_fit(10**9, bits=(9.0,))
    with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
        toy_fit(10**9, profile=toy_profile_of(ToyModel()), bits=(0.1,))
    with pytest.raises(ValueError, match=r"2\.5, 3\.5"):
        toy_fit(10**9, method="affine", bits=(1.0,))
    rows = toy_fit(10**9, method="affine", bits=(5.0,), contexts=(2000,))["rows"]
    assert rows[-1]["bits"] == 5.0 and rows[-1]["bits_per_element"] == 4.5
    with pytest.raises(ValueError, match="weights"):
        toy_fit(10**6)
    with pytest.raises(ValueError, match="model's context"):
        toy_fit(10**9, contexts=(100_001,))
    with pytest.raises(ValueError, match="full-attention layers"):
        toy_fit(10**9, model={"shape": replace(ToyModel().shape, layers=()), "passed": {0: "sliding window"}})


@pytest.mark.parametrize("text, size", [
    ("8GB", 8 * 10**9), ("8GiB", 8 << 30), ("512MB", 512 * 10**6), ("512 mib", 512 << 20), ("1.5GB", 1_500_000_000),
    ("4096", 4096), ("3kB", 3000), ("2TB", 2 * 10**12), ("7B", 7),
])  # fmt: skip
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8XB", "GB", "-3GB", "8.5", "0", "0GB", "8GB7", "1e9", "8 G B", "infGB", "8,5GB"])
def test_no_amounts_of_memory(text):
    with pytest.raises(ValueError, match="amount of memory"):
        parse_bytes(text)


def test_command(folders, capsys):
    def run(*arguments):
        code = cli.main(["fit", "--model", str(folders["gemma3"]), "--backend", "torch", *arguments])
        return code, *capsys.readouterr()

    code, out, _ = run("--memory", "80MB", "--bits", "4,2", "--context", "1000,4000", "--json")
    result = json.loads(out)
    assert code == 0 and result["profile"] is None and len(result["rows"]) == 2 * 4  # 16 and 32 bits, 4 and 2
    assert result["passed"] == {"0": "sliding window"} and result["memory_bytes"] == 80_000_000
    assert {c["context"] for c in result["contexts"]} == {1000, 4000}
    code, out, _ = run("--memory", "80MB", "--context", "4000")
    assert code == 0 and "sliding window" in out and "4,000 tokens" in out and "No profile" in out
    for arguments, message in (
        (("--memory", "8XB"), "amount of memory"),
        (("--memory", "10kB"), "for the weights"),
        (("--memory", "1GB", "--bits", "12"), "between 0.25 and 8"),
        (("--memory", "1GB", "--context", "5000"), "model's context"),
        (("--memory", "1GB", "--method", "spectral-stored"), "for files"),
        (("--memory", "1GB", "--window", "-1"), "window"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and message in err and not out, (arguments, err)
    assert cli.main(["fit", "--model", "./nowhere", "--backend", "torch", "--memory", "1GB"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_profile_takes_memory_where_there_is_one_memory():
    profile = toy_profile_of(ToyModel())
    apart, shared = (
        toy_fit(10**9, profile=profile, model={"shares_memory": s}, contexts=(5000,))["rows"][-1] for s in (False, True)
    )
    assert apart["profile_bytes"] == 0 and shared["peak_bytes"] - apart["peak_bytes"] == shared["profile_bytes"]
    basis_set = profile.basis_sets["head.post"]
    assert shared["profile_bytes"] > basis_set.basis.nbytes + basis_set.cost.nbytes


@pytest.mark.parametrize(
    "method, bits", [("kivi", 3.0), ("turboquant", 4.5), ("svdq", 9.0), ("jarviskv", 4.0), ("think", 13.0)]
)
def test_counts_of_the_published_methods(method, bits):
    """Bytes of a layer with the blocks of its codec, filled token by token and at once."""
    from spectral_kv_core.arrays import ops
    from spectral_kv_core.cache.layer_cache import LayerCache

    toy = ToyModel()
    recipe = get_method(method)
    profile = toy_profile_of(toy, *recipe.basis_set.split(".")) if recipe.basis_set else None
    plan = make_plan(toy.shape, profile, recipe, bits)
    budget = Budget(toy_footprint(), Stored(plan, torch_footprint.table_nbytes), 4, 64, 4)
    for context in (70, 150, 1700):
        keys, values = toy.sample(0, context)
        held = 0
        for row in range(len(toy.shape.layers)):
            layer = LayerCache(ops, plan.make_codec(ops, row), 4, 64)
            layer.append(keys, values)
            held += sum(x.nbytes for x in layer.arrays())
        assert budget.cache_bytes(context) == held, context
    assert toy_fit(10**9, method=method, profile=profile, contexts=(5000,))["rows"][-1]["cache_bytes"] > 0


def test_methods_that_have_no_size_of_their_own():
    with pytest.raises(ValueError, match="keeps every token"):
        toy_fit(10**9, method="knorm")
    with pytest.raises(ValueError, match="no `bits`"):
        toy_fit(10**9, method="identity", bits=(4.0,))
    with pytest.raises(ValueError, match="profile for the method jarviskv"):
        toy_fit(10**9, method="jarviskv")
    assert {row["method"] for row in toy_fit(10**9, method="identity")["rows"]} == {"plain"}


def test_a_call_is_counted_with_its_mask_its_layers_and_its_history():
    """Each of what reading needs, beside the same without it; plain and compressed."""
    profile, context, call = toy_profile_of(ToyModel()), 20_000, 2048

    def on_top(**model):
        rows = toy_fit(10**9, profile=profile, bits=(4.0,), contexts=(context,), model=model)["rows"]
        return np.array([row["prefill_bytes"] for row in rows])

    base = on_top()
    np.testing.assert_array_equal(on_top(pair_bytes=4) - base, 4 * call * context)
    np.testing.assert_array_equal(on_top(intermediate=1512) - base, 3 * 1000 * call * 2)
    plain, spectral = on_top(decodes_history=True) - base
    decoded = 2 * context * toy_footprint().layer_elements * 2  # twice, in 16 bits
    assert plain == 0 and 0 < spectral < decoded

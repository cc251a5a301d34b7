"""`spectralkv fit` on both hosts: the bytes that it counts are those of real caches, without a weight being loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of
from hosts import only, tokens
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.arrays import ops
from spectral_kv_core.benchmark.footprint import Budget, Footprint, Wanted, fit, parse_bytes
from spectral_kv_core.benchmark.stored_bytes import Stored
from spectral_kv_core.cache.compressed_layer import leading_layers
from spectral_kv_core.cache.held_arrays import numpy_buffers
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cli import main as cli
from spectral_kv_core.codecs.registry import make_codec, make_plan
from spectral_kv_core.hosts.weights import safetensors_nbytes
from spectral_kv_core.planning.methods import get_method

CONTEXTS = {"torch": (1, 60, 83, 84, 200, 1500, 2100, 3333), "mlx": (60, 84, 1500, 2500)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("torch")  # which writes the checkpoints
    folder = tmp_path_factory.mktemp("fit")
    return {name: save_tiny_checkpoint(folder / name, name) for name in ("llama", "gemma3")}


@pytest.fixture
def footprint_of(host, folders, monkeypatch):
    """The footprint of a tiny model by its name; mlx-lm cannot read the layers of the stored Gemma 3."""
    if host.NAME == "torch":
        return lambda name: host.footprint.footprint(str(folders[name]))
    monkeypatch.setattr(host.footprint, "skeleton", lambda name, dtype: host.model(name))
    return host.footprint.footprint


@pytest.mark.parametrize("name, method, bits", [
    ("llama", "spectral", 2.0), ("llama", "spectral", 4.0), ("gemma3", "spectral", 1.5), ("llama", "spectral-dense", 3.0),
])  # fmt: skip
@pytest.mark.usefixtures("text_is_known")
def test_counts_are_those_of_a_filled_cache(host, footprint_of, tmp_path, name, method, bits):
    """Codes, exact tokens, sliding windows and tables, before and after a prompt that takes several calls."""
    model, profile, found = host.model(name), host.profile(name), footprint_of(name)
    path = profile.save(tmp_path / "profile.safetensors")  # whose arrays go, where those of the one in memory stay
    stored = Stored(make_plan(found.shape, profile, method, bits), host.footprint.table_nbytes)
    budget = Budget(found, stored, sinks=4, window=64, exact_bytes=found.element_bytes)
    passed = len(found.passed) * found.layer_elements
    spare = passed * 4 * 256 if host.NAME == "mlx" else 0  # whose rotating caches grow in steps
    for context in CONTEXTS[host.NAME]:
        cache, prompt = host.make_prompt_cache(model, path, bits, method=method), tokens(context, seed=context)
        host.backend.prefill(model, prompt[:-1] if context > 1 else prompt, cache)
        if context > 1:
            host.backend.feed(model, prompt[-1:], cache)  # a step ends the prompt
        size = host.cache_nbytes(cache)
        assert 0 <= int(size) - budget.cache_bytes(context) <= spare, context
        # of its window, transformers shows one token less
        assert 0 <= budget.dense_bytes(context) - size.dense_nbytes <= passed * 2, context
        # on MLX the decode step makes some tables of its own when it first meets a length; on torch it notes addresses
        least = size.table_nbytes * 0.75 if host.NAME == "mlx" else size.table_nbytes - noted_of_chunks(cache)
        assert least <= budget.table_bytes(context) <= size.table_nbytes, context


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "falcon_h1"])
def test_states_count_in_hybrids(host, monkeypatch, tmp_path, name):
    """What a model that is never loaded says of its states is what a plain cache then holds."""
    model = host.hybrid(name)
    if host.NAME == "torch":
        model.config.save_pretrained(tmp_path)
    else:
        monkeypatch.setattr(host.footprint, "skeleton", lambda name, dtype: model)
    found, cache = host.footprint.footprint(str(tmp_path)), host.plain_cache(model)
    assert found.held.keys() == found.passed.keys()
    host.raw_logits(model, tokens(150), cache)
    size, counted = host.cache_nbytes(cache), Budget(found, None, 0, 0, 4)
    kinds = counted.bytes_by_kind(150)
    assert kinds["state"] == size.by_kind["state"] > 0 and kinds["other"] == size.by_kind["other"]
    if host.NAME == "torch":  # mlx-lm allocates ahead
        assert kinds == size.by_kind
    assert counted.dense_bytes(150) == size.dense_nbytes
    assert kinds["state"] == counted.bytes_by_kind(3000)["state"]


def noted_of_chunks(cache) -> int:
    """Bytes that the decode steps of `cache` note of its chunks."""
    codecs = [layer.store.codec for layer in leading_layers(cache.layers)]
    kept = [x for codec in codecs for x in vars(vars(codec).get("kernel") or object).values()]
    return sum(numpy_buffers(*[x for x in kept if isinstance(x, WeakKeyDictionary)]).values())


def test_affine_and_plain_counts(host):
    model = host.model("qwen3")
    found = toy_footprint(element_bytes=4)
    shape = replace(found.shape, head_dim=64, kv_heads=1)
    profile_free = make_plan(shape, None, "affine", 4.5)
    budget = Budget(replace(found, shape=shape), Stored(profile_free, lambda plan: (0, 0)), 4, 64, 4)
    keys, values = ToyModel(64, 1, 2, layers=1).sample(0, 1500)
    layer = LayerCache(ops, make_codec(ops, profile_free, 0), 4, 64)
    layer.append(keys, values)
    assert budget.cache_bytes(1500) == len(shape.layers) * sum(x.nbytes for x in layer.arrays())
    cache = host.make_prompt_cache(model, method="identity")
    host.backend.prefill(model, tokens(300), cache)
    identity = Budget(replace(found, shape=host.model_shape(model)[0]), None, 0, 0, 4)
    assert identity.cache_bytes(300) == int(host.cache_nbytes(cache)) and identity.table_bytes(300) == 0


def test_a_staged_prompt_holds_more_until_it_ends(host, footprint_of):
    """What `prefill_bytes` adds for codes at 4 bits is what the cache really holds before the prompt ends."""
    model, profile, found = host.model("llama"), host.profile("llama"), footprint_of("llama")
    stored = Stored(make_plan(found.shape, profile, "spectral", 1.0), host.footprint.table_nbytes)
    budget, context = Budget(found, stored, 4, 64, 4), host.backend.PREFILL_CHUNK + 1000
    cache = host.make_prompt_cache(model, profile, 1.0)
    host.logits(model, tokens(context), cache, host.backend.PREFILL_CHUNK)
    held = int(host.cache_nbytes(cache))
    staged = budget.staged(context, turns=False)
    extra = stored.staging.nbytes(staged) - stored.nbytes(staged)
    assert held - budget.cache_bytes(context) == pytest.approx(extra, rel=0.01) and extra > 0
    assert budget.prefill_bytes(context) > extra


@only("torch", "MLX reads directories of quantized weights too: see below")
def test_nothing_is_loaded(host, folders):
    """Sizes and RoPE come from the configuration: the weights may even be missing."""
    model, footprint = host.new_model("llama"), host.footprint.footprint
    assert all(p.is_meta for p in host.footprint.skeleton(str(folders["llama"])).parameters())
    found = footprint(str(folders["llama"]))
    assert found.weights_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.shape.mismatch(host.model_shape(model)[0]) is None
    assert footprint(str(folders["llama"]), "bfloat16").weights_bytes == found.weights_bytes // 2
    (folders["llama"] / "model.safetensors").rename(folders["llama"] / "away")
    try:
        assert footprint(str(folders["llama"])) == found
    finally:
        (folders["llama"] / "away").rename(folders["llama"] / "model.safetensors")
    gemma = footprint(str(folders["gemma3"]))
    assert gemma.held[0].most_tokens in (31, 32) and gemma.held[0].kind == "sliding window"
    sizes = sum(p.numel() * p.element_size() for p in host.new_model("gemma3").parameters())
    assert abs(safetensors_nbytes(folders["gemma3"]) - sizes) <= sizes  # tied weights are stored once


@only("torch", "quantized weights of transformers")
def test_quantized_weights_have_the_size_of_their_files(host, folders, tmp_path):
    footprint, config = host.footprint.footprint, json.loads((folders["llama"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights in safetensors files"):
        footprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folders["llama"] / "model.safetensors").read_bytes())
    assert footprint(str(tmp_path)).weights_bytes == safetensors_nbytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(ValueError, match="damaged"):
        footprint(str(tmp_path))


@only("mlx", "quantized weights of mlx-lm")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_of_4_bit_directories_too(host, folders, dtype, tmp_path):
    """With their files, and from config.json alone."""
    from mlx.utils import tree_flatten
    from mlx_lm.convert import convert

    convert(str(folders["llama"]), str(tmp_path / "4bit"), quantize=True, q_bits=4, q_group_size=32)
    sizes = []
    for path in (folders["llama"], tmp_path / "4bit"):
        model, _ = host.load_model(path, dtype)
        found = host.footprint.footprint(str(path), dtype)
        assert found.weights_bytes == sum(p.nbytes for _, p in tree_flatten(model.parameters()))
        assert found.shape.mismatch(host.model_shape(model)[0]) is None
        assert found.element_bytes == (2 if dtype else 4)
        shutil.copy(path / "config.json", tmp_path / "config.json")
        assert host.footprint.footprint(str(tmp_path), dtype) == found
        sizes.append(found.weights_bytes)
    assert sizes[1] < sizes[0] / 2


@only("mlx", "quantized weights of mlx-lm")
def test_a_foreign_quantization_needs_its_files(host, folders, tmp_path):
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ValueError, match="Download the model first"):
        host.footprint.footprint(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing at"):
        host.footprint.footprint("./nowhere")


def test_command(host, folders, capsys):
    family = "gemma3" if host.NAME == "torch" else "llama"  # mlx-lm wants layers of other kinds to alternate

    def run(*arguments):
        code = cli.main(["fit", "--model", str(folders[family]), "--backend", host.NAME, *arguments])
        return code, *capsys.readouterr()

    code, out, _ = run("--memory", "80MB", "--bits", "4,2", "--context", "1000,4000", "--json")
    result = json.loads(out)
    assert code == 0 and result["profile"] is None and len(result["rows"]) == 2 * 4  # 16 and 32 bits, 4 and 2
    passed = {"0": "sliding window"} if family == "gemma3" else {}
    assert result["passed"] == passed and result["memory_bytes"] == 80_000_000 and result["backend"] == host.NAME
    assert {c["context"] for c in result["contexts"]} == {1000, 4000}
    code, out, _ = run("--memory", "80MB", "--context", "4000")
    assert code == 0 and ("sliding window" in out) == bool(passed)
    assert "4,000 tokens" in out and "No profile" in out
    code, out, _ = run("--memory", "80MB", "--json")
    bits = {row["bits"] for row in json.loads(out)["rows"]}
    assert code == 0 and bits == {32.0, 16.0, 4.0, 3.0, 2.0, 1.0}
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
    assert cli.main(["fit", "--model", "./nowhere", "--backend", host.NAME, "--memory", "1GB"]) == 2
    message = capsys.readouterr().err
    assert "./nowhere" in message and ("config.json" in message or host.NAME == "mlx")


# --- counted for a toy model


def toy_footprint(**changes) -> Footprint:
    shape = ToyModel().shape
    fields = {
        "shape": shape, "passed": {}, "held": {}, "weights_bytes": 10**6, "element_bytes": 2, "intermediate": 512,
        "context": 100_000, "call": 2048, "decodes_history": False,
        "pair_bytes": 0, "shares_memory": False,
    }  # fmt: skip
    return Footprint(**{**fields, **changes})


def toy_fit(host, memory, method="spectral", profile=None, **options):
    model = toy_footprint(**options.pop("model", {}))
    return fit(model, memory, Wanted(get_method(method), **options), profile, host.footprint.table_nbytes)


def test_the_longest_context_fits_and_a_longer_one_does_not(host):
    result = toy_fit(host, 50_000_000, profile=toy_profile_of(ToyModel()), bits=(4.0, 2.0, 1.0), contexts=(1000,))
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


def test_bits_that_a_context_needs(host):
    profile = toy_profile_of(ToyModel())
    # as plain, as codes at some bits, in pieces only, not at all
    contexts = {
        c["context"]: c for c in toy_fit(host, 60_000_000, profile=profile, contexts=(2000, 90_000))["contexts"]
    }
    assert contexts[2000]["max_bits"] == 16.0
    bits = contexts[90_000]["max_bits_in_turns"]
    assert 0.25 <= bits < 16
    row = toy_fit(host, 60_000_000, profile=profile, bits=(bits,), contexts=(90_000,))["rows"][-1]
    assert row["fits_in_turns"]
    row = toy_fit(host, 60_000_000, profile=profile, bits=(bits + 0.4,), contexts=(90_000,))["rows"][-1]
    assert not row["fits_in_turns"]
    few = toy_fit(host, 3_000_000, profile=profile, contexts=(90_000,))["contexts"][0]
    assert few["max_bits"] is None and few["max_bits_in_turns"] is None


def test_without_a_profile_sizes_are_about_the_same(host):
    with_profile = toy_fit(host, 10**9, profile=toy_profile_of(ToyModel()), bits=(3.0,), contexts=(5000,))["rows"][-1]
    without = toy_fit(host, 10**9, bits=(3.0,), contexts=(5000,))["rows"][-1]
    assert without["cache_bytes"] == pytest.approx(with_profile["cache_bytes"], rel=0.02)
    assert without["table_bytes"] == pytest.approx(with_profile["table_bytes"], rel=0.5)


def test_reachable_bits_are_respected(host):
    with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
        toy_fit(host, 10**9, bits=(9.0,))
    with pytest.raises(ValueError, match=r"between 0\.25 and 8"):
        toy_fit(host, 10**9, profile=toy_profile_of(ToyModel()), bits=(0.1,))
    with pytest.raises(ValueError, match=r"2\.5, 3\.5"):
        toy_fit(host, 10**9, method="affine", bits=(1.0,))
    rows = toy_fit(host, 10**9, method="affine", bits=(5.0,), contexts=(2000,))["rows"]
    assert rows[-1]["bits"] == 5.0 and rows[-1]["bits_per_element"] == 4.5
    with pytest.raises(ValueError, match="weights"):
        toy_fit(host, 10**6)
    with pytest.raises(ValueError, match="model's context"):
        toy_fit(host, 10**9, contexts=(100_001,))
    with pytest.raises(ValueError, match="full-attention layers"):
        toy_fit(host, 10**9, model={"shape": replace(ToyModel().shape, layers=()), "passed": {0: "sliding window"}})


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


def test_a_profile_takes_memory_where_there_is_one_memory(host):
    profile = toy_profile_of(ToyModel())
    apart, shared = (
        toy_fit(host, 10**9, profile=profile, model={"shares_memory": s}, contexts=(5000,))["rows"][-1]
        for s in (False, True)
    )
    assert apart["profile_bytes"] == 0 and shared["peak_bytes"] - apart["peak_bytes"] == shared["profile_bytes"]
    basis_set = profile.basis_sets["head.post"]
    assert shared["profile_bytes"] > basis_set.basis.nbytes + basis_set.cost.nbytes


@pytest.mark.parametrize(
    "method, bits", [("kivi", 3.0), ("turboquant", 4.5), ("svdq", 9.0), ("jarviskv", 4.0), ("think", 13.0)]
)
def test_counts_of_the_published_methods(host, method, bits):
    """Bytes of a layer with the blocks of its codec, filled token by token and at once."""
    toy = ToyModel()
    recipe = get_method(method)
    profile = toy_profile_of(toy, *recipe.basis_set.split(".")) if recipe.basis_set else None
    plan = make_plan(toy.shape, profile, recipe, bits)
    budget = Budget(toy_footprint(), Stored(plan, host.footprint.table_nbytes), 4, 64, 4)
    for context in (70, 150, 1700):
        keys, values = toy.sample(0, context)
        held = 0
        for row in range(len(toy.shape.layers)):
            layer = LayerCache(ops, plan.make_codec(ops, row), 4, 64)
            layer.append(keys, values)
            held += sum(x.nbytes for x in layer.arrays())
        assert budget.cache_bytes(context) == held, context
    assert toy_fit(host, 10**9, method=method, profile=profile, contexts=(5000,))["rows"][-1]["cache_bytes"] > 0


def test_methods_that_have_no_size_of_their_own(host):
    with pytest.raises(ValueError, match="keeps every token"):
        toy_fit(host, 10**9, method="knorm")
    with pytest.raises(ValueError, match="no `bits`"):
        toy_fit(host, 10**9, method="identity", bits=(4.0,))
    with pytest.raises(ValueError, match="profile for the method jarviskv"):
        toy_fit(host, 10**9, method="jarviskv")
    assert {row["method"] for row in toy_fit(host, 10**9, method="identity")["rows"]} == {"plain"}


def test_a_call_is_counted_with_its_mask_its_layers_and_its_history(host):
    """Each of what reading needs, beside the same without it; plain and compressed."""
    profile, context, call = toy_profile_of(ToyModel()), 20_000, 2048

    def on_top(**model):
        rows = toy_fit(host, 10**9, profile=profile, bits=(4.0,), contexts=(context,), model=model)["rows"]
        return np.array([row["prefill_bytes"] for row in rows])

    base = on_top()
    np.testing.assert_array_equal(on_top(pair_bytes=4) - base, 4 * call * context)
    np.testing.assert_array_equal(on_top(intermediate=1512) - base, 3 * 1000 * call * 2)
    plain, spectral = on_top(decodes_history=True) - base
    decoded = 2 * context * toy_footprint().layer_elements * 2  # twice, in 16 bits
    assert plain == 0 and 0 < spectral < decoded

"""Two-layer groups: which layers pair, what a lone one gets, files, and what only transformers asks of a live cache."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of
from hosts import only
from tolerances import assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.cache.compressed_layer import leading_layers
from spectral_kv_core.cache.prompt_cache_file import PromptFile
from spectral_kv_core.cli import main as cli
from spectral_kv_core.codecs.chunk import join_layers, split_layers
from spectral_kv_core.codecs.entropy_coded import EntropyCodec
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.evaluation.run import plan_jobs
from spectral_kv_core.evaluation.settings import Settings
from spectral_kv_core.planning.budget import elements_per_token
from spectral_kv_core.planning.methods import BASIS_SETS, Method, get_method
from spectral_kv_core.profile.basis_set import PAIRS
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.profile.store import cached_profile_path

pytest.importorskip("constriction")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_checkpoint import save_tiny_checkpoint  # noqa: E402
from torch_models import CONFIGS, SIZES, ByteTokenizer, tiny_model, tokens  # noqa: E402

from spectral_kv_torch import (  # noqa: E402
    SpectralProfiler,
    cache_nbytes,
    load_prompt_cache,
    make_prompt_cache,
)
from spectral_kv_torch import generation as backend  # noqa: E402
from spectral_kv_torch import ops as torch_ops  # noqa: E402

METHOD, LIVE = "spectral-stored-pairs", "spectral-dense-pairs"
MODEL = ToyModel(layers=3, rotated=True)  # a pair and a lone layer
SHAPE = MODEL.shape
TOKENS = 512
TEXT = [bytes(b - 3 for b in tokens(1024, seed=9 + i)[0].tolist()).decode("latin-1") for i in range(2)]


@pytest.mark.parametrize(
    "layers, groups",
    [
        ((0, 1, 2, 3), ((0, 1), (2, 3))),
        ((0, 1, 2), ((0, 1), (2,))),
        ((1, 2, 5, 7, 8, 9), ((1, 2), (5,), (7, 8), (9,))),
        ((2, 5, 6), ((2,), (5, 6))),
    ],
)
def test_which_layers_pair(layers, groups):
    shape = replace(SHAPE, num_layers=12, layers=layers)
    assert shape.layer_groups("layer2") == groups
    assert shape.layer_groups("layer") == tuple((layer_idx,) for layer_idx in layers)


@pytest.mark.parametrize("layers", [(0,), (5, 11, 17)], ids=["one", "Gemma 3"])
def test_nothing_to_pair_is_said(layers):
    shape = replace(SHAPE, num_layers=18, layers=layers)
    with pytest.raises(
        ValueError, match=rf"compressible layers {', '.join(map(str, layers))}\. Use spectral-dense or spectral-stored"
    ):
        shape.layer_groups("layer2")
    profile = Profile(shape, "toy", {}, toy_profile_of(MODEL, "layer", "pre").basis_sets)
    with pytest.raises(ValueError, match="follow each other"):  # calibrating again would not help
        make_plan(shape, profile, METHOD, 1)


def test_what_cannot_take_two_layers_says_so():
    with pytest.raises(
        ValueError, match="Expected the codec spectral or entropy-coded for the group layer2, received 'affine'"
    ):
        Method("m", "affine", "", "", group="layer2")
    with pytest.raises(ValueError, match=r"knorm\+spectral-dense-pairs codes layers together. Choose spectral-dense"):
        get_method(f"knorm+{LIVE}")
    assert PAIRS not in BASIS_SETS and get_method(LIVE).live and not get_method(METHOD).live


def test_a_lone_layer_gets_what_it_has_alone():
    pairs, alone = (toy_profile_of(MODEL, g, "pre").basis_sets[f"{g}.pre"] for g in ("layer2", "layer"))
    assert pairs.mean.shape == (2, 1, 512) and alone.mean.shape == (3, 1, 256)
    for name in ("mean", "weight", "basis", "variance", "sensitivity", "cost"):
        ours, theirs = getattr(pairs, name)[1], getattr(alone, name)[2]
        own = ours[tuple(slice(n) for n in theirs.shape)]
        rest = ours.copy()
        rest[tuple(slice(n) for n in theirs.shape)] = 0
        if name == "cost":  # levels are those of all layers together
            np.testing.assert_allclose(own, theirs, rtol=0.1, atol=1e-3 * theirs.max())
        else:
            np.testing.assert_array_equal(own, theirs, err_msg=name)
        assert np.all(rest[rest != 0] == 1) and (name == "weight" or not rest.any())


def sample(layers, seed=1):
    return [MODEL.sample(seed, TOKENS, layer=layer_idx) for layer_idx in layers]


def test_joined_layers_come_apart(xp):
    layers = [tuple(map(xp.asarray, layer)) for layer in sample((0, 1, 2))]
    joined = join_layers(xp, layers)
    assert joined[0].shape == (1, 6, TOKENS, 64)
    for got, expected in zip(split_layers(*joined, 3), layers, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(xp.to_numpy(a), xp.to_numpy(b))


@pytest.mark.parametrize("row", [0, 1], ids=["pair", "lone"])
def test_codec_of_a_row(xp, row):
    errors = []
    for bits in (0.5, 2, 6):
        plan = make_plan(SHAPE, toy_profile_of(MODEL, "layer2", "pre"), METHOD, bits)
        layers = sample(plan.layer_groups[row])
        codec = EntropyCodec(xp, plan, row)
        chunk = codec.encode(*join_layers(xp, [tuple(map(xp.asarray, layer)) for layer in layers]), 0)
        got = split_layers(*map(xp.to_numpy, codec.decode(chunk)), len(layers))
        errors.append([relative_rms(a, b) for a, b in zip(np.concatenate(got), np.concatenate(layers), strict=True)])
        reference = EntropyCodec(ops, plan, row)
        moved = replace(chunk, arrays=tuple(map(xp.to_numpy, chunk.arrays)))
        expected = split_layers(*reference.decode(moved), len(layers))
        assert_close("decoded", np.concatenate(got), np.concatenate(expected), limit=1e-5)
    assert np.all(np.diff(errors, axis=0) < 0) and np.max(errors[-1]) < 0.03, errors


def test_a_row_rounds_by_the_queries_of_its_layers():
    profile = toy_profile_of(MODEL, "layer2", "pre")
    profile = replace(profile, shape=replace(SHAPE, num_layers=9, layers=(3, 4, 7)))
    plan, queries = make_plan(profile.shape, profile, METHOD, 1), profile.queries
    for row, numbers in enumerate(([0, 1], [2])):
        statistics = plan.query_statistics(row)
        for name in ("mean", "root", "amplitude"):
            np.testing.assert_array_equal(statistics[f"query_{name}"], np.concatenate(getattr(queries, name)[numbers]))


def test_two_layers_together_cost_less():
    """The layers of the toy model move together, as neighbors do."""
    errors = {}
    for method, group in ((METHOD, "layer2"), ("spectral-stored", "layer")):
        plan = make_plan(SHAPE, toy_profile_of(MODEL, group, "pre"), method, 0.6)
        stored, errors[method] = 0, []
        for row, group in enumerate(plan.layer_groups):
            layers, codec = sample(group), EntropyCodec(ops, plan, row)
            chunk = codec.encode(*join_layers(ops, layers), 0)
            stored += 8 * chunk.arrays[0].nbytes
            errors[method] += [
                relative_rms(a, b)
                for a, b in zip(
                    np.concatenate(split_layers(*codec.decode(chunk), len(layers))), np.concatenate(layers), strict=True
                )
            ]
        assert 0.5 < stored / (TOKENS * elements_per_token(SHAPE)) < 0.75
    assert np.mean(errors[METHOD][:4]) < 0.8 * np.mean(errors["spectral-stored"][:4])


@functools.cache
def model_and_profile(name: str):
    model = tiny_model(name)
    profiler = SpectralProfiler(tokens=2048, document=1024, progress=False, pairs=True)
    return model, profiler.profile_from_model(model, ByteTokenizer(), TEXT, name=name)


def read(name: str, count: int = 300):
    """A plain cache after `count` tokens, and these."""
    model, _ = model_and_profile(name)
    cache, ids = backend.plain_cache(model), tokens(count)[0].tolist()
    backend.feed(model, ids, cache)
    return cache, ids


def save(path, name: str, cache, ids=None, bits=2.0, **options):
    model, profile = model_and_profile(name)
    return backend.save_prompt_cache(
        path, cache, ids, model=model, method=METHOD, bits=bits, profile=profile, **options
    )


def layers_of(cache) -> list[tuple]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def same(cache, other) -> None:
    for ours, theirs in zip(layers_of(cache), layers_of(other), strict=True):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs))


def test_from_and_to_live_methods(tmp_path):
    model, profile = model_and_profile("llama")
    live = make_prompt_cache(model, profile, 6.0)
    mask = (torch.arange(200)[None] >= torch.tensor([[0], [70], [0]])).long()
    with torch.no_grad():
        model(tokens(200, batch=3), attention_mask=mask, past_key_values=live)
    path = save(tmp_path / "c", "llama", live, bits=6.0)
    assert PromptFile.load(path).padding == [0, 70, 0]
    again = load_prompt_cache(path, model, profile, method="identity")[0]
    plain = load_prompt_cache(path, model, profile)[0]
    assert again.layers[2].store.padding == [0, 70, 0]
    for layer_idx, (layer, other) in enumerate(zip(live.layers, again.layers)):
        for a, b, c in zip(layer.keys_and_values(), other.keys_and_values(), layers_of(plain)[layer_idx]):
            assert torch.equal(b, c) and 0 < relative_rms(b, a) < 0.1
    other = load_prompt_cache(path, model, profile, method="spectral-dense", bits=3.0)[0]
    assert other.plan.bits == 3.0 and other.layers[1].store.padding_groups[0].sealed > 0


def test_the_file(tmp_path):
    """Layers of a row lie together under the first; anything else is refused."""
    model, profile = model_and_profile("llama")
    path = save(tmp_path / "c", "llama", *read("llama"))
    file = PromptFile.load(path)
    assert file.layers[1] == {} and not any(name.startswith("layers/1/") for name in file.arrays)
    assert file.arrays["layers/0/padding_groups/0/keys"].shape == (1, 4, 76, 16)
    assert file.arrays["layers/2/padding_groups/0/keys"].shape == (1, 2, 76, 16)
    file.arrays["layers/0/padding_groups/0/keys"] = np.ascontiguousarray(
        file.arrays["layers/0/padding_groups/0/keys"][:, :2]
    )
    file.save(path)
    with pytest.raises(ValueError, match=r"Expected .*layers/0/padding_groups/0/keys"):
        load_prompt_cache(path, model, profile)


def test_a_profile_without_pairs_says_how_to_get_them():
    _, profile = model_and_profile("llama")
    usual = replace(profile, basis_sets={name: profile.basis_sets[name] for name in BASIS_SETS})
    with pytest.raises(
        ValueError, match=r"basis set layer2\.pre, .* has head\.post, layer\.pre\. .*--model llama --pairs"
    ):
        make_plan(profile.shape, usual, METHOD, 1)
    for method in ("spectral", "spectral-dense", "spectral-stored"):
        plans = [make_plan(profile.shape, p, method, 2) for p in (profile, usual)]
        assert plans[0].hash == plans[1].hash


def test_pairs_are_calibrated_beside_what_is_there(tmp_path, monkeypatch):
    """A profile that is there and lacks them stays, since files need it; the new one serves every method."""
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path))
    model, profile = model_and_profile("llama")
    usual = replace(profile, basis_sets={name: profile.basis_sets[name] for name in BASIS_SETS})
    before = usual.save(cached_profile_path(profile.shape)).read_bytes()
    profiler = SpectralProfiler(tokens=512, document=512, progress=False)
    found = [profiler.profile_for(model, get_method(METHOD), None, ByteTokenizer())[2] for _ in range(2)]
    assert [set(p.basis_sets) for p in found] == 2 * [{*BASIS_SETS, PAIRS}]
    assert cached_profile_path(profile.shape).read_bytes() == before
    assert found[1].path == str(cached_profile_path(profile.shape, PAIRS))
    assert set(profiler.profile_for(model, get_method("spectral"))[2].basis_sets) == {*BASIS_SETS}


def test_evaluation_calibrates_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path))
    small = functools.partial(SpectralProfiler, tokens=512, document=512, progress=False)
    monkeypatch.setattr(backend, "SpectralProfiler", small)
    settings = Settings(methods=(METHOD, "spectral-stored"), bits=(1.0,))
    jobs, skipped = plan_jobs(backend, model_and_profile("llama")[0], ByteTokenizer(), settings)
    assert [job.method.name for job in jobs] == [METHOD, "spectral-stored"] and not skipped
    assert [PAIRS in job.plan.profile.basis_sets for job in jobs] == [True, False]


def test_a_model_with_nothing_to_pair(monkeypatch, tmp_path):
    alternating = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=32, layer_types=alternating)
    monkeypatch.setitem(CONFIGS, "gemma3", lambda: config)
    model = tiny_model("gemma3")
    with pytest.raises(ValueError, match="compressible layers 0, 2. Use spectral-dense or spectral-stored"):
        SpectralProfiler(tokens=512, progress=False, pairs=True).profile_from_model(model, ByteTokenizer(), TEXT)
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="compressible layers 0, 2. Use spectral-dense or spectral-stored"):
        backend.save_prompt_cache(tmp_path / "c", backend.plain_cache(model), model=model, method=METHOD)


def live(name: str, bits: float = 3.0, **options):
    model, profile = model_and_profile(name)
    return make_prompt_cache(model, profile, bits, method=LIVE, **options)


def logits_of(model, ids, cache, step=None, **options):
    with torch.no_grad():
        parts = ids.split(step or ids.shape[1], dim=1)
        return torch.cat([model(part, past_key_values=cache, **options).logits for part in parts], dim=1)


@only("torch", "only PyTorch can go without our C kernels")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("step", [1, 5, 40], ids=["one by one", "few", "a prompt that goes on"])
def test_attention_without_kernels_is_that_over_what_is_decoded(name, step, monkeypatch):
    monkeypatch.setattr(torch_ops, "kernels", None)
    model, _ = model_and_profile(name)
    cache, more = live(name), tokens(40 if step == 40 else 8, seed=4)  # before the next block is full
    logits_of(model, tokens(300), cache)
    plain = backend.decode_cache(cache, model)
    assert any(
        len(layer.layers) == 2 and layer.store.padding_groups[0].sealed == 224 for layer in leading_layers(cache.layers)
    )
    torch.testing.assert_close(
        logits_of(model, more, cache, step), logits_of(model, more, plain, step), atol=1e-4, rtol=1e-3
    )


@only("torch", "mlx-lm never selects rows of a cache")
def test_crop_copy_and_selection():
    model, _ = model_and_profile("llama")
    cache, whole = live("llama", 8.0), live("llama", 8.0)
    ids, tail = tokens(330, batch=2), tokens(6, seed=6)
    logits_of(model, ids[:, :300], cache), logits_of(model, ids[:, :300], whole)
    logits_of(model, ids[:, 300:], cache, 1)
    cache.crop(-30)
    assert cache.get_seq_length() == 300
    other = copy.deepcopy(cache)
    assert other.layers[1].first is other.layers[0] is not cache.layers[0] and cache_nbytes(other) == cache_nbytes(
        cache
    )
    assert other.is_initialized
    other.batch_select_indices(torch.tensor([1, 1, 0]))
    for row in leading_layers(other.layers):
        for held in row.store.dense():
            assert torch.equal(held[0], held[1])
    whole.reorder_cache(torch.tensor([1, 0]))
    got = logits_of(model, tail.repeat(3, 1), other, 1)
    expected = logits_of(model, tail.repeat(2, 1), whole, 1)
    torch.testing.assert_close(got[1:], expected, atol=0.05, rtol=0.05)  # 14 tokens were sealed and decoded again
    torch.testing.assert_close(got[0], got[1], atol=1e-3, rtol=1e-3)
    assert cache.get_seq_length() == 300 and other.get_seq_length() == 306
    other.reset()
    assert other.get_seq_length() == 0


@only("torch", "mlx-lm has no beam search")
def test_generate_of_transformers():
    """Beam search reorders rows, speculation crops; an exact window of all tokens ends where the plain cache does."""
    model, _ = model_and_profile("llama")
    ids, options = tokens(120), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        kwargs = {"attention_mask": torch.ones_like(ids), **options, **more}
        expected = model.generate(ids, past_key_values=backend.plain_cache(model), **kwargs)
        exact, coded = live("llama", 8.0, window=128), live("llama", 8.0, window=32)
        assert torch.equal(model.generate(ids, past_key_values=exact, **kwargs), expected)
        assert model.generate(ids, past_key_values=coded, **kwargs).shape == expected.shape
        assert coded.layers[0].store.padding_groups[0].sealed >= 80 and coded.is_initialized


def test_layers_out_of_order_are_refused():
    cache = live("llama")
    vectors = torch.zeros(1, 2, 3, 16)
    cache.update(vectors, vectors, 1)
    with pytest.raises(ValueError, match="Expected layer number 0 of those that are coded together, received number 1"):
        cache.finalize()


@pytest.mark.slow
def test_command_line(capsys, tmp_path):
    def run(*arguments, code=0):
        got = cli.main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert got == code, captured.err
        return captured.err if code else json.loads(captured.out)

    model = save_tiny_checkpoint(tmp_path / "model")
    text = tmp_path / "cups.txt"
    text.write_text("".join(f"There were {i} cups on a table, and nobody knew whose. " for i in range(40)))
    common = ["--model", model, "--backend", "torch"]
    small = ["--text", text, "--tokens", "1024", "--document", "512", "--quiet"]
    usual = run("profile", *common, *small, "--output", tmp_path / "usual")
    pairs = run("profile", *common, *small, "--output", tmp_path / "pairs", "--pairs")
    assert pairs["bytes"] > usual["bytes"]
    given = ["--profile", tmp_path / "pairs"]
    shown = run("inspect", tmp_path / "pairs", "--method", METHOD, "--bits", "1")
    plan = shown["plan"]
    assert plan["layers"] == [[0, 1], 2] and 0.9 < plan["bits_per_element"] <= 1 and PAIRS in shown["basis_sets"]
    assert (2 * plan["key_bits"][0] + plan["key_bits"][1]) / 3 == pytest.approx(plan["bits_per_element"], abs=1e-3)
    cli.main(["inspect", str(tmp_path / "pairs"), "--method", METHOD])
    assert "\n 0, 1 " in capsys.readouterr().out
    prompt = [
        "cache-prompt",
        *common,
        "--prompt-file",
        text,
        "--method",
        METHOD,
        "--bits",
        "1",
        "--output",
        tmp_path / "c",
    ]
    made = run(*prompt, *given)
    assert made["method"] == METHOD and made["compression"] > 3
    assert run("inspect", tmp_path / "c")["bytes_by_kind"] == made["bytes_by_kind"]
    after = [
        "generate",
        *common,
        "--prompt-cache-file",
        tmp_path / "c",
        "--prompt",
        "Whose?",
        "--max-tokens",
        "4",
        *given,
    ]
    assert run(*after, "--compare", "--ignore-eos")["file_method"] == METHOD
    settings = ["--bits", "1,4", "--text", text, "--prefix", "200", "--scored", "8", "--documents", "1", *given]
    rows = run("eval", *common, "--methods", f"spectral-stored,{METHOD}", *settings, "--output", tmp_path / "out")[
        "rows"
    ]
    kl = {(row["method"], row["bits"], row["task"]): row["kl"] for row in rows}
    assert len(kl) == 8 and all(row["sealed_bits"] <= row["bits"] for row in rows)
    assert all(kl[METHOD, 1.0, task] > kl[METHOD, 4.0, task] > 0 for task in ("text", "copy"))
    assert "--pairs" in run(*prompt, "--profile", tmp_path / "usual", code=2)
    assert "for files" in run("generate", *common, "--prompt", "Hi", "--method", METHOD, *given, code=2)
    spoken = run("generate", *common, "--prompt-file", text, "--method", LIVE, "--max-tokens", "4", *given)
    assert spoken["method"] == LIVE and spoken["compression"] > 2

"""`spectralkv bench` on both hosts: what is timed, ratios that follow, synthetic plans, errors before any work."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from bench_rows import MODEL_KEYS, TINY, check_reader, check_result
from hosts import only, tokens
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.transform import band_sizes
from spectral_kv_core.benchmark import bench as core
from spectral_kv_core.benchmark import synthetic
from spectral_kv_core.benchmark.machine import process_peak_bytes
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.cli import main as cli
from spectral_kv_core.cli import tables as report
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.codecs.spectral import SpectralCodec
from spectral_kv_core.planning.budget import SEAL
from spectral_kv_core.planning.methods import METHODS
from spectral_kv_core.profile.basis_set import HISTOGRAM_LIMIT
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.profile.store import packaged_profiles


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)


def plan_of(name: str, bits: float, plan: str, shape: str = "tiny"):
    shape, method = synthetic.synthetic_shape(shape), METHODS[name]
    return synthetic.synthetic_plan(shape, synthetic.synthetic_profile(shape, [method]), method, bits, plan)


@pytest.mark.parametrize("name", ["spectral", "spectral-dense"])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_flat_plan_has_every_coefficient_at_its_width(name, bits):
    plan = plan_of(name, bits, "flat")
    assert np.all(plan.widths == bits) and plan.bits_per_element == bits and synthetic.kept_share(plan) == 1.0
    codec = SpectralCodec(ops, plan, 0)
    assert codec.bits == [bits] and codec.rank == plan.basis_set.rank
    assert len(codec.numbers[0]) == plan.basis_set.block * 2 * 2 * 32  # frequencies, sides, heads, channels


def test_a_single_layer_has_no_neighbor():
    with pytest.raises(ValueError, match=r"compressible layers 0\. Use spectral-dense"):
        plan_of("spectral-dense-pairs", 2, "flat")


@pytest.mark.parametrize("name", ["spectral", "spectral-dense"])
def test_a_typical_plan_has_the_histogram_of_a_real_one(name):
    profile = Profile.load(packaged_profiles()[0])
    real = make_plan(profile.shape, profile, METHODS[name], 2.0)
    made = plan_of(name, 2.0, "typical", "smollm2-135m")
    sides = 2 if name == "spectral" else 1
    pairs = zip(np.split(real.widths, sides, axis=1), np.split(made.widths, sides, axis=1))
    for theirs, ours in pairs:
        for band in range(theirs.shape[-1]):
            share, got = (
                np.bincount(w[..., band].reshape(-1), minlength=9) / w[..., band].size for w in (theirs, ours)
            )
            np.testing.assert_allclose(got, share, atol=1 / ours[..., band].size)
    assert made.bits_per_element == pytest.approx(real.bits_per_element, abs=0.02)
    sizes = band_sizes(16)
    stored = float(((real.widths > 0) * sizes).sum() / (real.widths[..., 0].size * 16))
    assert synthetic.kept_share(made) == pytest.approx(stored, abs=0.01) and stored < 0.95
    assert np.all(np.diff(made.widths[0].astype(int), axis=1) <= 0)  # early components have the larger widths


def test_the_synthetic_profile_fits_the_vectors():
    """Coefficients of unit variance, tables for them, and codes that lose what a Gaussian loses at 2 bits."""
    plan = plan_of("spectral", 2, "flat")
    queries, keys, values = synthetic.synthetic_vectors(plan.shape, 512)
    assert queries.shape == (1, 4, 512, 32) and keys.shape == values.shape == (1, 2, 512, 32)
    codec = SpectralCodec(ops, plan, 0)
    z, weights = codec.coefficients(keys, values, 0)
    assert z.std() == pytest.approx(1, abs=0.02) and weights is not None  # tokens are weighed, as with a real profile
    statistics, scaled = plan.profile.queries, queries[0, 0] / np.sqrt(32)
    assert np.sum(statistics.root[0, 0] @ statistics.root[0, 0]) == pytest.approx(np.sum(scaled.var(0)), rel=0.1)
    length = np.hypot(scaled[:, :16], scaled[:, 16:]).mean()
    assert statistics.amplitude.mean() == pytest.approx(length, rel=0.1) and not statistics.mean.any()
    basis = plan.basis_set.basis
    np.testing.assert_allclose(np.swapaxes(basis, -1, -2) @ basis, np.broadcast_to(np.eye(32), basis.shape), atol=1e-5)
    decoded, _ = codec.decode(codec.encode(keys, values, 0))
    assert 0.1 < np.mean((decoded - keys) ** 2) < 0.2
    assert plan.basis_set.histogram[0] > plan.basis_set.histogram[-1] and HISTOGRAM_LIMIT > 6


class FakeBench:
    """Steps that take known seconds; the one of our cache that seals takes 17 times as long."""

    HOST_QUANTIZED, SWEEP_BYTES = "none", 8_000_000_000

    def __init__(self):
        self.seconds, self.made, self.log = {"host": 6e-3, "gqa": 4e-3, "grouped": 3e-3}, 0, ()

    def sweep(self):
        self.log = (*self.log, "sweep")
        return 0.5

    def threads(self):
        return 3

    def BenchLayer(self, shape, queries, keys, values, dtype):
        assert keys.shape == (1, 2, 100 + SEAL, 32)

        def step(name, seconds):
            def run():
                self.log = (*self.log, name)
                return next(seconds)

            return run

        def plain(name):
            return lambda: step(name, iter(lambda: self.seconds[name], None))

        def quantized():
            raise ImportError("Expected a package,\n received none.")

        def compressed(plan, sinks, window):
            self.made += 1
            return step("ours", iter([1e-3] * (SEAL - 1) + [17e-3])), CacheSize(
                {"codes": 900, "exact": 100}, 68, 4000, 0
            )

        ways = {name: plain(name) for name in self.seconds}
        return SimpleNamespace(**ways, quantized=quantized, compressed=compressed, plain_bytes=9000)


def test_ratios_follow_from_the_times(monkeypatch):
    peaks = {None: 7, "spectral": 5}
    monkeypatch.setattr(core, "fresh_peak", lambda **configuration: peaks[configuration["method"]])
    bench, settings = FakeBench(), core.Settings(("spectral",), (100,), 2, "tiny", "flat")
    result = core.bench_layer(bench, "torch", settings, "float32")
    (row,) = result["rows"]
    assert row["attention_us"] == pytest.approx(2000) and row["sealing_us"] == pytest.approx(1000)
    assert (row["ratio_to_dense"], row["ratio_to_host"], row["ratio_to_gqa"]) == pytest.approx((1.5, 3, 2))
    assert (
        row["ratio_to_host_quantized"] is None and row["host_quantized_reason"] == "Expected a package, received none."
    )
    assert (row["bytes"], row["plain_bytes"], row["threads"], row["bits"]) == (1000, 9000, 3, 2)
    assert (row["peak_bytes"], row["plain_peak_bytes"]) == (5, 7)
    assert row["read_gb_per_s"] == pytest.approx(1000 / 2e-3 / 1e9) and result["machine_read_gb_per_s"] == 16
    assert bench.made == core.REPEATS + 1  # a fresh cache every round
    assert bench.log[:8] == ("sweep", "host", "sweep", "gqa", "sweep", "grouped", "sweep", "ours")
    assert bench.log.count("ours") == 1 + core.REPEATS * SEAL


def test_contexts_that_a_model_cannot_go_on_from():
    settings = core.Settings(("spectral",), (1024, 4096), 2.0)
    assert settings.within(None, drop=False) == settings.within(9000, drop=False) == settings
    assert settings.within(4096, drop=True).contexts == (1024,)
    for limit, drop in ((4096, False), (1000, True)):
        with pytest.raises(ValueError, match="below the model's context"):
            settings.within(limit, drop)


WRONG = [
    ("shape among", "--synthetic", "llama"),
    ("--bits of 1, 2, 3", "--synthetic", "tiny", "--bits", "2.5"),
    ("--bits of 1, 2, 3", "--synthetic", "tiny", "--bits", "7"),
    ("at least 84 tokens", "--synthetic", "tiny", "--context", "1024,40"),
    ("whole numbers", "--synthetic", "tiny", "--context", "1k"),
    ("live cache", "--synthetic", "tiny", "--methods", "spectral-stored"),
    ("method among", "--methods", "spectrel"),
    ("keep every token", "--methods", "spectral,triattention"),
    ("multiple of the group", "--synthetic", "tiny", "--methods", "affine"),
    ("between 0.25 and 8", "--synthetic", "tiny", "--plan", "typical", "--bits", "9"),
    ("with --synthetic", "--model", "demo", "--plan", "flat"),
    ("bits above 0", "--model", "demo", "--bits", "0"),
    ("not allowed with", "--model", "demo", "--synthetic", "tiny"),
]


@pytest.mark.parametrize(("message", "arguments"), [(m, a) for m, *a in WRONG])
def test_wrong_use_is_told_before_any_work(capsys, monkeypatch, message, arguments):
    monkeypatch.setattr("spectral_kv_core.cli.bench.load_backend", lambda *a: pytest.fail("work began"))
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err.strip().splitlines()[-1] and not captured.out


# --- on the hosts


@pytest.fixture
def bench(host, monkeypatch):
    """The module of a host, with little to sweep."""
    if host.NAME == "mlx":
        monkeypatch.setitem(synthetic.SHAPES, "tiny", (*TINY[:2], 64, TINY[3]))  # mlx-lm's groups of 64
    host.bench._field.cache_clear()
    monkeypatch.setattr(host.bench, "SWEEP_BYTES", 2**16)
    yield host.bench
    host.bench._field.cache_clear()


@pytest.fixture
def layer(bench):
    """A layer after 200 tokens, with as many more as fill a block."""
    shape = synthetic.synthetic_shape("tiny")
    return bench.BenchLayer(shape, *synthetic.synthetic_vectors(shape, 200 + SEAL), "float32")


@pytest.fixture
def outputs(host, bench, monkeypatch) -> list[np.ndarray]:
    """What every step under the clock gives, [B, Hq, 1, D]."""
    found = []

    def seconds(self, run) -> float:
        out = run()
        if isinstance(out, tuple):  # an attention function of transformers gives heads behind tokens
            out = out[0].transpose(1, 2) if host.NAME == "torch" else out[0]
        found.append(host.ops.to_numpy(out))
        return 1.0

    monkeypatch.setattr(bench.BenchLayer, "seconds", seconds)
    return found


def test_steps_attend_to_what_they_should(layer, outputs, monkeypatch):
    """The three ways agree; our cache goes through the last tokens, seals once, and then has no more of them."""
    for way in core.WAYS:
        step = getattr(layer, way)()
        assert step() > 0 and step() > 0  # the cache is as it was
    host, again, gqa, _, grouped, _ = outputs
    for other in (again, gqa, grouped):
        np.testing.assert_allclose(host, other, atol=1e-5)
    seen, attend = [], LayerCache.attend

    def watch(self, *args):
        out = attend(self, *args)
        seen.append((self.seen, self.padding_groups[0].sealed))
        return out

    monkeypatch.setattr(LayerCache, "attend", watch)
    step, nbytes = layer.compressed(plan_of("spectral", 2, "flat"), 4, 64)
    head_dim = synthetic.synthetic_shape("tiny").head_dim
    exact = 2 * (200 - 128) * 2 * head_dim * 4  # sides, tokens, heads, channels, bytes: 128 of 200 tokens are sealed
    assert nbytes == exact + 128 * 2 * 2 * head_dim * 2 // 8
    for _ in range(SEAL):
        step()
    assert [count for count, _ in seen] == list(range(200, 217))  # the first is not timed
    assert [sealed for _, sealed in seen] == [128] * 12 + [144] * 5
    with pytest.raises(StopIteration):
        step()
    outputs.clear()
    layer.compressed(plan_of("identity", 2, "flat"), 4, 64)[0]()
    layer.middle = 200
    layer.gqa()()
    np.testing.assert_allclose(*outputs[-2:], atol=1e-5)


@only("mlx", "the quantized cache of transformers needs a package: see the next test")
def test_the_hosts_quantized_cache_is_timed_too(layer, outputs):
    step, _ = layer.quantized(), layer.host()()
    assert step() > 0 and step() > 0
    exact, quantized, same = outputs
    error = np.abs(quantized - exact).mean() / np.abs(exact).mean()
    assert np.array_equal(quantized, same) and 0.02 < error < 0.3  # of 4 bits


@only("torch", "the quantized cache of mlx-lm needs no package")
def test_a_quantized_cache_says_why_it_cannot_run(layer):
    from transformers.utils import is_hqq_available

    if is_hqq_available():
        assert layer.quantized()() > 0
    else:
        with pytest.raises(ImportError, match="hqq"):
            layer.quantized()


def test_a_layer_reads_call_by_call(bench):
    check_reader(bench, synthetic.synthetic_shape("tiny"), plan_of("identity", 2, "flat"))


def test_the_layer_command(host, bench, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(host.backend, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(core, "fresh_peak", core.measure_layer_peak)  # a new process does not know the shape
    arguments = ["--synthetic", "tiny", "--context", "90,150", "--methods", "spectral,identity", "--bits", "2"]
    arguments += ["--backend", host.NAME, "--output", str(tmp_path / "new" / "rows.json")]
    assert cli.main(["bench", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check_result(result, host.NAME)
    assert result == json.loads((tmp_path / "new" / "rows.json").read_text())
    assert result["synthetic"] == "tiny" and result["plan"] == "flat"
    rows = {(row["method"], row["context"]): row for row in result["rows"]}
    assert list(rows) == [("spectral", 90), ("identity", 90), ("spectral", 150), ("identity", 150)]
    assert rows["spectral", 150]["bits_per_element"] == 2 and rows["identity", 150]["bits_per_element"] == 16
    dtype, size = ("bfloat16", 2) if host.NAME == "torch" else ("float32", 4)  # MLX on a CPU
    assert rows["spectral", 150]["dtype"] == dtype
    vectors = 2 * 2 * synthetic.synthetic_shape("tiny").head_dim * size  # sides, heads, channels, bytes
    assert rows["identity", 150]["bytes"] == 150 * vectors and rows["identity", 150]["plain_bytes"] == 159 * vectors
    assert cli.main(["bench", *arguments, "--plan", "typical", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    for words in ("a layer of tiny, typical plan", "150 tokens, float32", "grouped rows", "GB/s"):
        assert words in out
    # widths of a whole model's plan, resampled to one small layer: 2 bits but for that
    (bits,) = set(re.findall(r"spectral, ([\d.]+) bits", out))
    assert float(bits) == pytest.approx(2, abs=0.02)


@only("mlx", "heads of 32 channels are no group of `affine`, and transformers' quantized cache needs a package")
def test_rows_beside_the_hosts_quantized_cache(host, bench, capsys, monkeypatch):
    monkeypatch.setattr(core, "fresh_peak", core.measure_layer_peak)
    arguments = ["--synthetic", "tiny", "--context", "150", "--methods", "spectral,affine", "--bits", "2"]
    assert cli.main(["bench", *arguments, "--backend", host.NAME, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    check_result(result, host.NAME)
    assert [row["bits_per_element"] for row in result["rows"]] == [2, 2.5]
    assert all(row["ratio_to_host_quantized"] > 0 and row["dtype"] == "float32" for row in result["rows"])


def test_the_attention_clock_counts_and_restores(host, bench, monkeypatch):
    kernels = []
    kernel = bench._gqa
    monkeypatch.setattr(bench, "_gqa", lambda q, *given: kernels.append(q.shape[1:3]) or kernel(q, *given))
    model, layers, logits = host.model("gemma3"), host.profile("gemma3").shape.layers, []  # the others slide
    host.install(model)
    plain, before = host.plain_cache(model), host.attention_function(model)
    host.backend.feed(model, tokens(60), plain)
    for way in (None, *core.WAYS):
        cache = host.plain_cache(model)
        host.fill(cache, plain)
        if way is None:
            logits.append(host.backend.feed(model, [7], cache))
            continue
        with bench.attention_clock(model, cache, layers, way) as clock:
            if host.NAME == "torch":  # whose layers concatenate what came in
                clocked = [i for i, layer in enumerate(cache.layers) if "update" in vars(layer)]
                assert clocked == (list(layers) if way == "host" else [])
            logits.append(host.backend.feed(model, [7], cache))
        assert clock.calls == len(layers) and clock.seconds > 0
        assert host.attention_function(model) == before
        assert not any("update" in vars(layer) for layer in host.layers(cache))
        np.testing.assert_allclose(logits[-1], logits[0], atol=1e-4)
    assert kernels == [(4, 1)] * 2 + [(2, 2)] * 2  # heads and rows of the query


@only("mlx", "the quantized cache of transformers needs a package")
def test_a_sliding_window_is_not_quantized(host, bench):
    model = host.model("gemma3")
    plain = host.plain_cache(model)
    host.backend.feed(model, tokens(60), plain)
    with pytest.raises(ValueError, match="RotatingKVCache"):
        bench.quantized_cache(model, plain)


def test_compressed_caches_are_attended_as_codes_under_the_clock(host, bench, monkeypatch):
    model, profile = host.model("llama"), host.profile("llama")
    cache = host.make_prompt_cache(model, profile, 2.0)
    host.backend.feed(model, tokens(203), cache)
    before = host.attention_function(model)
    monkeypatch.setattr(LayerCache, "dense", lambda self, *a: pytest.fail("decoded"))
    with bench.attention_clock(model, cache, profile.shape.layers) as clock:
        host.backend.feed(model, [7], cache)
    assert clock.calls == len(profile.shape.layers) and host.seen(cache) == 204
    assert host.attention_function(model) == before


@pytest.mark.slow
def test_the_model_command_with_peaks_of_fresh_processes(host, bench, capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")  # which writes the checkpoint
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(core, "REPEATS", 1)
    model = str(save_tiny_checkpoint(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("On the table stood 23 cups; nobody knew whose they were. " * 60)
    small = ["--text", str(tmp_path / "text.txt"), "--tokens", "512", "--document", "256", "--quiet"]
    assert cli.main(["profile", "--model", model, "--backend", host.NAME, *small]) == 0
    configurations, measure = [], core.fresh_peak

    def peak(**configuration):
        configurations.append(configuration)
        return measure(**configuration)

    monkeypatch.setattr(core, "fresh_peak", peak)
    held = bytearray(2**29)  # of this process, which the fresh ones must not count
    arguments = ["--model", model, "--context", "120", "--bits", "2", "--backend", host.NAME, "--json"]
    capsys.readouterr()
    assert cli.main(["bench", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    check_result(result, host.NAME)
    (row,) = result["rows"]
    assert set(row) >= MODEL_KEYS and all(row[key] > 0 for key in MODEL_KEYS) and row["dtype"] == "float32"
    stored = 256 if host.NAME == "mlx" else 120 + SEAL  # mlx-lm allocates in steps
    assert row["bytes"] < row["plain_bytes"] == stored * 3 * 2 * 2 * 16 * 4
    assert [c["method"] for c in configurations] == [None, "spectral"]
    report.print_bench(result)
    out = capsys.readouterr().out
    assert all(words in out for words in ("prefill tokens/s", "peak MiB", f"{row['peak_bytes'] / 2**20:,.1f}"))
    for key in ("peak_bytes", "plain_peak_bytes"):
        assert 50e6 < row[key] < process_peak_bytes() - len(held) / 2  # a host alone takes more than 50 MB

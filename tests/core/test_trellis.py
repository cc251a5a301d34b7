"""Trellis-coded quantization: the best codes there are, the same in C and in NumPy, and what decoding makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from cases import ToyModel, decoded_paths, plan_of

from spectral_kv_core import native
from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.transform import time_matrix
from spectral_kv_core.codecs import registry
from spectral_kv_core.codecs.registry import make_codec
from spectral_kv_core.codecs.trellis_coded import TrellisCodec
from spectral_kv_core.native import toolchain
from spectral_kv_core.native.variants import processor_features
from spectral_kv_core.planning.methods import METHODS, QUANTIZERS, get_method
from spectral_kv_core.quantization import trellis
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS, flat_levels, flat_tables, gaussian_tables
from spectral_kv_core.quantization.trellis import ERROR_RATIOS, STATES, WIDTHS, Coefficients, Paths, codebooks, label

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
NORMAL = gaussian_tables()
BOOKS = {**NORMAL, **codebooks(NORMAL)}
VARIANTS = {"native": toolchain.NATIVE, "avx2": (("-march=x86-64-v3",),), "portable": ((),)}


@pytest.fixture(params=VARIANTS)
def kernel(request, monkeypatch, tmp_path_factory):
    """The kernel for this processor, for older ones of its kind, and without vector instructions of any one kind."""
    if request.param == "avx2" and "avx2" not in processor_features():
        pytest.skip("not an x86 processor with AVX2")
    if request.param != "native":
        monkeypatch.setattr(toolchain, "NATIVE", VARIANTS[request.param])
        monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path_factory.getbasetemp() / "trellis"))
    native.library.cache_clear()
    assert native.library() is not None
    yield
    native.library.cache_clear()


def rows_of(widths: np.ndarray, seed: int = 0) -> Coefficients:
    """Rows of `widths` [G, F, R] with random gains and costs."""
    rng = np.random.default_rng(seed)
    gain, cost = rng.uniform(0.1, 1, widths.shape), rng.lognormal(size=widths.shape)
    tables = *flat_tables(NORMAL, BOOKS), flat_levels(BOOKS)
    return Coefficients(widths, gain, cost, time_matrix("dct", widths.shape[1]), tables)


def mixed_rows(groups: int, rank: int, seed: int = 0, choices=BIT_WIDTHS) -> Coefficients:
    return rows_of(np.random.default_rng(seed).choice(choices, (groups, 16, rank)).astype(np.uint8), seed)


def coefficients(rows: Coefficients, batch: int, blocks: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    groups, frequencies, rank = rows.shape
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(size=(batch, groups, blocks, frequencies))
    z = rng.standard_normal((batch, groups, blocks, frequencies, rank))
    return z.astype(np.float32), (weights / weights.mean(-1, keepdims=True)).astype(np.float32)


def weighted_error(rows: Coefficients, z, weights, levels) -> np.ndarray:
    """What time rounding minimizes, of every block [B, n]: errors weighed by tokens, and by rows."""
    error = (z - levels) * rows.gain[:, None]
    spread = np.einsum("bgnfr,ft->bgntr", error, rows.time)
    own = (rows.cost / np.square(rows.gain))[:, None].mean(-2, keepdims=True)
    return (np.square(spread) * weights[..., None] * own).sum((1, 3, 4))


def test_codebooks_are_symmetric_and_twice_as_large():
    for bits in WIDTHS:
        assert len(BOOKS[bits]) == 2 * 2**bits and np.all(np.diff(BOOKS[bits]) > 0)
        np.testing.assert_array_equal(BOOKS[bits], -BOOKS[bits][::-1])


def test_every_path_can_reach_every_quarter():
    """From any state the two next ones have different quarters, and so have the two ways into a state."""
    quarters = label(np.arange(2 * STATES))
    assert np.all(quarters[0::2] != quarters[1::2]) and np.all(quarters[:STATES] != quarters[STATES:])
    assert np.array_equal(np.bincount(quarters), [STATES // 2] * 4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_squared_errors_are_those_that_plans_count_on(bits):
    """On sequences of normal coefficients, whose ratios are up to 4 % above those of the coefficients of real models."""
    rows = rows_of(np.full((1, 16, 600), bits, np.uint8))
    rows.cost[:] = 1
    z, _ = coefficients(rows, 1, 16)
    levels = decoded_paths(rows, BOOKS, rows.search(z, None))
    scalar = NORMAL[bits][np.searchsorted((NORMAL[bits][1:] + NORMAL[bits][:-1]) / 2, z)]
    ratio = np.square(z - levels).mean() / np.square(z - scalar).mean()
    assert ratio == pytest.approx(ERROR_RATIOS[bits], rel=0.045)


@pytest.mark.parametrize("run", [trellis._native, trellis._in_numpy])
def test_no_codes_are_better_than_those_found(run):
    """Against every way to code a short sequence of mixed widths; rows beyond it have no path bit."""
    if run is trellis._native and native.library() is None:
        pytest.skip("there is no C compiler")
    widths = np.zeros((2, 16, 4), np.uint8)
    widths[:, 3] = [[1, 2, 8, 0], [3, 1, 2, 2]]
    rows = rows_of(widths)
    z, _ = coefficients(rows, 1, 5)
    codes = np.empty(z.shape, np.uint8)
    run(rows, z, None, codes)
    coupled = np.isin(widths[:, 3], WIDTHS)
    ways = list(product(*(range(2**b) for b in widths[:, 3][coupled].tolist())))
    every = np.zeros((1, 2, len(ways), 16, 4), np.uint8)
    for number, (g, r) in enumerate(np.argwhere(coupled)):
        every[0, g, :, 3, r] = np.array(ways)[:, number]
    levels = decoded_paths(rows, BOOKS, every)[0, :, :, 3].transpose(1, 0, 2)[:, coupled]
    cost = rows.cost[:, 3][coupled]
    best = (np.square(z[0, :, :, 3].transpose(1, 0, 2)[:, None, coupled] - levels) * cost).sum(-1).min(1)
    found = decoded_paths(rows, BOOKS, codes)[0, :, :, 3].transpose(1, 0, 2)[:, coupled]
    error = (np.square(z[0, :, :, 3].transpose(1, 0, 2)[:, coupled] - found) * cost).sum(-1)
    np.testing.assert_allclose(error, best, rtol=1e-5)
    assert (codes[:, :, :, :3] == 0).all()


@needs_compiler
@pytest.mark.parametrize("groups, rank, batch, blocks", [(1, 40, 1, 3), (6, 17, 1, 70), (2, 5, 2, 33), (1, 1, 1, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_kernel_finds_the_codes_of_numpy(kernel, groups, rank, batch, blocks, weighted):
    rows = mixed_rows(groups, rank)
    z, weights = coefficients(rows, batch, blocks)
    ours, theirs = np.empty(z.shape, np.uint8), np.empty(z.shape, np.uint8)
    trellis._native(rows, z, weights if weighted else None, ours)
    trellis._in_numpy(rows, z, weights if weighted else None, theirs)
    assert np.count_nonzero(ours != theirs) <= max(1, ours.size // 10_000)


@needs_compiler
@pytest.mark.parametrize("group, rope", [("head", "post"), ("layer", "pre")])
def test_the_kernel_finds_the_codes_of_numpy_for_a_codec(group, rope):
    codec = make_codec(ops, plan_of(ToyModel(), 2, group, rope, "expected-attention", "trellis"), 0)
    z, weights = (np.ascontiguousarray(x) for x in codec.coefficients(*ToyModel().sample(1, 512), 4))
    expected = np.empty(z.shape, np.uint8)
    trellis._in_numpy(codec.search, z, weights, expected)
    assert np.count_nonzero(codec.search.search(z, weights) != expected) <= max(1, expected.size // 10_000)


@needs_compiler
@pytest.mark.parametrize("groups, rank, weighted", [(2, 9, True), (1, 70, True), (5, 33, False)])
def test_a_block_is_coded_alike_wherever_it_comes(kernel, groups, rank, weighted):
    """Few blocks are searched one by one, many side by side."""
    rows = mixed_rows(groups, rank)
    z, weights = coefficients(rows, 1, 40)
    codes = rows.search(z, weights if weighted else None)
    for some in (np.s_[:, :, 7:8], np.s_[:, :, 20:], np.s_[:, :, 3:6]):
        np.testing.assert_array_equal(rows.search(z[some], weights[some] if weighted else None), codes[some])


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_forks_can_go_on_coding():
    code = """
import os, signal, sys
sys.path[:0] = sys.argv[1:]
from test_trellis import coefficients, mixed_rows
rows = mixed_rows(2, 9)
z, weights = coefficients(rows, 1, 100)
before = rows.search(z, weights)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if (rows.search(z, weights) == before).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    folders = map(str, Path(__file__).parents[:2])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *folders], timeout=60)
    assert done.returncode == 0


def test_weights_move_the_error_to_the_tokens_that_matter_least():
    rows = mixed_rows(2, 30, choices=(0, 1, 2, 3))
    rows.gain[:] = 1  # so that the weighted error is what the search minimizes
    z, weights = coefficients(rows, 1, 50)
    aware, blind = (
        weighted_error(rows, z, weights, decoded_paths(rows, BOOKS, rows.search(z, w))) for w in (weights, None)
    )
    assert aware.mean() < 0.9 * blind.mean()


def test_paths_decode_as_the_definition_says():
    rows = mixed_rows(3, 11)
    codes = rows.search(*coefficients(rows, 2, 6))
    widths = np.array(BIT_WIDTHS)[rows.slots].reshape(-1)
    stored = np.concatenate([np.flatnonzero(widths == b) for b in WIDTHS])
    paths = Paths(ops, rows.sequences(), stored, widths[stored], BOOKS)
    by_row = codes.transpose(0, 1, 3, 4, 2).reshape(2, -1, 6)[:, stored]
    expected = decoded_paths(rows, BOOKS, codes).transpose(0, 1, 3, 4, 2).reshape(2, -1, 6)[:, stored]
    np.testing.assert_array_equal(paths.levels_of(by_row), expected)


@pytest.mark.parametrize("group, rope", [("head", "post"), ("layer", "pre")])
def test_a_codec_loses_less_at_the_same_bytes(group, rope):
    model = ToyModel()
    keys, values = model.sample(1, 1024)
    losses, sizes = [], []
    for quantizer in QUANTIZERS:
        plan = plan_of(model, 1.5, group, rope, "expected-attention", quantizer)
        codec = make_codec(ops, plan, 0)
        chunk = codec.encode(keys, values, 4)
        sizes.append(sum(x.nbytes for x in chunk.arrays))
        losses.append(sum(np.square(x - y).mean() for x, y in zip(codec.decode(chunk), (keys, values))))
    assert isinstance(codec, TrellisCodec) and losses[1] < 0.97 * losses[0]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_plans_tell_what_their_codes_mean_apart():
    scalar, coded = (plan_of(ToyModel(), 2, "layer", "pre", "expected-attention", kind) for kind in QUANTIZERS)
    assert coded.hash != scalar.hash
    assert coded.staging.method.quantizer == "scalar"  # what waits for the end of a prompt is coded twice
    other = replace(coded, basis_set=replace(coded.basis_set, sensitivity=coded.basis_set.sensitivity[..., ::-1]))
    assert other.hash != coded.hash  # another order of rows along the path


def test_machines_without_a_compiler_get_the_scalar_quantizer(monkeypatch):
    monkeypatch.setattr(trellis, "library", lambda: None)
    registry._say_scalar.cache_clear()
    with pytest.warns(UserWarning, match="no C compiler.*1.4 times"):
        method = registry.usable_method("spectral-dense")
    assert method == replace(METHODS["spectral-dense"], quantizer="scalar")
    assert get_method("spectral-dense").quantizer == "trellis"  # the recipe itself, as a file has it, stays

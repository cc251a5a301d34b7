"""xKV, KVTC and SVDq in a prompt's own axes, for files: sizes, their papers' formulas again, every library, whole prompts."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of
from tolerances import assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import rotate, unrotate
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.calibration import model_basis
from spectral_kv_core.calibration.basis_fit import SKIP
from spectral_kv_core.calibration.model_basis import fit_joint_set, randomized_axes
from spectral_kv_core.calibration.spool import Spool
from spectral_kv_core.codecs import kvtc, svdq_prompt
from spectral_kv_core.codecs.chunk import Chunk, join_layers
from spectral_kv_core.codecs.entropy_coded import fit_bits
from spectral_kv_core.codecs.registry import bits_range, make_codec, make_plan
from spectral_kv_core.codecs.xkv import leading_axes, ranks
from spectral_kv_core.planning.budget import elements_per_token
from spectral_kv_core.planning.methods import BASIS_SETS, METHODS, get_live_method
from spectral_kv_core.profile.basis_set import WHOLE_MODEL

MODEL = ToyModel(layers=3, rotated=True)
TOKENS = 384
BITS = {"xkv": (0.5, 1, 2, 4), "kvtc": (0.5, 1, 2, 4), "svdq-prompt": (9, 10, 12, 14)}
every_method = pytest.mark.parametrize("name", BITS)


def plan_of(name: str, bits: float):
    profile = toy_profile_of(MODEL, "model", "pre") if name == "kvtc" else None
    return make_plan(MODEL.shape, profile, name, bits)


def sample(batch: int = 1, seed: int = 1, name: str = "kvtc") -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [B, H, T, D] of all the layers that a row of the method `name` stands for."""
    return join_layers(ops, [MODEL.sample(seed, TOKENS, batch, layer=layer) for layer in layers_of(name)])


def encode(xp, name: str, bits: float, *parts, start: int = 0):
    codec = plan_of(name, bits).make_codec(xp, 0)
    return codec, codec.encode(*map(xp.asarray, parts), start)


def decoded(codec, chunk) -> list[np.ndarray]:
    return [codec.xp.to_numpy(x) for x in codec.decode(chunk)]


def layers_of(name: str) -> tuple[int, ...]:
    """Layers that the first row of the method `name` stands for."""
    return MODEL.shape.layer_groups(METHODS[name].group)[0]


def real_bits(chunk, name: str = "kvtc") -> float:
    elements = elements_per_token(MODEL.shape) * len(layers_of(name)) // MODEL.layers
    return 8 * sum(a.nbytes for a in chunk.arrays) / (elements * chunk.tokens * chunk.batch)


def side_by_side(x: np.ndarray, start: int | None = None) -> np.ndarray:
    """[1, H, T, D] -> [T, H D] float64, with RoPE undone from `start` on."""
    x = x if start is None else unrotate(ops, x, MODEL.rope, start)
    return np.moveaxis(x[0], 0, 1).reshape(x.shape[2], -1).astype(np.float64)


def heads_again(x: np.ndarray, start: int | None = None) -> np.ndarray:
    x = np.moveaxis(x.reshape(len(x), -1, MODEL.head_dim), 1, 0)[None].astype(np.float32)
    return x if start is None else rotate(ops, x, MODEL.rope, start)


@every_method
def test_error_falls_as_bytes_grow(xp, name):
    parts, errors, sizes = sample(batch=2, name=name), [], []
    for bits in BITS[name]:
        codec, chunk = encode(xp, name, bits, *parts)
        errors.append([relative_rms(got, x) for got, x in zip(decoded(codec, chunk), parts)])
        sizes.append(real_bits(chunk, name))
        assert 0.4 * bits < sizes[-1] <= bits
    exact = name == "svdq-prompt"  # values in float16
    assert np.all(np.diff(errors, axis=0)[:, : 2 - exact] < 0), errors
    assert np.max(errors[-1]) < 0.15, errors


@every_method
def test_chunks_of_one_library_decode_on_every_other(xp, name):
    bits, parts = BITS[name][2], sample(batch=2, name=name)
    reference, expected = encode(ops, name, bits, *parts, start=20)
    codec, got = encode(xp, name, bits, *parts, start=20)
    assert name == "kvtc" or [tuple(a.shape) for a in got.arrays] == [a.shape for a in expected.arrays]
    moved = Chunk(2, 20, TOKENS, tuple(map(xp.asarray, expected.arrays)))
    for side, a, b, own in zip(
        ("keys", "values"), decoded(codec, moved), decoded(reference, expected), decoded(codec, got)
    ):
        assert_close(side, a, b, limit=2e-5)
        assert_close(f"own {side}", own, b, limit=1e-3)


@every_method
def test_a_file_has_the_arrays_that_it_expects(name):
    for bits in BITS[name]:
        _, chunk = encode(ops, name, bits, *sample(batch=2, name=name))
        for array, (shape, kind) in zip(chunk.arrays, plan_of(name, bits).chunk_arrays(0, 2, TOKENS), strict=True):
            assert array.dtype.name == kind and shape in (None, array.shape)


@every_method
def test_there_is_no_live_cache(name):
    with pytest.raises(ValueError, match="which is for files"):
        get_live_method(name)
    codec, chunk = encode(ops, name, BITS[name][1], *sample(name=name))
    with pytest.raises(ValueError, match=f"filled at once, received further tokens: method {name}"):
        codec.append(chunk, *sample(name=name))


@every_method
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_refused(name, side, bad):
    parts = sample(name=name)
    parts[side][0, 1, 7, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        encode(ops, name, BITS[name][2], *parts)


@pytest.mark.parametrize(
    "layers, groups",
    [
        (range(6), ((0, 1, 2, 3), (4, 5))),
        ((0, 1, 4, 5, 6, 7, 8, 11), ((0, 1), (4, 5, 6, 7), (8,), (11,))),
    ],
)
def test_which_layers_are_grouped(layers, groups):
    shape = replace(MODEL.shape, num_layers=12, layers=tuple(layers))
    assert shape.layer_groups("layer4") == groups
    assert shape.layer_groups("model") == (tuple(layers),)


def test_xkv_is_its_paper():
    """The best approximation of that rank of the heads of all layers side by side, both factors stored."""
    keys, values = sample()
    codec, chunk = encode(ops, "xkv", 2, keys, values, start=36)
    channels = 3 * 2 * 64
    rank_k, rank_v = chunk.arrays[0].shape[2], chunk.arrays[2].shape[2]
    assert rank_k + rank_v == int(2 * 2 * TOKENS * channels / (16 * (TOKENS + channels))) and rank_k / rank_v < 0.7
    assert real_bits(chunk) == 16 * (rank_k + rank_v) * (TOKENS + channels) / (2 * TOKENS * channels)
    for x, rank, got, start in zip((keys, values), (rank_k, rank_v), decoded(codec, chunk), (36, None)):
        u, s, v = np.linalg.svd(side_by_side(x, start), full_matrices=False)
        assert_close("decoded", got, heads_again((u[:, :rank] * s[:rank]) @ v[:rank], start), limit=2e-3)
    cut = codec.cut(chunk, 100)
    for got, whole in zip(decoded(codec, cut), decoded(codec, chunk)):
        assert_close("cut", got, whole[:, :, :100], limit=1e-6)


def test_xkv_ranks_stay_within_the_bits():
    for bits, channels, tokens in itertools.product((0.3, 1, 4, 9, 16, 32), (64, 768), (16, 100, 3000)):
        rank_k, rank_v = ranks(bits, channels, tokens)
        assert min(rank_k, rank_v) >= 1 and max(rank_k, rank_v) <= min(channels, tokens)
        stored = 16 * (rank_k + rank_v) * (tokens + channels) / (2 * tokens * channels)
        assert stored <= bits or rank_k == rank_v == 1
    for tokens, channels in ((300, 64), (64, 300)):
        x = np.random.default_rng(0).standard_normal((tokens, channels))
        axes, v = leading_axes(x, 64), np.linalg.svd(x)[2][:64]
        np.testing.assert_allclose(np.abs(np.sum(axes.T * v, axis=1)), 1, atol=1e-8)


@pytest.mark.parametrize("name, block", [("xkv", 16), ("svdq-prompt", 128)])
def test_a_prompt_is_one_chunk(name, block):
    cache = LayerCache(ops, plan_of(name, BITS[name][2]).make_codec(ops, 0), 4, 16)
    keys, values = (np.concatenate([x] * 4, axis=2) for x in sample(name=name))
    cache.append(keys, values)
    assert [c.tokens for c in cache.padding_groups[0].chunks] == [(4 * TOKENS - 20) // block * block]


def test_svdq_prompt_is_its_paper():
    """Axes and mean of the prompt itself, codes at the middle of their cell per channel and 128 tokens, bits falling."""
    keys, values = sample(name="svdq-prompt")
    codec, chunk = encode(ops, "svdq-prompt", 12, keys, values, start=36)
    widths = svdq_prompt.schedule(12, 128, TOKENS, 128)
    assert widths[0] > widths[5] > 0 and sorted(widths, reverse=True) == list(widths)
    got_keys, got_values = decoded(codec, chunk)
    x = side_by_side(keys, 36)
    mean = x.mean(0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2]
    z = (x - mean) @ axes.T
    near = np.zeros_like(z)
    for block in range(0, TOKENS, 128):
        for channel, width in enumerate(np.repeat(widths, 16)):
            if width:
                part = z[block : block + 128, channel]
                step = np.ptp(part) / 2**width
                cell = np.clip(np.floor((part - part.min()) / step), 0, 2**width - 1)
                near[block : block + 128, channel] = part.min() + (cell + 0.5) * step
    assert_close("keys", got_keys, heads_again(near @ axes + mean, 36), limit=0.01)
    np.testing.assert_array_equal(got_values, values.astype(np.float16))
    cut = codec.cut(chunk, 128)
    for got, whole in zip(decoded(codec, cut), (got_keys, got_values)):
        assert_close("cut", got, whole[:, :, :128], limit=1e-6)


def test_svdq_prompt_bits_are_a_ceiling_with_the_axes_counted():
    low, high = bits_range(METHODS["svdq-prompt"], MODEL.shape)
    for bits, tokens in itertools.product((low, 8.5, 9, 10, 12, high), (128, 384, 3072)):
        widths, plan = svdq_prompt.schedule(bits, 128, tokens, 128), plan_of("svdq-prompt", bits)
        claimed = 8 * sum(np.prod(shape) * np.dtype(kind).itemsize for shape, kind in plan.chunk_arrays(0, 1, tokens))
        axes, bits_of_codes = 16 * sum(b > 0 for b in widths), sum(b + (b > 0) * 32 / 128 for b in widths) / 8
        assert claimed / (2 * tokens * 128) == pytest.approx((16 + bits_of_codes) / 2 + 8 * (axes + 1) / tokens)
        assert widths[0] > 0 and (claimed <= bits * 2 * tokens * 128 or widths == (1,) + 7 * (0,))
    assert svdq_prompt.schedule(high, 128, 128, 128) == 8 * (8,)
    x, y = (np.concatenate([part] * 8, axis=2) for part in sample(name="svdq-prompt"))
    assert encode(ops, "svdq-prompt", 12, x, y)[1].arrays[1].shape[1] > 96  # axes: a long prompt affords more


def test_svdq_prompt_reproduces_keys_of_low_rank():
    """16 directions and a mean: one group of 8 bits, whose steps are all that is lost."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((128, 16)))[0]
    z = rng.standard_normal((TOKENS, 16)) * 0.9 ** np.arange(16)
    keys = heads_again(z @ axes.T + 5 * rng.standard_normal(128), 4)
    codec, chunk = encode(ops, "svdq-prompt", 8.9, keys, sample(name="svdq-prompt")[1], start=4)
    assert svdq_prompt.schedule(8.9, 128, TOKENS, 128) == (8,) + 7 * (0,)
    error = side_by_side(decoded(codec, chunk)[0] - keys, 4)
    step = np.ptp(z.reshape(-1, 128, 16), axis=1).max() / 256
    assert np.sqrt(np.square(error).sum(1).mean() / 16) < 1.2 * step / np.sqrt(12)
    assert real_bits(chunk, "svdq-prompt") == 8 * sum(a.nbytes for a in chunk.arrays) / keys.size / 2
    assert real_bits(chunk, "svdq-prompt") == 8 + 8.25 / 16 + 8 * 17 / TOKENS <= 8.9


def test_svdq_prompt_is_better_than_a_profile_of_other_text():
    keys, values = sample(name="svdq-prompt")
    profile, widths = toy_profile_of(MODEL, "layer", "pre"), svdq_prompt.schedule(12, 128, TOKENS, 128)
    plan = replace(make_plan(MODEL.shape, profile, "svdq", 9), widths=widths)
    errors = []
    for codec in (plan_of("svdq-prompt", 12).make_codec(ops, 0), make_codec(ops, plan, 0), make_codec(ops, plan, 1)):
        errors.append(relative_rms(decoded(codec, codec.encode(keys, values, 0))[0], keys))
    assert errors[0] < 1.02 * errors[1] and errors[0] < 0.3 * errors[2], errors  # layer 1 stands for other text


def test_kvtc_is_its_paper():
    """Components of all layers, per token and group minimum, range and uniform codes; 16 bits for a component alone."""
    plan = plan_of("kvtc", 1.5)
    basis_set = plan.profile.basis_sets[WHOLE_MODEL]
    keys, values = sample()
    codec, chunk = encode(ops, "kvtc", 1.5, keys, values, start=36)
    for side, (x, got, start) in enumerate(zip((keys, values), decoded(codec, chunk), (36, None))):
        u, _, v = np.linalg.svd(basis_set.basis[0, side].astype(np.float64), full_matrices=False)
        basis = u @ v
        mean, near, done = basis_set.mean[0, side].astype(np.float64), np.zeros((TOKENS, 0)), 0
        z = (side_by_side(x, start) - mean) @ basis
        for size, bits, count in plan.runs[side]:
            for _ in range(count):
                part = z[:, done : done + size]
                if size > 1:
                    low, high = part.min(1, keepdims=True), part.max(1, keepdims=True)
                    scale, low = (a.astype(np.float16).astype(float) for a in ((high - low) / (2**bits - 1), low))
                    part = low + np.clip(np.rint((part - low) / scale), 0, 2**bits - 1) * scale
                near, done = np.concatenate([near, part], axis=1), done + size
        assert_close("decoded", got, heads_again(near @ basis[:, :done].T + mean, start), limit=5e-3)


def test_kvtc_bits_before_deflate_are_counted():
    plan = plan_of("kvtc", 1.5)
    _, chunk = encode(ops, "kvtc", 1.5, *sample())
    plain = zlib.decompress(chunk.arrays[0].tobytes())
    assert 8 * len(plain) == pytest.approx(plan.bits_per_element * TOKENS * elements_per_token(MODEL.shape))
    assert 0.93 * 1.5 < plan.bits_per_element <= 1.5 and len(chunk.arrays[0]) < 1.01 * len(plain)


def test_kvtc_widths_fall_along_the_components():
    for bits in (0.2, 1, 3):
        for runs in plan_of("kvtc", bits).runs:
            widths = [b for _, b, _ in runs]
            assert widths == sorted(widths, reverse=True) and {s for s, _, _ in runs} <= set(kvtc.SIZES)


@pytest.mark.parametrize("variance", [0.5 ** np.arange(6), np.array([0.3, 0.01, 1.0, 0.002, 0.6, 0.1])])
def test_kvtc_groups_are_the_best_there_are(monkeypatch, variance):
    """Against every way to cut six components into groups, at several prices of a bit."""
    monkeypatch.setattr(kvtc, "SIZES", {1: 0.0, 2: 1.13, 4: 2.06})
    tail = np.append(np.cumsum(variance[::-1])[::-1], 0.0)
    options = kvtc._options(tail)

    def every(at, allowed):
        yield []
        for size, bits, _, _ in options:
            if bits <= allowed and at + size <= 6:
                for rest in every(at + size, bits):
                    yield [(size, bits), *rest]

    def loss(groups, price):
        at = total = 0
        for size, bits in groups:
            _, _, cost, error = next(o for o in options if o[:2] == (size, bits))
            total, at = total + error[at] + price * cost, at + size
        return total + tail[at]

    for price in (1e-5, 1e-4, 1e-3, 5e-3, 0.02, 0.1):
        found = kvtc._groups_at(tail.tolist(), options, price)
        best = min(every(0, 8), key=lambda groups: loss(groups, price))
        assert loss(found, price) == pytest.approx(loss(best, price), rel=1e-12), (price, found, best)


def test_kvtc_refuses_other_bytes():
    codec, chunk = encode(ops, "kvtc", 2, *sample())
    other, _ = encode(ops, "kvtc", 1, *sample())
    with pytest.raises(ValueError, match="received more"):
        other.decode(chunk)
    broken = Chunk(1, 0, TOKENS, (chunk.arrays[0][:-9],))
    with pytest.raises(ValueError, match="deflated bytes"):
        codec.decode(broken)


@every_method
def test_files_are_as_large_as_asked(name):
    parts, bits = sample(seed=5, name=name), BITS[name][1]

    def make(planned):
        chunk = encode(ops, name, planned, *parts)[1]
        return chunk, real_bits(chunk, name)

    allowed = bits_range(METHODS[name], MODEL.shape)
    assert 0.9 * bits < real_bits(fit_bits(make, bits, allowed), name) <= bits


@pytest.fixture
def spool():
    with Spool() as spool:
        for document in range(4):
            for layer in range(3):
                keys, values = MODEL.sample(500 + document, 300, layer=layer)
                gradients = np.zeros((1, 2, 300, 64), np.float32)
                spool.add(layer, document, keys[0], values[0], gradients, gradients)
        yield spool


def test_the_joint_basis_is_that_of_all_layers(spool):
    basis_set = fit_joint_set(spool, MODEL.shape)
    channels = 3 * 2 * 64
    assert basis_set.name == WHOLE_MODEL and basis_set.basis.shape == (1, 2, channels, channels)
    whole = [join_layers(ops, [MODEL.sample(500 + d, 300, layer=n) for n in range(3)]) for d in range(4)]
    for side in range(2):
        x = [side_by_side(parts[side], 0 if side == 0 else None)[SKIP:] for parts in whole]
        fitted, held = np.concatenate(x[:3]), x[3]
        mean, basis = basis_set.mean[0, side], basis_set.basis[0, side].astype(np.float64)
        assert_close("mean", mean, fitted.mean(0), limit=1e-3)
        np.testing.assert_allclose(basis.T @ basis, np.eye(channels), atol=1e-4)
        variance = basis_set.variance[0, side, :, 0]
        assert np.all(np.diff(variance) <= 0)
        np.testing.assert_allclose(variance, np.square((held - mean) @ basis).mean(0), rtol=1e-2, atol=1e-6)
        best = np.linalg.eigvalsh(np.cov(fitted.T))[::-1]
        reached = np.sort(np.square((fitted - mean) @ basis).mean(0))[::-1]
        np.testing.assert_allclose(reached[:60].sum(), best[:60].sum(), rtol=5e-3)


def test_the_joint_basis_needs_a_bounded_sample(spool, monkeypatch):
    monkeypatch.setattr(model_basis, "SAMPLE", 200 * 384)
    monkeypatch.setattr(model_basis, "RANK", 50)
    places = model_basis._places(spool, 200)
    assert 190 <= sum(map(len, places)) <= 200 and min(p[0] for p in places) == SKIP
    basis_set = fit_joint_set(spool, MODEL.shape)
    assert basis_set.basis.shape == (1, 2, 384, 50)


def test_randomized_axes_span_the_leading_directions():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((500, 300)) * 0.9 ** np.arange(300)).astype(np.float32)
    axes = randomized_axes(x, 20, rng)
    exact = np.linalg.svd(x)[2][:20]
    np.testing.assert_allclose(np.linalg.svd(exact @ axes)[1], 1, atol=1e-3)


def test_the_joint_set_comes_on_request_only():
    assert WHOLE_MODEL not in BASIS_SETS and METHODS["kvtc"].basis_set == WHOLE_MODEL
    profile = toy_profile_of(MODEL, "head", "post")
    with pytest.raises(ValueError, match=r"spectralkv profile --model toy --joint"):
        make_plan(MODEL.shape, profile, "kvtc", 1)

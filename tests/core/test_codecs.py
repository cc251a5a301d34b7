"""The published methods: what they store, their papers' formulas written again, every array library, the live cache."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ToyModel, attention, toy_profile_of
from tolerances import ATTENTION_RMS, CODES_DIFFERING, assert_close, relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.attention import dense_partial, group_queries, merge_partials
from spectral_kv_core.arrays.hadamard import hadamard, random_rotation, random_signs
from spectral_kv_core.arrays.rope import rotate, unrotate
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.codecs.chunk import Chunk
from spectral_kv_core.codecs.registry import bits_range, make_codec, make_plan
from spectral_kv_core.planning.budget import CHUNK_TOKENS, elements_per_token
from spectral_kv_core.planning.methods import METHODS, get_method
from spectral_kv_core.profile.derived import covariance, head_moments, means, query_moment, rotated_energy

MODEL = ToyModel(rotated=True)
BITS = {  # three budgets, with errors worth telling apart
    "kivi": (3, 5, 9),
    "turboquant": (2.25, 4.25, 6.25),
    "turboquant-qjl": (2.375, 4.375, 6.375),
    "jarviskv": (1.5, 4, 8),
    "svdq": (8.2, 9.1, 11),
    "eigen-attention": (4, 9.6, 16),
    "think": (10, 12.8, 15.8),
}
LIVE = list(BITS)
every_method = pytest.mark.parametrize("name", LIVE)


def profile_of(name: str, model: ToyModel = MODEL):
    basis_set = get_method(name).basis_set
    return toy_profile_of(model, *basis_set.split(".")) if basis_set else None


def plan_of(name: str, bits: float | None = None, model: ToyModel = MODEL):
    return make_plan(model.shape, profile_of(name, model), name, BITS[name][1] if bits is None else bits)


def arrays(xp, *parts):
    return tuple(map(xp.asarray, parts))


def decoded(codec, chunk) -> list[np.ndarray]:
    return [codec.xp.to_numpy(x) for x in codec.decode(chunk)]


def nbytes(chunk) -> int:
    return sum(a.nbytes for a in chunk.arrays)


def sizes(chunk) -> list[tuple]:
    return [(tuple(a.shape), str(a.dtype).split(".")[-1]) for a in chunk.arrays]


def assert_same_codes(name: str, got, expected) -> None:
    """Bytes of codes alike, up to what the last bit of a float32 moves; latents and scales to half precision."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, f"{name}: array {i} has shape {a.shape}, expected {b.shape}"
        if b.dtype == np.uint8:
            differing, allowed = int((a != b).sum()), max(2, int(b.size * 8 * CODES_DIFFERING))
            assert differing <= allowed, f"{name}: {differing} of {b.size} bytes of array {i} differ"
        else:
            assert_close(f"{name}, array {i}", a, b, "float16")


@every_method
@pytest.mark.parametrize("which", [0, 1, 2])
def test_bits_are_the_bytes_of_the_arrays(name, which):
    bits = BITS[name][which]
    plan, stored = plan_of(name, bits), 0
    for row in range(MODEL.layers):
        chunk = make_codec(ops, plan, row).encode(*MODEL.sample(1, CHUNK_TOKENS, layer=row), 4)
        stored += nbytes(chunk)
    assert plan.bits_per_element == 8 * stored / (CHUNK_TOKENS * elements_per_token(MODEL.shape)) <= bits
    assert plan.bits_per_element > 0.9 * bits, "a budget that is not used"


@every_method
def test_arrays_are_those_that_a_file_expects(xp, name):
    plan = plan_of(name)
    chunk = make_codec(xp, plan, 1).encode(*arrays(xp, *MODEL.sample(1, 256, batch=3, layer=1)), 4)
    assert sizes(chunk) == plan.chunk_arrays(1, 3, 256)


@every_method
def test_error_falls_with_bits(name):
    keys, values = MODEL.sample(1, 512)
    errors = []
    for bits in BITS[name]:
        codec = make_codec(ops, plan_of(name, bits), 0)
        got = decoded(codec, codec.encode(keys, values, 0))
        errors.append([relative_rms(got[0], keys), relative_rms(got[1], values)])
    errors = np.array(errors)
    exact = errors[0, 1] < 1e-3  # a method that keeps values
    assert np.all(np.diff(errors[:, : 2 - exact], axis=0) < 0), errors
    assert errors[-1].max() < 0.12, errors


@every_method
def test_every_library_gives_the_codes_of_the_reference(xp, name):
    plan, sample = plan_of(name), MODEL.sample(1, 512, batch=2)
    reference, codec = make_codec(ops, plan, 0), make_codec(xp, plan, 0)
    expected, got = reference.encode(*sample, 36), codec.encode(*arrays(xp, *sample), 36)
    assert_same_codes(name, [np.asarray(xp.to_numpy(a)) for a in got.arrays], expected.arrays)
    moved = Chunk(2, 36, 512, arrays(xp, *expected.arrays))
    for side, a, b in zip(("keys", "values"), decoded(codec, moved), decoded(reference, expected)):
        assert_close(side, a, b)


@every_method
@pytest.mark.parametrize("pieces", [(128,) * 4, (256, 128, 128)])
def test_appending_equals_encoding_at_once(xp, name, pieces):
    codec = make_codec(xp, plan_of(name), 0)
    keys, values = arrays(xp, *MODEL.sample(1, 512, batch=2))
    chunk, done = codec.encode(keys[:, :, : pieces[0]], values[:, :, : pieces[0]], 4), pieces[0]
    for piece in pieces[1:]:
        chunk = codec.append(chunk, keys[:, :, done : done + piece], values[:, :, done : done + piece])
        done += piece
    if name == "think":  # a chunk has the channels of the tokens that it started with
        whole = codec.encode(keys[:, :, : pieces[0]], values[:, :, : pieces[0]], 4)
        whole = codec.append(whole, keys[:, :, pieces[0] :], values[:, :, pieces[0] :])
    else:
        whole = codec.encode(keys, values, 4)
    assert chunk.tokens == 512 and sizes(chunk) == sizes(whole)
    assert_same_codes(name, [xp.to_numpy(a) for a in chunk.arrays], [xp.to_numpy(a) for a in whole.arrays])


@every_method
def test_attention_is_attention_over_decoded_vectors(xp, name):
    codec = make_codec(xp, plan_of(name), 0)
    parts = MODEL.sample(1, 300, batch=2)
    chunk = codec.encode(*arrays(xp, *(x[:, :, 4:260] for x in parts)), 4)
    queries = MODEL.queries(1, 3, 2)
    rows = group_queries(xp.asarray(queries), MODEL.kv_heads)
    exact = [x[:, :, 260:] for x in parts]  # without which a score that is off by a constant would not be seen
    partials = [codec.attend(chunk, rows, 0.125), dense_partial(xp, rows, *arrays(xp, *exact), 0.125)]
    got = xp.to_numpy(merge_partials(xp, partials)).reshape(queries.shape)
    keys, values = (np.concatenate(pair, axis=2) for pair in zip(decoded(codec, chunk), exact))
    expected = [attention(queries[:, :, i : i + 1], keys, values, 0.125) for i in range(3)]
    assert_close("output", got, np.concatenate(expected, axis=2), limit=ATTENTION_RMS)


@every_method
def test_cut_and_selected_rows(xp, name):
    codec = make_codec(xp, plan_of(name), 0)
    chunk = codec.encode(*arrays(xp, *MODEL.sample(1, 384, batch=3)), 4)
    cut = codec.cut(chunk, 128)
    assert (cut.start, cut.tokens) == (4, 128) and nbytes(cut) < nbytes(chunk) / 2
    picked = cut.of_sequences(xp, xp.asarray(np.array([2, 0, 2], np.int32)))
    for got, whole in zip(decoded(codec, picked), decoded(codec, chunk)):
        assert_close("decoded", got, whole[[2, 0, 2], :, :128], limit=1e-6)


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_cannot_be_stored_are_refused(xp, name, bad, side):
    codec = make_codec(xp, plan_of(name, BITS[name][2]), 0)
    parts = MODEL.sample(1, 128)
    chunk = codec.encode(*arrays(xp, *parts), 4)
    parts[side][0, 1, 7] = bad
    for call in (lambda: codec.encode(*arrays(xp, *parts), 4), lambda: codec.append(chunk, *arrays(xp, *parts))):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()


@every_method
def test_vectors_of_zeros_and_constants_survive(name):
    codec = make_codec(ops, plan_of(name), 0)
    for value in (0.0, 1.5):
        x = np.full((1, 2, 128, 64), value, np.float32)
        for got in decoded(codec, codec.encode(x, x, 0)):
            assert np.isfinite(got).all()


@pytest.mark.parametrize(
    "name, sizes",
    [
        (name, sizes)
        for name in LIVE
        for sizes in ((700,), (300, 1, 1, 98, 300), (7,) * 100)
        if name != "think" or len(sizes) == 1  # whose chunk has the channels of the tokens that it started with
    ],
)
def test_the_live_cache_seals_whole_blocks(xp, name, sizes):
    codec = make_codec(xp, plan_of(name), 0)
    keys, values = MODEL.sample(1, 700)
    once, cache = (LayerCache(xp, codec, 4, 64) for _ in range(2))
    once.append(*arrays(xp, keys, values))
    done = 0
    for size in sizes:
        cache.append(*arrays(xp, keys[:, :, done : done + size], values[:, :, done : done + size]))
        done += size
    seal = max(16, get_method(name).block)
    assert cache.padding_groups[0].sealed == (700 - 68) // seal * seal == once.padding_groups[0].sealed
    for got, expected in zip(cache.padding_groups[0].chunks, once.padding_groups[0].chunks, strict=True):
        assert_same_codes(name, *([xp.to_numpy(a) for a in c.arrays] for c in (got, expected)))
    before = cache.dense()
    cache.crop(250)  # into a sealed block, which is decoded
    for got, expected in zip(cache.dense(), before):
        assert_close("dense", xp.to_numpy(got), xp.to_numpy(expected)[:, :, :450], limit=1e-6)


def test_a_plan_names_what_can_be_reached():
    for name, bits, words in (
        ("kivi", 2.9, r"3, 4, 5, 6, 7, 9 for kivi, received 2\.9"),
        ("turboquant", 1.2, r"1\.25, 2\.25, .*8\.25 for turboquant, received 1\.2"),
        ("turboquant-qjl", 9, r"1\.375, .* for turboquant-qjl, received 9"),
        ("jarviskv", 0.5, r"between 0\.875 and 8\.5 for jarviskv"),
        ("svdq", 8, r"between 8\.07812 and 12\.125 for svdq"),
        ("eigen-attention", 0.2, r"between 0\.25 and 16 for eigen-attention"),
        ("think", 8, r"between 8\.12\d* and 16\.000\d* for think"),
    ):
        with pytest.raises(ValueError, match=words):
            plan_of(name, bits)
    with pytest.raises(ValueError, match="multiple of the group of 32 channels, received head_dim 80"):
        plan_of("kivi", 5, ToyModel(80))
    with pytest.raises(ValueError, match="Expected a profile for the method svdq"):
        make_plan(MODEL.shape, None, "svdq", 9)


@every_method
def test_default_bits_and_budgets_in_bytes(name):
    plan = make_plan(MODEL.shape, profile_of(name), name)
    low, high = bits_range(plan.method, MODEL.shape)
    assert low <= plan.bits_per_element <= plan.bits <= high
    block = max(16, plan.method.block)
    exact = (68 + block - 1) * elements_per_token(MODEL.shape) * 2
    budget = int(exact + (low + 1) / 8 * (2000 - 68 - block + 1) * elements_per_token(MODEL.shape))
    plan, _ = CacheRequest(name, budget_bytes=budget, max_context=2000).plan(MODEL.shape, profile_of(name))
    held = 0
    for row in range(MODEL.layers):
        cache = LayerCache(ops, make_codec(ops, plan, row), 4, 64)
        cache.append(*(x.astype(np.float16) for x in MODEL.sample(1, 2000, layer=row)))
        held += sum(a.nbytes for a in cache.arrays())
    assert held <= budget


@every_method
def test_plans_are_told_apart_and_alike(name):
    hashes = [plan_of(name, bits).hash for bits in BITS[name]]
    assert len(set(hashes)) == 3
    assert [make_plan(MODEL.shape, profile_of(name), METHODS[name], bits).hash for bits in BITS[name]] == hashes


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 7])
def test_awkward_head_dims_rotate(dim):
    for matrix in (hadamard(dim), random_rotation(dim)):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-6)
    spread = np.abs(random_rotation(dim)).max() * np.sqrt(dim)
    assert spread < 1.01 if dim in (64, 128) else spread < 2
    assert set(np.unique(random_signs(999, "x"))) == {-1.0, 1.0} and abs(random_signs(999, "x").mean()) < 0.1


def test_hadamard_is_sylvesters():
    i = np.arange(64)
    parity = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    np.testing.assert_allclose(hadamard(64), np.where(parity, -1, 1) / 8, atol=1e-12)


# the papers' formulas, written again without the library's parts


@pytest.mark.parametrize("bits, width", [(3, 2), (5, 4)])
def test_kivi_is_its_paper(bits, width):
    """Keys in groups of 32 tokens of a channel, values in groups of 32 channels of a token; zero point and scale."""

    def group(x):
        low, high = x.min(), x.max()
        scale, zero = np.float64(np.float16((high - low) / (2**width - 1))), np.float64(np.float16(low))
        return np.clip(np.rint((x - zero) / scale), 0, 2**width - 1) * scale + zero

    keys, values = MODEL.sample(1, 64)
    expected = keys.astype(np.float64), values.astype(np.float64)
    for h in range(2):
        for t in range(0, 64, 32):
            for d in range(64):
                expected[0][0, h, t : t + 32, d] = group(keys[0, h, t : t + 32, d].astype(np.float64))
        for t in range(64):
            for d in range(0, 64, 32):
                expected[1][0, h, t, d : d + 32] = group(values[0, h, t, d : d + 32].astype(np.float64))
    codec = make_codec(ops, plan_of("kivi", bits), 0)
    for side, got, wanted in zip(("keys", "values"), decoded(codec, codec.encode(keys, values, 0)), expected):
        assert_close(side, got, wanted, limit=2e-3)  # a tie may fall to the other side


CODEBOOK = np.array([-1.510, -0.4528, 0.4528, 1.510])  # Lloyd-Max of the normal density at 2 bits


def assert_most_close(got, expected) -> None:
    """Vectors alike to half precision, but for those few of which a coordinate lies next to a threshold."""
    error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.quantile(error, 0.8) < 3e-3, np.quantile(error, [0.5, 0.8, 0.9, 1])


def rotated_and_coded(x, sign_name="rotation"):
    """Unit vectors rotated, times sqrt(d), and the nearest entries of the codebook."""
    dim = x.shape[-1]
    i = np.arange(dim)
    walsh = np.array([[(-1) ** bin(a & b).count("1") for b in i] for a in i]) / np.sqrt(dim)
    rotation = random_signs(dim, f"spectralkv {sign_name} {dim}")[:, None] * walsh
    z = (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ rotation * np.sqrt(dim)
    return z, CODEBOOK[np.abs(z[..., None] - CODEBOOK).argmin(-1)], rotation


def test_turboquant_is_its_paper():
    keys, values = MODEL.sample(1, 64)
    codec = make_codec(ops, plan_of("turboquant", 2.25), 0)
    for x, got in zip((keys, values), decoded(codec, codec.encode(keys, values, 0))):
        _, near, rotation = rotated_and_coded(x.astype(np.float64))
        expected = near @ rotation.T
        expected *= np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(expected, axis=-1, keepdims=True)
        assert_most_close(got, expected)
        np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=2e-3)
        assert abs(relative_rms(got, x) ** 2 - 0.117) < 0.02  # the distortion that the paper gives for 2 bits


def test_turboquant_qjl_is_its_paper():
    """3 bits: 2 of the codebook, and the sketch; <q, x> ~ <q, x_hat> + |e| sqrt(pi / 2) / sqrt(d) <S q, sign(S e)>."""
    keys, values = MODEL.sample(1, 256)
    codec = make_codec(ops, plan_of("turboquant-qjl", 3.375), 0)
    assert codec.bits == (2, 3)
    got, _ = decoded(codec, codec.encode(keys, values, 0))
    z, near, rotation = rotated_and_coded(keys.astype(np.float64))
    _, _, sketch = rotated_and_coded(np.ones((1, 64)), "sketch")
    norm = np.linalg.norm(keys, axis=-1, keepdims=True)
    e = (z - near) / 8 * norm
    y = (
        near / 8 * norm
        + np.linalg.norm(e, axis=-1, keepdims=True) * np.sqrt(np.pi / 2) / 8 * np.sign(e @ sketch) @ sketch.T
    )
    assert_most_close(got, y @ rotation.T)
    slope = (got * keys).sum() / (keys * keys).sum()
    assert abs(slope - 1) < 0.01  # unbiased, where the codebook alone shrinks
    alone = near @ rotation.T / 8 * norm
    assert (alone * keys).sum() / (keys * keys).sum() < 0.9


def test_jarviskv_is_what_was_described():
    plan = plan_of("jarviskv", 4)
    codec, basis_set = make_codec(ops, plan, 1), plan.profile.basis_set("head.post")
    parts = MODEL.sample(1, 64, layer=1)
    for side, (x, got) in enumerate(zip(parts, decoded(codec, codec.encode(*parts, 0)))):
        rank, half = int(plan.ranks[1, side]), 2 ** (plan.code_bits - 1)
        u, _, v = np.linalg.svd(basis_set.basis[1, 2 * side : 2 * side + 2].astype(np.float64))
        basis = (u @ v)[..., :rank]  # orthonormal again after the file's 8 bits
        mean = basis_set.mean[1, 2 * side : 2 * side + 2, None].astype(np.float64)
        y = (x - mean) @ basis @ random_rotation(rank)
        s = np.float16(np.abs(y).max(-1, keepdims=True) / (half - 0.5)).astype(float)  # the peak lies on a threshold
        near = np.clip(np.rint(y / s), -half, half - 1) * s
        left = y - near
        near = near + np.where(left >= 0, 1, -1) * np.abs(left).mean(-1, keepdims=True)
        expected = near @ random_rotation(rank).T @ np.swapaxes(basis, -1, -2) + mean
        assert_most_close(got, expected)
        assert np.square(y - near).sum() < 0.4 * np.square(left).sum()  # a quarter, if the rest were uniform


def sampled(model=MODEL, layer=0):
    """The toy's calibration vectors [2H, n, D], keys before RoPE."""
    parts = []
    for document in range(3):
        keys, values = model.sample(500 + document, 500, layer=layer)
        x = np.concatenate([unrotate(ops, keys, model.rope, 0), values], axis=1)[0]
        parts.append(x[:, 4 : 4 + 496])
    return np.concatenate(parts, axis=1).astype(np.float64)


def test_moments_are_those_of_the_calibration_vectors():
    profile, x = toy_profile_of(MODEL, "layer", "pre"), sampled(layer=1)
    flat = np.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
    assert_close("means", means(profile, 1), x.mean(1), limit=1e-4)
    assert_close("covariance", covariance(profile, 1, 0, 4), np.cov(flat.T, bias=True), limit=0.03)
    assert_close("keys", covariance(profile, 1, 0, 2), np.cov(flat[:, :128].T, bias=True), limit=0.03)
    assert_close("of heads", head_moments(profile, 1), np.swapaxes(x, -1, -2) @ x / x.shape[1], limit=0.03)
    queries = (MODEL.queries(1, 500)[0] + 1) * 0.125
    queries = unrotate(ops, queries, MODEL.rope, 0).astype(np.float64).reshape(2, 2, 500, 64)
    moment = np.einsum("hgti,hgtj->hij", queries, queries) / 1000
    assert_close("queries", query_moment(profile, 1), moment, limit=0.01)


def test_energy_after_rotation_is_the_mean_over_positions():
    moment = query_moment(toy_profile_of(MODEL, "head", "post"), 0)
    value, vectors = np.linalg.eigh(moment)
    columns = np.swapaxes(vectors * np.sqrt(np.maximum(value, 0))[:, None], -1, -2)  # [H, 64 vectors, D]
    energy = np.mean(
        [np.square(rotate(ops, columns[..., None, :], MODEL.rope, t)).sum((1, 2)) for t in range(50)], axis=0
    )
    np.testing.assert_allclose(rotated_energy(moment, MODEL.rope, 50), energy, rtol=1e-4)


@pytest.mark.parametrize("bits, widths", [(8.5, (4, 3)), (9.1, (8, 6, 2))])
def test_svdq_is_its_paper(bits, widths):
    plan = plan_of("svdq", bits)
    assert plan.widths == widths + (8 - len(widths)) * (0,)
    codec = make_codec(ops, plan, 0)
    keys, values = MODEL.sample(1, 300)
    keys, values = keys[:, :, 20:276], values[:, :, 20:276]
    got_keys, got_values = decoded(codec, codec.encode(keys, values, 20))
    assert_close("values", got_values, values.astype(np.float16))
    x = sampled()[:2]
    flat = np.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
    _, vectors = np.linalg.eigh(covariance(plan.profile, 0, 0, 2))
    vectors = vectors[:, ::-1]
    joint = np.moveaxis(unrotate(ops, keys, MODEL.rope, 20)[0], 0, 1).reshape(256, 128).astype(np.float64)
    mean = means(plan.profile, 0)[:2].reshape(-1)
    assert_close("mean", mean, flat.mean(0), limit=1e-4)
    z = (joint - mean) @ vectors
    near = np.zeros_like(z)
    for block in range(0, 256, 128):
        for channel, width in enumerate(np.repeat(plan.widths, 16)):
            if width:
                part = z[block : block + 128, channel]
                step = (part.max() - part.min()) / 2**width
                cell = np.clip(np.floor((part - part.min()) / step), 0, 2**width - 1)
                near[block : block + 128, channel] = part.min() + (cell + 0.5) * step
    expected = np.moveaxis((near @ vectors.T + mean).reshape(256, 2, 64), 1, 0)[None].astype(np.float32)
    assert_close("keys", got_keys, rotate(ops, expected, MODEL.rope, 20), limit=0.02)
    got = np.moveaxis(unrotate(ops, got_keys, MODEL.rope, 20)[0], 0, 1).reshape(256, 128)
    error = (
        np.linalg.norm((got - mean) @ vectors - near, axis=0)[near.any(0)] / np.linalg.norm(near, axis=0)[near.any(0)]
    )
    assert np.median(error) < 0.02, error  # of every channel alike, strong and weak


def test_svdq_keeps_a_group_at_its_lowest_bits():
    """Bits at which the greedy schedule would leave every group out."""
    low = bits_range(METHODS["svdq"], MODEL.shape)[0]
    plan = plan_of("svdq", low + 0.02)
    assert plan.widths == (1,) + 7 * (0,) and plan.bits_per_element == low
    keys, values = MODEL.sample(1, 128)
    codec = make_codec(ops, plan, 0)
    assert relative_rms(decoded(codec, codec.encode(keys, values, 0))[0], keys) < 1


def test_eigen_attention_is_its_paper():
    plan = plan_of("eigen-attention", 8)
    rank_k, rank_v = plan.ranks[0].tolist()
    codec = make_codec(ops, plan, 0)
    keys, values = MODEL.sample(1, 128)
    got_keys, got_values = decoded(codec, codec.encode(keys[:, :, 36:], values[:, :, 36:], 36))
    moments, asked = head_moments(plan.profile, 0), query_moment(plan.profile, 0)
    plain = unrotate(ops, keys, MODEL.rope, 0)
    for h in range(2):
        stacked = np.concatenate(  # roots of the moments stand for the samples
            [np.linalg.cholesky(m / np.trace(m) + 1e-12 * np.eye(64)).T for m in (moments[h], asked[h])]
        )
        u = np.linalg.svd(stacked)[2][:rank_k]
        expected = rotate(ops, (plain[0, h] @ u.T @ u).astype(np.float32), MODEL.rope, 0)
        assert_close("keys", got_keys[0, h], expected[36:], limit=2e-3)
        u = np.linalg.svd(np.linalg.cholesky(moments[2 + h] + 1e-12 * np.eye(64)).T)[2][:rank_v]
        assert_close("values", got_values[0, h], (values[0, h] @ u.T @ u)[36:], limit=2e-3)


def test_think_is_its_paper():
    plan = plan_of("think", 12)
    assert plan.channels == 31  # half of them, less the mask
    codec = make_codec(ops, plan, 0)
    keys, values = MODEL.sample(1, 64)
    got_keys, got_values = decoded(codec, codec.encode(keys, values, 0))
    positions = plan.profile.calibration.get("positions", 2048)
    energy = rotated_energy(query_moment(plan.profile, 0), MODEL.rope, positions)
    for h in range(2):
        score = energy[h] * np.square(keys[0, h]).mean(0)
        best = set(np.argsort(-score)[:31].tolist())
        for d in range(64):
            expected = keys[0, h, :, d].astype(np.float16) if d in best else np.zeros(64)
            np.testing.assert_array_equal(got_keys[0, h, :, d], expected)
    np.testing.assert_array_equal(got_values, values.astype(np.float16))

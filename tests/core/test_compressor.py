"""The quick start of the first spectral-kv library: projections, codes of one head, scores in the latent space."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of

from spectral_kv_core.compat.compressor import CompressedKV, Compressor
from spectral_kv_core.profile.profile import Profile
from spectral_kv_core.profile.projection import Projection
from spectral_kv_core.quantization.quantizer import gaussian_tables


@pytest.fixture(scope="module")
def compressor(xp):
    """The class of one array library."""
    return type("SpectralKVCompressor", (Compressor,), {"xp": xp})


def array(xp, x):
    return xp.asarray(np.ascontiguousarray(x, np.float32))


def noise(*shape, seed: int = 0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pearson(a, b) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def isotropic(dim: int, rank: int) -> Projection:
    """Any `rank` directions of isotropic noise: no choice of them is better than another."""
    basis, _ = np.linalg.qr(noise(dim, rank, seed=5).astype(np.float64))
    return Projection("noise", 0, 0, "keys", np.zeros(dim), basis, np.ones(rank), gaussian_tables())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_latent_scores_are_those_of_the_keys(xp, compressor, bits):
    """Keys of planted rank: at 12 of 64 components the scores are nearly right."""
    model = ToyModel()
    keys = model.sample(7, 256)[0][0, 1]
    made = compressor(toy_profile_of(model).get_projection(layer=0, head=1, rank=model.planted), bits)
    codes = made.compress(array(xp, keys))
    query = noise(5, 64)
    scores = xp.to_numpy(made.approximate_attention(codes, array(xp, query)))
    assert scores.shape == (5, 256)
    expected = query @ keys.T
    centered = [pearson(s, e) for s, e in zip(scores, expected)]  # query by query: an offset of a row is no merit
    assert min(centered) > {2: 0.92, 4: 0.95, 8: 0.98}[bits], centered
    # the very same numbers as with the keys that the codes stand for: nothing is rebuilt, nothing else is lost
    rebuilt = query @ xp.to_numpy(made.decompress(codes)).T
    np.testing.assert_allclose(scores, rebuilt, atol=2e-3, rtol=1e-4)


def test_more_bits_and_more_components_come_closer(xp, compressor):
    model = ToyModel()
    keys = array(xp, model.sample(3, 200)[0][0, 0])
    profile = toy_profile_of(model)

    def error(rank, bits):
        made = compressor(profile.get_projection(0, 0, rank=rank), bits)
        return float(np.square(xp.to_numpy(made.decompress(made.compress(keys))) - xp.to_numpy(keys)).mean())

    by_bits = [error(12, bits) for bits in (1, 2, 4, 8)]
    by_rank = [error(rank, 8) for rank in (2, 6, 12, 64)]
    assert by_bits == sorted(by_bits, reverse=True) and by_rank == sorted(by_rank, reverse=True)
    assert by_rank[-1] < 1e-3 * np.square(xp.to_numpy(keys)).mean()


def test_isotropic_noise_does_not_come_through(compressor, xp):
    """torch.randn keys at rank 4 of 128, as that library's example has them, cannot reach its claimed 0.95.

    The latent scores keep sqrt(4 / 128) = 0.18 of the correlation, at any number of bits.
    """
    made = compressor(isotropic(128, 4), 8)
    keys, query = noise(4000, 128, seed=1), noise(20, 128, seed=2)
    scores = xp.to_numpy(made.approximate_attention(made.compress(array(xp, keys)), array(xp, query)))
    assert pearson(scores, query @ keys.T) == pytest.approx(np.sqrt(4 / 128), abs=0.03)


def test_values_have_components_of_their_own(compressor, xp):
    model = ToyModel()
    values = model.sample(9, 160)[1][0, 0]
    profile = toy_profile_of(model)
    error = {}
    for side in ("keys", "values"):
        made = compressor(profile.get_projection(0, 0, side, rank=12), 6)
        error[side] = float(np.square(xp.to_numpy(made.decompress(made.compress(array(xp, values)))) - values).mean())
    assert error["values"] < 0.1 * error["keys"]


@pytest.mark.parametrize("tokens", [1, 7, 8, 63, 257])
def test_bytes_are_real(xp, compressor, tokens):
    made = compressor(toy_profile_of(ToyModel()).get_projection(0, 0, rank=10), 3.5)
    codes = made.compress(array(xp, noise(tokens, 64)))
    assert isinstance(codes, CompressedKV) and codes.tokens == tokens
    held = sum(xp.to_numpy(x).nbytes for x in codes.arrays)
    assert codes.nbytes == held and 8 * held >= made.bits_per_token * tokens
    assert made.bits_per_token <= 35 and 8 * held < made.bits_per_token * tokens + 8 * 8 * len(codes.arrays)
    if tokens % 8 == 0:
        assert made.compression_ratio() == made.compression_ratio(codes) == 2 * 64 * tokens / held
    assert made.compression_ratio() == 16 * 64 / made.bits_per_token >= made.compression_ratio(codes)
    assert made.vram_saved_mb(100) == pytest.approx(100 - 100 / made.compression_ratio())
    out = made.decompress(codes)
    assert tuple(out.shape) == (tokens, 64) and out.dtype == array(xp, noise(1)).dtype


def test_projection_of_a_profile():
    profile = toy_profile_of(ToyModel())
    whole = profile.get_projection(layer=1, head=0, rank=64)
    np.testing.assert_allclose(whole.basis.T @ whole.basis, np.eye(64), atol=1e-6)
    assert np.all(np.diff(whole.variance) <= 1e-6) and whole.head_dim == whole.rank == 64
    by_energy = [profile.get_projection(1, 0, energy=e).rank for e in (0.5, 0.95, 1.0)]
    assert by_energy == sorted(by_energy) and by_energy[1] == profile.get_projection(1, 0).rank == 12
    kept = profile.get_projection(1, 0).variance.sum() / whole.variance.sum()
    assert kept >= 0.95


def test_saved_under_a_name_without_a_suffix(tmp_path):
    """profile.save("profiles/gemma2_2b"), as that library has it."""
    toy_profile_of(ToyModel()).save(str(tmp_path / "profiles" / "gemma2_2b"))
    assert Profile.load(str(tmp_path / "profiles" / "gemma2_2b")).get_projection(layer=0, head=0).layer == 0


def test_wrong_shapes_and_numbers_are_loud(compressor, xp):
    profile = toy_profile_of(ToyModel())
    for arguments, message in (
        ({"layer": 2, "head": 0}, "compressible layer"),
        ({"layer": -1, "head": 0}, "compressible layer"),
        ({"layer": 0, "head": 2}, "KV head between 0 and 1"),
        ({"layer": 0, "head": 0, "side": "queries"}, "side"),
        ({"layer": 0, "head": 0, "rank": 65}, "rank between 1 and 64"),
        ({"layer": 0, "head": 0, "rank": 0}, "rank between 1 and 64"),
        ({"layer": 0, "head": 0, "energy": 1.5}, "energy"),
        ({"layer": 0, "head": 0, "energy": 0.5, "rank": 3}, "both"),
    ):
        with pytest.raises(ValueError, match=message):
            profile.get_projection(**arguments)
    with pytest.raises(ValueError, match=r"head\.post.*Calibrate again"):
        toy_profile_of(ToyModel(), "layer", "pre").get_projection(0, 0)
    projection = profile.get_projection(0, 0)
    for bits in (0, -1, 9, "4", 0.01, float("nan")):
        with pytest.raises(ValueError, match="Expected bits"):
            compressor(projection, bits)
    with pytest.raises(TypeError, match="get_projection"):
        compressor(profile, 4)
    made = compressor(projection=projection, bits=4)
    for shape in ((32, 128), (1, 32, 64), (64,)):
        with pytest.raises(ValueError, match=r"keys of shape \(tokens, 64\)"):
            made.compress(array(xp, noise(*shape)))
    codes = made.compress(array(xp, noise(32, 64)))
    with pytest.raises(ValueError, match=r"queries of shape \(queries, 64\)"):
        made.approximate_attention(codes, array(xp, noise(1, 128)))
    with pytest.raises(ValueError, match="NaN"):
        made.compress(array(xp, np.full((4, 64), np.nan)))
    others = profile.get_projection(0, 1), profile.get_projection(0, 0, "values"), profile.get_projection(0, 0, rank=2)
    for other in [compressor(projection, 1), *(compressor(p, 4) for p in others)]:
        with pytest.raises(ValueError, match="with the compressor that compressed"):
            other.decompress(codes)
    with pytest.raises(ValueError, match="received a "):
        made.approximate_attention(codes.arrays[0], array(xp, noise(1, 64)))
    with pytest.raises(ValueError, match="0 MB or more"):
        made.vram_saved_mb(-1)

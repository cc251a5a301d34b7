"""Calibration: documents, the spool, and bases that hold at positions where no document stood."""

from __future__ import annotations

import numpy as np
import pytest
from cases import ToyModel
from tolerances import relative_rms

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import shift
from spectral_kv_core.calibration.basis_fit import fit_basis_set
from spectral_kv_core.calibration.spool import Spool
from spectral_kv_core.calibration.text import check_texts, split_documents
from spectral_kv_core.codecs.chunk import AdaptedChunk
from spectral_kv_core.codecs.registry import make_codec, make_plan
from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.profile import Profile

MODEL = ToyModel(rotated=True)


def profile(positions: int) -> Profile:
    with Spool() as spool:
        for d in range(4):
            for row in range(MODEL.layers):
                keys, values = MODEL.sample(d, 400, layer=row)
                gradients = np.random.default_rng(d).standard_normal((2, 1, *keys.shape[1:])).astype(np.float32)
                spool.add(row, d, keys[0], values[0], gradients[0], gradients[1])
        basis_set = fit_basis_set(spool, MODEL.shape, positions=positions)
    return Profile(MODEL.shape, "toy", {}, {basis_set.name: basis_set})


def key_error(fitted: Profile, place: int) -> float:
    """Relative RMS error of decoded keys of an unseen document that starts at `place`, 3 bits."""
    codec = make_codec(ops, make_plan(MODEL.shape, fitted, "spectral", 3.0), 0)
    keys, values = MODEL.sample(77, 320)
    keys = shift(ops, keys, MODEL.rope, place)
    decoded, _ = codec.decode(codec.encode(keys, values, place))
    return float(np.sqrt(np.square(decoded - keys).mean() / np.square(keys).mean()))


def test_bases_hold_at_positions_where_no_document_stood():
    near, spread = profile(0), profile(16_000)
    assert key_error(spread, 12_000) < 0.8 * key_error(near, 12_000)
    assert key_error(spread, 12_000) < 1.3 * key_error(spread, 0)


def test_documents_are_mixed_and_bounded():
    texts = ["a" * 1000, "b" * 3000, "c" * 500]
    documents = split_documents(texts, lambda t: [ord(c) for c in t], 600, 2000)
    assert [(chr(d[0]), len(d)) for d in documents] == [("a", 600), ("b", 600), ("c", 500), ("a", 300)]
    with pytest.raises(ValueError, match="at least 64 tokens"):
        split_documents(["too short"], lambda t: [1, 2, 3], 600, 2000)


def test_short_texts_are_joined_where_the_others_are_not_enough():
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    joined = split_documents([f"{i:9}." for i in range(100)], encode, 600, 2000)
    assert [len(d) for d in joined] == [600, 598] and joined[0][:22] == encode("        0.\n\n        1.")
    mixed = ["a" * 300, "b" * 40, "c" * 40]
    assert [len(d) for d in split_documents(mixed, encode, 600, 2000)] == [300, 82]
    assert [len(d) for d in split_documents(mixed, encode, 600, 300)] == [300]


def test_texts_are_strings_and_one_string_is_one_text():
    assert check_texts("one string") == ["one string"] and check_texts(("a", "b")) == ["a", "b"]
    for wrong in (5, [b"bytes"], [["a"]]):
        with pytest.raises(UsageError, match="texts to be strings, received a (int|bytes|list)"):
            check_texts(wrong)


def test_spool_keeps_small_changes_around_a_large_mean():
    """Strongly biased keys (Qwen2): float16 of the raw values would lose what varies."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 50, 8)).astype(np.float32) + 1000
    gradients = rng.standard_normal((2, 1, 50, 8)).astype(np.float32) * 1e-9
    with Spool() as spool:
        spool.add(0, 0, x, -x, gradients, gradients)
        ((got, slopes),) = spool.read(0)
        with pytest.raises(ValueError, match="NaN"):
            spool.add(0, 1, x * np.nan, x, gradients, gradients)
    np.testing.assert_allclose(got[0], x[0], atol=2e-3)
    np.testing.assert_allclose(slopes[:, 0], gradients[:, 0], atol=2e-12)
    assert not spool._path(0, 0).exists()


def thin_profile(tokens: int, documents: int) -> Profile:
    """From so few tokens in all that the last axes fit noise."""
    model = ToyModel(planted=4)
    with Spool() as spool:
        for d in range(documents):
            keys, values = model.sample(d, tokens // documents)
            gradients = np.random.default_rng(d).standard_normal((2, 1, *keys.shape[1:])).astype(np.float32)
            for row in range(model.layers):
                spool.add(row, d, keys[0], values[0], gradients[0], gradients[1])
        basis_set = fit_basis_set(spool, model.shape)
    return Profile(model.shape, "toy", {}, {basis_set.name: basis_set})


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_thin_text_does_not_flatter_the_last_axes(documents):
    model, fitted = ToyModel(planted=4), thin_profile(240, documents)
    basis_set = fitted.basis_set("head.post")
    keys, values = model.sample(77, 320)
    codec = make_codec(ops, make_plan(model.shape, fitted, "spectral", 8.0), 0)
    z, _ = codec.coefficients(keys, values, 0)
    last = np.square(z[..., -16:]).mean()  # in variances of the profile: 1 where it knows
    assert 1 / 3 < last < 3
    assert basis_set.levels[8][-1] > 8  # further than what was seen, so that nothing is clipped
    decoded = codec.decode(codec.encode(keys, values, 0))
    for got, expected in zip(decoded, (keys, values), strict=True):
        assert relative_rms(got, expected) < 0.02


def test_axes_without_variance_stay_decodable():
    """Few distinct vectors have less rank than channels: other text moves along axes that never moved."""
    model = ToyModel()
    with Spool() as spool:
        for d in range(2):
            keys, values = model.sample(d, 16)
            keys, values = (np.tile(x, (1, 1, 30, 1)) for x in (keys, values))
            gradients = np.random.default_rng(d).standard_normal((2, 1, *keys.shape[1:])).astype(np.float32)
            for row in range(model.layers):
                spool.add(row, d, keys[0], values[0], gradients[0], gradients[1])
        basis_set = fit_basis_set(spool, model.shape)
    variance = basis_set.variance
    assert (variance >= 0.9e-6 * variance.mean((-1, -2), keepdims=True)).all()


def test_a_gain_of_any_size_decodes_to_finite_numbers():
    fitted = profile(0)
    fitted.basis_sets["head.post"].variance[:] *= 1e-14  # an old profile, of text that did not move
    codec = make_codec(ops, make_plan(MODEL.shape, fitted, "spectral", 8.0), 0)
    keys, values = MODEL.sample(77, 64)
    chunks = codec.extend([], keys, values, 0, adapts=True)
    assert any(isinstance(chunk, AdaptedChunk) for chunk in chunks)
    assert all(np.isfinite(x).all() for chunk in chunks for x in codec.decode(chunk))

"""Which layers of a surveyed model are compressed."""

from dataclasses import replace

import numpy as np
import pytest

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import Rope, shift
from spectral_kv_core.arrays.rope_fit import SHIFTS, fit_rope
from spectral_kv_core.errors import UsageError
from spectral_kv_core.profile.file_checks import shape_of
from spectral_kv_core.profile.model_shape import ModelShape
from spectral_kv_core.profile.model_survey import CODES, DECODED, PASSED, LayerSurvey, surveyed_shape


def layer(way=CODES, reason="", q_heads=8, kv_heads=2, key_dim=64, value_dim=64, rope=None):
    return LayerSurvey(way, reason, q_heads, kv_heads, key_dim, value_dim, rope)


def test_layers_that_are_read_in_any_way_are_compressed_together():
    rope = Rope((1.0, 0.1))
    shape, passed = surveyed_shape(
        512, [layer(rope=rope), layer(DECODED, "position bias"), layer(PASSED, "sliding window")]
    )
    assert (shape.num_layers, shape.hidden_size, shape.layers) == (3, 512, (0, 1))
    assert (shape.q_heads, shape.kv_heads, shape.head_dim, shape.rope) == (8, 2, 64, rope)
    assert passed == {2: "sliding window"}


def test_layers_of_another_form_are_passed_through_with_the_reason():
    wide = layer(key_dim=128, value_dim=128)
    shape, passed = surveyed_shape(512, [wide, layer(), layer(), layer(key_dim=192, value_dim=128)])
    assert shape.layers == (1, 2) and shape.head_dim == 64
    assert passed == {
        0: "2 KV heads of 128 channels where most layers have 2 of 64",
        3: "keys of 192 channels and values of 128",
    }


def test_what_differs_is_told_and_nothing_else():
    others = [layer(q_heads=4), layer(kv_heads=1), layer(value_dim=32)]
    _, passed = surveyed_shape(512, [layer(), layer(), *others], widens=True)
    assert list(passed.values()) == [
        "4 query heads where most layers have 8",
        "1 KV heads of 64 channels where most layers have 2 of 64",
        "values of 32 channels where most layers have 64",
    ]


def test_a_model_with_nothing_to_compress_has_a_shape_too():
    shape, passed = surveyed_shape(512, [layer(PASSED, "linear attention")] * 2)
    assert shape.layers == () and passed == {0: "linear attention", 1: "linear attention"}


def test_layers_that_are_rotated_otherwise_are_told_one_by_one():
    most, other = Rope((1.0, 0.1)), Rope((1.0, 0.01))
    ropes = [other, most, None, most, most]
    shape, _ = surveyed_shape(512, [layer(rope=rope) for rope in ropes])
    assert shape.rope == most and [shape.rope_of(i) for i in range(5)] == ropes
    assert ModelShape.from_json(shape.to_json()) == shape and shape_of(shape.to_json()) == shape
    assert shape.layer_groups("layer2") == ((0,), (1,), (2,), (3, 4))
    assert shape.common_rope((1, 3)) == most
    with pytest.raises(UsageError, match="rotated in 3 ways"):
        shape.common_rope(shape.layers)
    assert shape.mismatch(replace(shape, ropes=shape.ropes[:1])) and not shape.mismatch(shape)
    assert "ropes" not in surveyed_shape(512, [layer(rope=most)])[0].to_json()


# --- rotations from keys


@pytest.mark.parametrize("scale", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbors"])
@pytest.mark.parametrize("rotary_dim", [64, 16])
def test_a_rotation_is_found_from_keys_at_other_positions(rotary_dim, interleaved, scale):
    rope = Rope(tuple(scale * 1e4 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)), interleaved)
    keys = np.random.default_rng(0).standard_normal((2, 9, 64)).astype(np.float32)
    shifted = {tokens: shift(ops, keys, rope, tokens) for tokens in SHIFTS}
    found, is_seen = fit_rope(keys, shifted)
    assert is_seen and found.matches(rope)
    other = Rope(tuple(1e6 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)), interleaved)
    assert fit_rope(keys, shifted, [other, rope]) == (rope, True)


def test_keys_that_stay_or_that_change_in_another_way():
    keys = np.random.default_rng(0).standard_normal((2, 9, 64)).astype(np.float32)
    assert fit_rope(keys, dict.fromkeys(SHIFTS, keys)) == (None, True)
    assert fit_rope(keys, {tokens: keys + tokens for tokens in SHIFTS}) == (None, False)


def test_a_known_rotation_is_taken_where_keys_have_few_digits():
    ropes = [Rope(tuple(base ** (-np.arange(0, 64, 2) / 64))) for base in (1e4, 1e6)]
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 9, 64))
    rough = {tokens: shift(ops, keys, ropes[1], tokens) + 0.02 * rng.standard_normal(keys.shape) for tokens in SHIFTS}
    assert fit_rope(keys, rough, ropes) == (ropes[1], True)

"""Which layers of a surveyed model are compressed."""

from spectral_kv_core.arrays.rope import Rope
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


def test_a_model_with_nothing_to_compress_has_a_shape_too():
    shape, passed = surveyed_shape(512, [layer(PASSED, "linear attention")] * 2)
    assert shape.layers == () and passed == {0: "linear attention", 1: "linear attention"}

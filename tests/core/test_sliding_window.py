"""The tokens of a layer with a sliding window, as codes behind an exact tail."""

import copy

import numpy as np
import pytest
from cases import ToyModel, plan_of

from spectral_kv_core.cache.sliding_window import SlidingWindow, is_worth_packing
from spectral_kv_core.errors import UsageError

MODEL = ToyModel()
WIDTH, TAIL = 255, 32


def make_window(xp, bits: float = 6, width: int = WIDTH, tail: int = TAIL) -> SlidingWindow:
    return SlidingWindow(xp, plan_of(MODEL, bits=bits).make_codec(xp, 0, xp.zeros((1,))), width, tail)


def append(window, keys, values) -> None:
    window.append(*(window.xp.asarray(x) for x in (keys, values)))


def dense(window) -> tuple[np.ndarray, ...]:
    return tuple(window.xp.to_numpy(x) for x in window.dense(window.xp.float32))


def check_visible(window, keys, values, seen: int, coded: float = 0.35) -> None:
    """`window` gives the last of `seen` tokens: the tail as they are, the others nearly."""
    for got, expected in zip(dense(window), (keys, values)):
        expected = expected[:, :, max(seen - WIDTH, 0) : seen]
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got[:, :, -TAIL:], expected[:, :, -TAIL:])
        assert np.linalg.norm(got - expected) < coded * np.linalg.norm(expected)


@pytest.mark.parametrize("prompt", [100, 255, 256, 700])
def test_the_last_tokens_are_there_after_every_step(xp, prompt):
    keys, values = MODEL.sample(0, prompt + 300, batch=2)
    window = make_window(xp)
    append(window, keys[:, :, :prompt], values[:, :, :prompt])
    for got, x in zip(dense(window), (keys, values)):  # a prompt is exact until it ends
        np.testing.assert_array_equal(got, x[:, :, max(prompt - WIDTH, 0) : prompt])
    for seen in range(prompt, prompt + 300):
        append(window, keys[:, :, seen : seen + 1], values[:, :, seen : seen + 1])
        assert window.seen == seen + 1 and window.visible == min(seen + 1, WIDTH)
        if seen % 50 == 0:
            check_visible(window, keys, values, seen + 1)


def test_what_is_out_of_sight_is_let_go(xp):
    keys, values = MODEL.sample(1, 3000)
    window = make_window(xp)
    append(window, keys[:, :, :1000], values[:, :, :1000])
    most = 0
    for seen in range(1000, 3000):
        append(window, keys[:, :, seen : seen + 1], values[:, :, seen : seen + 1])
        most = max(most, window.held)
    assert most < WIDTH + window.chunk_tokens <= WIDTH * 9 / 8
    plain = 2 * 4 * WIDTH * MODEL.kv_heads * MODEL.head_dim
    assert sum(x.nbytes for x in window.arrays()) < plain / 2.5


def test_a_prompt_in_pieces_is_coded_as_one(xp):
    keys, values = MODEL.sample(2, 620)
    whole, pieces = make_window(xp), make_window(xp)
    append(whole, keys[:, :, :600], values[:, :, :600])
    for start in range(0, 600, 200):
        append(pieces, keys[:, :, start : start + 200], values[:, :, start : start + 200])
    for window in (whole, pieces):
        append(window, keys[:, :, 600:610], values[:, :, 600:610])
    for one, other in zip(dense(whole), dense(pieces)):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_coded_twice(xp):
    keys, values = MODEL.sample(3, 400)
    window = make_window(xp)
    append(window, keys[:, :, :200], values[:, :, :200])
    window.seal()
    first = dense(window)[0][:, :, 100:160]
    for start in range(200, 300, 10):
        append(window, keys[:, :, start : start + 10], values[:, :, start : start + 10])
    np.testing.assert_array_equal(dense(window)[0][:, :, 55:115], first[:, :, 0:60])


@pytest.mark.parametrize("forget", [5, 40, 90])
def test_crop_goes_on_where_the_prefix_ended(xp, forget):
    keys, values = MODEL.sample(4, 240)
    window = make_window(xp)
    append(window, keys[:, :, :200], values[:, :, :200])
    window.seal()
    before = dense(window)
    window.crop(forget)
    assert window.seen == 200 - forget
    for got, was in zip(dense(window), before):
        np.testing.assert_array_equal(got, was[:, :, : 200 - forget])
    append(window, keys[:, :, 200:210], values[:, :, 200:210])
    assert window.visible == 210 - forget


def test_crop_behind_lost_tokens_is_refused(xp):
    keys, values = MODEL.sample(5, 400)
    window = make_window(xp)
    append(window, keys, values)
    with pytest.raises(UsageError, match="sliding window are no longer there"):
        window.crop(1)


def test_rows_are_chosen_and_copies_are_independent(xp):
    keys, values = MODEL.sample(6, 300, batch=3)
    window = make_window(xp)
    append(window, keys[:, :, :290], values[:, :, :290])
    window.seal()
    before = dense(window)
    other = copy.deepcopy(window)
    other.select([2, 0])
    for got, was in zip(dense(other), before):
        np.testing.assert_array_equal(got, was[[2, 0]])
    append(window, keys[:, :, 290:], values[:, :, 290:])
    assert other.seen == 290 and other.visible == WIDTH


def test_short_windows_are_not_worth_it():
    assert is_worth_packing(512, 64) and not is_worth_packing(128, 64)

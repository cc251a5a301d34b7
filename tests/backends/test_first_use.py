"""The first call on one's own model: what is plain is accepted, anything else is one line before anything slow starts."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
from hosts import ByteTokenizer
from tiny_checkpoint import save_tiny_checkpoint

from spectral_kv_core.calibration import profiler as core_profiler
from spectral_kv_core.errors import UsageError

SENTENCE = "The sea is a place of endless wonder. "


@pytest.fixture
def empty(monkeypatch, tmp_path, host):
    """A machine without profiles, on which a calibration is small."""
    monkeypatch.setenv("SPECTRALKV_CACHE", str(tmp_path / "cache"))
    small = partial(host.SpectralProfiler, tokens=256, document=256, gradients=False, probes=False, progress=False)
    monkeypatch.setattr(host.backend.host, "SpectralProfiler", small)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def bits_of(host, cache) -> float:
    return host.leading_layers(cache)[0].plan.bits


def test_the_tokenizer_comes_from_where_the_model_came_from(host, empty, checkpoint, monkeypatch):
    model, _ = host.load_model(checkpoint)
    seen = []
    read = core_profiler.split_documents
    monkeypatch.setattr(
        core_profiler,
        "split_documents",
        lambda texts, encode, *sizes: seen.append(encode) or read(texts, encode, *sizes),
    )
    assert bits_of(host, host.make_prompt_cache(model, bits=3)) == 3
    assert len(seen[0](SENTENCE)) == len(SENTENCE)
    host.make_prompt_cache(model, bits=3, tokenizer=ByteTokenizer())
    assert len(seen) == 1  # the second found the profile of the first


def test_a_model_from_nowhere_asks_for_its_tokenizer_before_it_says_anything(host, empty, caplog):
    with (
        caplog.at_level(logging.WARNING, "spectralkv"),
        pytest.raises(UsageError, match=r"Give tokenizer=, or a profile"),
    ):
        host.make_prompt_cache(host.model("llama"), bits=3)
    assert "calibrating" not in caplog.text
    with pytest.raises(UsageError, match="tokenizer of .* received a str"):
        host.make_prompt_cache(host.model("llama"), bits=3, tokenizer="gpt2")
    with pytest.raises(UsageError, match="received none"):
        host.SpectralProfiler(progress=False).profile_from_model(host.model("llama"))
    # what needs no profile needs no tokenizer
    host.make_prompt_cache(host.model("llama"), method="turboquant")


def test_bits_may_stand_in_the_profiles_place(host, empty, checkpoint):
    model, _ = host.load_model(checkpoint)
    assert bits_of(host, host.make_prompt_cache(model, 2.0)) == 2
    assert bits_of(host, host.make_prompt_cache(model, np.float32(2))) == 2
    assert bits_of(host, host.make_prompt_cache(model, bits="2")) == 2
    for wrong, words in [((0,), "above 0"), ((2.0, 3.0), "or None, received 2.0"), ((True,), "received True")]:
        with pytest.raises(UsageError, match=words):
            host.make_prompt_cache(model, *wrong)
    with pytest.raises(UsageError, match="bits to be a number above 0, received 'two'"):
        host.make_prompt_cache(model, bits="two")


@pytest.mark.parametrize("given", ["HuggingFaceTB/SmolLM2", None, 3.0, ("model", "tokenizer"), "profile"])
def test_what_is_no_model_is_told(host, given):
    given = host.profile("llama") if given == "profile" else given
    with pytest.raises(
        UsageError, match=r"a model that is loaded, received .* Load it: model, tokenizer = load_model\("
    ):
        host.make_prompt_cache(given, bits=3)


def test_what_is_no_profile_is_told(host, tmp_path):
    model = host.model("llama")
    with pytest.raises(UsageError, match="or None, received a ByteTokenizer"):
        host.make_prompt_cache(model, ByteTokenizer())
    with pytest.raises(FileNotFoundError, match="profile file, found nothing at a/name"):
        host.make_prompt_cache(model, "a/name")


def test_one_string_is_one_text_and_short_texts_are_joined(host):
    profiler = partial(host.calibrate, host.model("llama"), tokens=256, document=256, gradients=False, probes=False)
    assert profiler(SENTENCE * 8).calibration["documents"] == 1
    assert profiler([SENTENCE] * 100).calibration["tokens"] == 256

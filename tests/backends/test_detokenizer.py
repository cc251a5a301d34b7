"""Generated tokens as text while they come: the same text as at the end, and no token decoded over and over."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest

from spectral_kv_core.cli import tables as report

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = {
    "spaces": "  Two before, two  inside ,\n\n\n and one behind ",
    "characters": "naïve — 你好、世界 🙂👩‍👩‍👧‍👦 Ω\n🇨🇭 end",
    "code": "def f( x ):\n\treturn x  # ok 🙂\n",
    "empty": "",
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


def byte_level() -> Tokenizer:
    """A token a byte, as in GPT-2; no character beyond ASCII is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|end|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Words begin with a space that is taken off the beginning of a text; other characters fall back to bytes."""
    letters = [chr(i) for i in range(33, 127)]
    words = ["▁", "\n", *letters, "wo", "▁wo", "▁i", "▁in"]
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    merges = [("w", "o"), ("▁", "wo"), ("▁", "i"), ("▁i", "n")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


KINDS = {"byte level": byte_level, "sentence pieces": sentence_pieces}


@pytest.fixture(params=["torch", "mlx"])
def backend(request) -> str:
    pytest.importorskip({"torch": "torch", "mlx": "mlx_lm"}[request.param])
    return request.param


@pytest.fixture
def text_stream(backend):
    return importlib.import_module(f"spectral_kv_{backend}.generation").text_stream


def load(backend: str, path):
    """The tokenizer in the folder `path`, as `load_model` gives it."""
    if backend == "torch":
        return AutoTokenizer.from_pretrained(path)
    return importlib.import_module("mlx_lm.tokenizer_utils").load(path)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def tokenizer(request, backend, tmp_path):
    made = request.param()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(tmp_path)
    return load(backend, tmp_path)


def streamed(stream, ids) -> list[str]:
    return [*(stream.token(token) for token in ids), stream.end()]


@every_text
def test_pieces_are_the_text(tokenizer, text_stream, text):
    ids = tokenizer.encode(text)
    pieces = streamed(text_stream(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) == len(ids) + 1


@every_text
def test_text_comes_at_once(tokenizer, text_stream, text):
    """After every token all but a character that is not whole yet, and spaces behind the last word."""
    stream, shown, ids = text_stream(tokenizer), "", tokenizer.encode(text)
    for count, token in enumerate(ids, 1):
        shown += stream.token(token)
        assert tokenizer.decode(ids).startswith(shown)
        assert not tokenizer.decode(ids[:count]).rstrip("�")[len(shown) :].strip(" ")


def test_special_and_unknown_tokens_are_left_out(tokenizer, text_stream):
    ids = tokenizer.encode("wo in wo")
    end = tokenizer.eos_token_id
    mixed = [end, *ids[:3], end, end, 9999, *ids[3:], end]
    assert "".join(streamed(text_stream(tokenizer), mixed)) == tokenizer.decode(ids) == "wo in wo"


def test_a_character_that_is_cut_off_shows_at_the_end(tokenizer, text_stream):
    ids = tokenizer.encode("in 你")[:-1]
    pieces = streamed(text_stream(tokenizer), ids)
    whole = tokenizer.decode(ids)
    assert whole.rstrip("�") == "in " == "".join(pieces).rstrip("�")  # hosts differ in how many of these they show
    assert "�" in pieces[-1] and "�" not in "".join(pieces[:-1])


def test_any_tokens_pass(tokenizer, text_stream):
    """A model may say what is no text. What was shown cannot be taken back, so here it may differ from the whole."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(1, len(tokenizer.get_vocab()), 30).tolist()
        text = "".join(streamed(text_stream(tokenizer), ids))
        assert len(text) >= 5
    text = "".join(streamed(text_stream(tokenizer), [*tokenizer.encode("你好")[:-1], *tokenizer.encode("in wo")]))
    assert text.startswith("你") and text.endswith("in wo")


def test_tokens_are_not_decoded_over_and_over(tokenizer, text_stream, backend, monkeypatch):
    """The same few ids for every token, however long the text is and without a line break."""
    counts = []

    def spied(decode, ids, *args, **kwargs):
        counts[-1] += len(ids)
        return decode(ids, *args, **kwargs)

    class Spy:
        def __init__(self, decoder):
            self.decoder = decoder

        def decode_chain(self, tokens):
            return [spied(self.decoder.decode, tokens)]

    ids = tokenizer.encode("wo in 你好 🙂 " * 40)
    host = tokenizer if backend == "torch" else tokenizer._tokenizer
    if backend == "torch":  # the stream decodes below Python, by the tokenizer's decoder
        host.backend_tokenizer.decoder = decoders.Decoder.custom(Spy(host.backend_tokenizer.decoder))
    else:
        monkeypatch.setattr(host, "decode", partial(spied, host.decode))
    counts.append(0)
    stream, texts = text_stream(tokenizer), []
    for token in ids:
        counts.append(0)
        texts.append(stream.token(token))
    assert len("".join(texts)) > 350
    assert max(counts) <= 16 and (backend == "mlx" or counts[-1] > 0)


def test_a_tokenizer_of_another_kind_is_streamed_by_the_host():
    """No fast tokenizer, or one whose text is cleaned after decoding: transformers' own streamer."""
    pytest.importorskip("torch")
    from torch_models import ByteTokenizer

    from spectral_kv_torch.generation import text_stream

    plain = ByteTokenizer()
    ids = plain.encode("Two words,\nand more")
    pieces = streamed(text_stream(plain), ids)
    assert "".join(pieces) == "Two words,\nand more" and "".join(pieces[:4]) == "Two "
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "it": 1, "is": 2, ".": 3, "##s": 4}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    cleaned = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)
    ids = cleaned.encode("is it its . it")
    assert "".join(streamed(text_stream(cleaned), ids)) == cleaned.decode(ids) == "is it its. it"


def test_the_terminal_shows_the_text(tokenizer, text_stream, capsys):
    """Twice: the second text begins anew."""
    show, ids = report.Stream(partial(text_stream, tokenizer)), tokenizer.encode(" 你好, wo")
    for _ in range(2):
        for token in ids:
            show.token(token)
        show.end()
        assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


@pytest.mark.slow
@every_text
def test_the_demo_model_streams_its_text(backend, text_stream, text):
    from spectral_kv_core.hosts.demo_model import demo_model_path

    tokenizer = load(backend, demo_model_path())
    ids = tokenizer.encode(text)
    pieces = streamed(text_stream(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text

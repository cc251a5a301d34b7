"""Generated tokens as text while they come, by tokenizers' own stream or transformers' own streamer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from tokenizers.decoders import DecodeStream
from transformers import TextStreamer

__all__ = ["text_stream"]


def text_stream(tokenizer) -> _Decoded | _Words:
    """A new text of `tokenizer`: `token(id)` gives what an id adds to it, `end()` what is left.

    A character that is still incomplete waits, and special tokens are left out. Together the pieces are what
    `tokenizer.decode` gives for all tokens at once.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(fast, Tokenizer):
        return _Words(tokenizer)
    if tokenizer.clean_up_tokenization_spaces and not isinstance(fast.model, models.BPE):
        return _Words(tokenizer)  # transformers takes spaces out of the decoded text
    return _Decoded(fast)


class _Decoded:
    """The stream of a fast tokenizer, which decodes the latest few tokens only."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.shown, self.waiting = [], []  # tokens of the latest piece, and those after it

    def token(self, token: int) -> str:
        self.waiting.append(token)
        try:
            text = self.stream.step(self.tokenizer, token)
        except Exception:  # no narrower one is raised where broken bytes change how those before them read
            text = self.tokenizer.decode(self.waiting)
            self.stream = DecodeStream(skip_special_tokens=True)
            self.stream.step(self.tokenizer, token)
        if text:
            self.shown, self.waiting = self.waiting, []
        return text or ""

    def end(self) -> str:
        before = self.tokenizer.decode(self.shown)
        return self.tokenizer.decode(self.shown + self.waiting)[len(before) :]


class _Words(TextStreamer):
    """The host's streamer for any other tokenizer: words, or letters since 5.24, of what it decodes after a line break."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.ready = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.ready = text

    def token(self, token: int) -> str:
        self.put(torch.tensor([token]))
        return self.ready

    def end(self) -> str:
        super().end()
        return self.ready

"""Generated tokens as text while they come, by mlx-lm's own detokenizer."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

__all__ = ["text_stream"]


def text_stream(tokenizer) -> _Detokenized:
    """A new text of `tokenizer`: `token(id)` gives what an id adds to it, `end()` what is left.

    A character that is still incomplete waits, and special tokens are left out. Together the pieces are what
    `tokenizer.decode` gives for all tokens at once.
    """
    return _Detokenized(tokenizer)


class _Detokenized:
    def __init__(self, tokenizer):
        self.detokenizer = tokenizer.detokenizer
        self.known = len(tokenizer.get_vocab())  # a model may have more, for padding, which read as nothing
        self.skipped = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.trims = False
        # the others take spaces off the beginning, which `decode` keeps, or takes one off
        if not isinstance(self.detokenizer, NaiveStreamingDetokenizer):
            for token in tokenizer.encode("a", add_special_tokens=False):
                self.token(token)
            self.trims = getattr(self.detokenizer, "trim_space", False)

    def token(self, token: int) -> str:
        if token < self.known and token not in self.skipped:
            self.detokenizer.add_token(token)
        return self._segment()

    def end(self) -> str:
        self.detokenizer.finalize()
        return self._segment()

    def _segment(self) -> str:
        text = self.detokenizer.last_segment
        if text and self.trims:
            self.trims, text = False, text.removeprefix(" ")
        return text

"""An answer as text, which ends before certain texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StoppingText:
    """Text of tokens as they come. What may be the beginning of a text to stop at waits.

    stopped: whether such a text has come.
    """

    def __init__(self, stream: Any, stops: Sequence[str]):
        """stream: a backend's `text_stream`."""
        self.stream, self.stops = stream, stops
        self.waiting, self.stopped = "", False

    def token(self, token: int) -> str:
        """What `token` adds."""
        return self._add(self.stream.token(token))

    def end(self) -> str:
        """What is left at the end."""
        if self.stopped:
            return ""
        shown = self._add(self.stream.end())
        shown, self.waiting = shown + self.waiting, ""
        return shown

    def _add(self, text: str) -> str:
        self.waiting += text
        places = [place for stop in self.stops if (place := self.waiting.find(stop)) >= 0]
        if places:
            shown, self.waiting, self.stopped = self.waiting[: min(places)], "", True
            return shown
        held = max((_overlap(self.waiting, stop) for stop in self.stops), default=0)
        shown, self.waiting = self.waiting[: len(self.waiting) - held], self.waiting[len(self.waiting) - held :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

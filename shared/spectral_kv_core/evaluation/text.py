"""Text to evaluate on: held-out text that ships, or a user's own, cut into documents of equal length."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

from ..errors import UsageError
from ..planning.budget import SEAL

_TITLE = re.compile(r"^ ?= (?:[^=\n]+ )?= ?$", re.MULTILINE)  # top-level heading of WikiText, empty when all was <unk>


@dataclass(frozen=True)
class Text:
    """A text under the name that records and tables give it."""

    name: str
    text: str

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def default_texts() -> list[Text]:
    """`prose` and `code`, which ship (data/README.md): in no calibration text, and the same on every machine."""
    folder = files("spectral_kv_core") / "data" / "evaluation"
    return [Text(name, (folder / f"{name}.txt").read_bytes().decode("utf-8")) for name in ("prose", "code")]


def detokenize(text: str) -> str:
    """WikiText's spaced tokens as running text."""
    for spaced, plain in (
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        ("<unk>", ""),
        (" 's", "'s"),
        (" n't", "n't"),
    ):
        text = text.replace(spaced, plain)
    text = re.sub(r" ([.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    return re.sub(r" +", " ", re.sub(r'" ([^"\n]*?) "', r'"\1"', text))


def read_text(name: str, raw: str) -> Text:
    """`raw` as a text to evaluate on; WikiText's tokenized style is undone."""
    return Text(name, detokenize(raw) if " @-@ " in raw or "<unk>" in raw else raw)


def split_articles(text: str) -> list[str]:
    """Articles of a text with top-level headings (` = Title = `), each with its heading; [] without any."""
    starts = [match.start() for match in _TITLE.finditer(text)]
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)])]


def split_documents(
    tokenizer, text: Text, length: int, count: int, lower: str = "`prefixes` and `scored`"
) -> list[list[int]]:
    """Up to `count` documents of `length` tokens out of `text`, at least one, evenly spread.

    Each is the start of an article where the text has articles, else a window; windows do not overlap. Where the
    tokenizer marks the beginning of a text, every document begins so. Raises UsageError for a text that is too short,
    which says what to `lower`.
    """
    first = first_tokens(tokenizer)
    room = length - len(first)
    articles = split_articles(text.text)
    pieces = [list(tokenizer.encode(piece, add_special_tokens=False)) for piece in articles or [text.text]]
    longest = max(map(len, pieces))
    if longest < room:
        raise UsageError(
            f"Expected {'an article of ' if articles else ''}at least {length:,} tokens in the text {text.name}, received "
            f"{longest + len(first):,}. Give a longer text or lower {lower}."
        )
    if articles:
        candidates = [piece for piece in pieces if len(piece) >= room]
        count = min(count, len(candidates))
        return [first + candidates[i * len(candidates) // count][:room] for i in range(count)]
    (tokens,) = pieces
    count = min(count, len(tokens) // room)
    starts = [i * (len(tokens) - room) // max(count - 1, 1) for i in range(count)]
    return [first + tokens[start : start + room] for start in starts]


def first_tokens(tokenizer) -> list[int]:
    """Special tokens that `tokenizer` puts before a text."""
    marked, bare = (list(tokenizer.encode("a", add_special_tokens=special)) for special in (True, False))
    return marked[: marked.index(bare[0])]


def copy_span(prefix: int, scored: int, sinks: int, window: int) -> tuple[int, int]:
    """Where the copied tokens start and end in a prefix: from about a third of it, and all of them sealed.

    Of 1,860 tokens and 128 scored that is 600..727. Raises UsageError for a prefix that is too short.
    """

    def start(prefix: int) -> int:
        return max(prefix * 10 // 31, sinks)

    def fits(prefix: int) -> bool:
        return start(prefix) + scored <= prefix - window - (SEAL - 1)  # as many may wait for their block to fill

    if not fits(prefix):
        needed = prefix
        while not fits(needed):
            needed += 1
        raise UsageError(
            f"Expected a prefix of at least {needed:,} tokens for the task copy with {scored} scored tokens and a window "
            f"of {window}, received {prefix:,}. Raise `prefixes`, lower `scored` or `window`, or leave the task out."
        )
    return start(prefix), start(prefix) + scored

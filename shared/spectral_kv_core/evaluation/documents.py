"""What an evaluation feeds: documents cut out of texts, a prefix each and what is scored after it by task."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .fidelity import sealed_span
from .text import Text, copy_span, first_tokens, split_documents

DEPTHS = tuple((i + 0.5) / 10 for i in range(10))  # of a needle, as a share of what a cache seals of the prefix
NEEDLE = "\n\nRemember: the secret number is {}.\n\n"
QUESTION = "\n\nQuestion: What is the secret number?\nAnswer: The secret number is"


@dataclass(frozen=True)
class Document:
    """One of the documents of a text: a prefix, and the tokens that follow it by task.

    answer: how many of the last tokens of the task `needle` are its answer, which is hidden at `depth`.
    """

    text: Text
    index: int
    prefix: list[int]
    scored: dict[str, list[int]]
    depth: float | None = None
    answer: int = 0

    def digest(self, task: str, tokens: int | None = None) -> str:
        """Identifies what `task` feeds, or the first `tokens` of that."""
        return hashlib.sha256(json.dumps(self.prefix + self.scored[task][:tokens]).encode()).hexdigest()[:16]


def make_documents(tokenizer, texts: list[Text], settings, limit: int | None) -> list[Document]:
    """All documents of all texts and prefixes; `limit`: the model's context in tokens, None when unknown.

    Raises UsageError where a text, the context or a prefix is too short for a task.
    """
    _check_limit(settings, limit)
    documents = []
    for text in texts:
        for prefix in settings.prefixes:
            documents += _documents(tokenizer, text, prefix, settings)
    return documents


def _documents(tokenizer, text: Text, prefix: int, settings) -> list[Document]:
    documents = []
    if {"text", "copy", "needle"} & set(settings.tasks):
        pieces = split_documents(tokenizer, text, prefix + settings.scored, settings.documents)
        span = (
            copy_span(prefix, settings.scored, settings.sinks, settings.window) if "copy" in settings.tasks else (0, 0)
        )
        for index, tokens in enumerate(pieces):
            scored = {"text": tokens[prefix:], "copy": tokens[slice(*span)]}
            scored = {task: scored[task] for task in settings.tasks if task in scored}
            if scored:
                documents.append(Document(text, index, tokens[:prefix], scored))
    if "drift" in settings.tasks:
        length = prefix + settings.turns * (settings.turn_tokens + settings.scored)
        longer = split_documents(
            tokenizer, text, length, settings.documents, "`turns`, `turn_tokens`, `prefixes` or `scored`"
        )
        for index, tokens in enumerate(longer):
            documents.append(Document(text, index, tokens[:prefix], {"drift": tokens[prefix:]}))
    if "needle" in settings.tasks:
        documents += [
            hide_needle(tokenizer, text, index, tokens[:prefix], depth, settings.sinks, settings.window)
            for index, tokens in enumerate(pieces)
            for depth in DEPTHS
        ]
    return documents


def hide_needle(
    tokenizer, text: Text, index: int, tokens: list[int], depth: float, sinks: int, window: int
) -> Document:
    """A document as long as `tokens`, their last ones left out for a sentence with a random number, and the question for it.

    depth: 0 to 1, where the sentence stands between sinks and window. The number depends on the text's digest, `index`
    and `depth` alone. Raises UsageError when the sentence does not fit there.
    """
    seed = hashlib.sha256(f"{text.digest} {index} {depth}".encode()).digest()
    number = str(np.random.default_rng(int.from_bytes(seed[:8], "big")).integers(10_000, 100_000))
    needle = list(tokenizer.encode(NEEDLE.format(number), add_special_tokens=False))
    asked, answered = (list(tokenizer.encode(s, add_special_tokens=False)) for s in (QUESTION, f"{QUESTION} {number}"))
    answer = len(answered) - next((i for i, (a, b) in enumerate(zip(asked, answered)) if a != b), len(asked))

    def room(length: int) -> range:
        sealed = sealed_span(length, sinks, window)
        return range(max(sealed.start, len(first_tokens(tokenizer))), sealed.stop - len(needle) + 1)

    places = room(len(tokens))
    if not places:
        needed = len(tokens)
        while not room(needed):
            needed += 1
        raise UsageError(
            f"Expected a prefix of at least {needed:,} tokens for the task needle with a window of {window}, received "
            f"{len(tokens):,}. Raise `prefixes`, lower `window`, or leave the task out."
        )
    place = places[round(depth * (len(places) - 1))]
    prefix = tokens[:place] + needle + tokens[place : len(tokens) - len(needle)]
    return Document(text, index, prefix, {"needle": answered}, depth, answer)


def _check_limit(settings, limit: int | None) -> None:
    after = {f"{settings.scored:,} scored": settings.scored}
    if settings.greedy and "text" in settings.tasks:
        after[f"{settings.greedy:,} generated"] = settings.greedy
    if "drift" in settings.tasks:
        turn = settings.turn_tokens + settings.scored
        after[f"{settings.turns:,} turns of {turn:,}"] = settings.turns * turn
    what = max(after, key=lambda name: after[name])
    if limit and max(settings.prefixes) + after[what] > limit:
        raise UsageError(
            f"Expected at most {limit:,} tokens, the model's context, received {max(settings.prefixes):,} of prefix and "
            f"{what}. Lower `prefixes`{', `turns`' if 'turns' in what else ''} or `scored`."
        )

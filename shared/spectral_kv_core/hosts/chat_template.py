"""Prompts as tokens: inside the model's chat template, or as they are; in one piece, or in two of which one is stored."""

from __future__ import annotations

from ..errors import UsageError

PLACE = "[[spectralkv: content of the message]]"  # stands in the template for what the user says


def has_template(tokenizer) -> bool:
    """Whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def checked_text(text: str) -> str:
    """`text`; raises UsageError where it has lone surrogates, which stand for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"Expected text in UTF-8, received {text[error.start]!a} at character {error.start + 1:,}."
        ) from None
    return text


def encode_prompt(tokenizer, text: str, raw: bool) -> list[int]:
    """A whole prompt; `raw` leaves the template out."""
    if raw or not has_template(tokenizer):
        return list(tokenizer.encode(checked_text(text)))
    return encode_messages(tokenizer, [{"role": "user", "content": text}])


def encode_messages(tokenizer, messages: list[dict]) -> list[int]:
    """A conversation in the template, up to where the answer begins."""
    for message in messages:
        checked_text(message["content"])
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def opening_message(tokenizer, tokens: list[int]) -> str | None:
    """What the user says in a prompt of `encode_opening`, as text; None where `tokens` are none."""
    head, text = _frame(tokenizer)[0], tokenizer.decode(tokens, skip_special_tokens=False)
    return text[len(head) :] if text.startswith(head) else None


def encode_opening(tokenizer, text: str, raw: bool) -> list[int]:
    """The first part of a prompt: the template up to the message, and the beginning of the message."""
    checked_text(text)
    if raw:
        return list(tokenizer.encode(text))
    return list(tokenizer.encode(_frame(tokenizer)[0] + text, add_special_tokens=False))


def encode_rest(tokenizer, text: str, raw: bool) -> list[int]:
    """What follows `encode_opening`: the end of the message, and the rest of the template."""
    checked_text(text)
    return list(tokenizer.encode(text if raw else text + _frame(tokenizer)[1], add_special_tokens=False))


def system_tokens(tokenizer) -> int:
    """How many tokens of a prompt in the template stand before what the user says: the system prompt, if there is one.

    Raises UsageError for a model without a template.
    """
    if not has_template(tokenizer):
        raise UsageError("Expected a chat template, whose system prompt is to be protected, the model has none.")
    return len(tokenizer.encode(_frame(tokenizer)[0], add_special_tokens=False))


def _frame(tokenizer) -> tuple[str, str]:
    """The template before and behind what the user says."""
    messages = [{"role": "user", "content": PLACE}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    head, place, tail = text.partition(PLACE)
    if not place or PLACE in tail:
        raise UsageError("Expected a chat template that shows a message once, received another. Use `raw`.")
    return head, tail

"""Text to calibrate with: the mixture that ships with the package, or a user's own files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from importlib.resources import files
from itertools import cycle
from pathlib import Path

from ..errors import UsageError

#: Identifies the shipped text; a change to any of its files needs a new name.
TEXT_NAME = "default-v2"
KINDS = ("encyclopedia", "prose", "code", "dialogue")
#: In which order documents are dealt out, over and over: facts, stories and code count more than dialogue.
DEAL = ("encyclopedia", "prose", "encyclopedia", "code", "dialogue", "encyclopedia", "prose", "encyclopedia", "code")
_DOCUMENT_BREAK = "\n\f\n"
SHORTEST, JOINT = 64, "\n\n"  # tokens of a document; what stands between shorter texts that are joined to one


def load_kind(kind: str) -> list[str]:
    """Documents of one shipped kind, in file order."""
    if kind not in KINDS:
        raise UsageError(f"expected a kind of calibration text out of {', '.join(KINDS)}, got {kind!r}")
    resource = files("spectral_kv_core") / "data" / "calibration" / f"{kind}.txt"
    text = resource.read_bytes().decode("utf-8").replace("\r\n", "\n")
    return [document.strip("\n") + "\n" for document in text.split(_DOCUMENT_BREAK) if document.strip()]


def load_default_texts() -> list[str]:
    """The shipped documents, dealt out in turn: any prefix is a mixture."""
    left = {kind: load_kind(kind) for kind in KINDS}
    texts: list[str] = []
    turns = cycle(DEAL)
    while any(left.values()):
        kind = next(turns)
        if left[kind]:
            texts.append(left[kind].pop(0))
    return texts


def load_texts(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Read UTF-8 files, one document for each, in the order given."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    texts = [_read_text(Path(path)) for path in paths]
    if not texts:
        raise UsageError("expected at least one file of calibration text, got none; name one or use the default text")
    return texts


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UsageError(
            f"expected a UTF-8 text file as calibration text, got the directory {path}; name the files in it"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"expected a UTF-8 text file as calibration text, but {path} does not exist; check the path"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"expected UTF-8 calibration text, but {path} has undecodable bytes at offset {error.start}; "
            "convert the file to UTF-8 or leave it out"
        ) from error
    if not text.strip():
        raise UsageError(f"expected calibration text, but {path} is empty or holds only white space; leave it out")
    return text.replace("\r\n", "\n")


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 (hex) over the documents and where each ends; the order counts."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def split_documents(
    texts: Iterable[str], encode: Callable[[str], list[int]], length: int, total: int
) -> list[list[int]]:
    """Token documents of at most `length` tokens, `total` tokens in all: first pieces of every text, then second ones.

    Texts of fewer than `SHORTEST` tokens are joined, where the others are not enough. Raises UsageError when all of them
    give fewer.
    """
    pieces, short = [], []
    for text in texts:
        tokens = list(encode(text))
        if len(tokens) < SHORTEST:
            short.append(text)
            continue
        cut = [tokens[i : i + length] for i in range(0, len(tokens), length)]
        pieces.append([c for i, c in enumerate(cut) if len(c) >= min(length // 2, 512) or i == 0])
    documents, count = [], 0

    def take(piece: list[int]) -> None:
        nonlocal count
        if len(piece) >= SHORTEST and count < total:
            documents.append(piece[: max(total - count, SHORTEST)])
            count += len(documents[-1])

    for depth in range(max(map(len, pieces), default=0)):
        for piece in pieces:
            if depth < len(piece):
                take(piece[depth])
    joined = list(encode(JOINT.join(short))) if short and count < total else []
    for start in range(0, len(joined), length):
        take(joined[start : start + length])
    if not documents:
        raise UsageError(
            f"Expected calibration texts of at least {SHORTEST} tokens in all, received {len(joined)}. Give more `texts`."
        )
    return documents


def check_texts(texts) -> list[str]:
    """`texts` as a list: one string is one text. Raises UsageError for anything but strings."""
    if isinstance(texts, str):
        return [texts]
    found = list(texts) if isinstance(texts, Iterable) else [texts]
    wrong = next((text for text in found if not isinstance(text, str)), None)
    if wrong is not None:
        raise UsageError(
            f"Expected texts to be strings, received a {type(wrong).__name__}. Read files: load_texts(paths)."
        )
    return found

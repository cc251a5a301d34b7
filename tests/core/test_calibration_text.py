"""The shipped calibration text and the loaders for it."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from spectral_kv_core.calibration.text import (
    DEAL,
    KINDS,
    TEXT_NAME,
    load_default_texts,
    load_kind,
    load_texts,
    text_digest,
)

DATA = files("spectral_kv_core") / "data" / "calibration"
SHARES = {"encyclopedia": (0.1, 0.2), "prose": (0.35, 0.45), "code": (0.2, 0.3), "dialogue": (0.15, 0.25)}


def test_sizes_and_shares() -> None:
    sizes = {kind: len((DATA / f"{kind}.txt").read_bytes()) for kind in KINDS}
    total = sum(sizes.values())
    assert 400_000 <= total <= 600_000
    for kind, (low, high) in SHARES.items():
        assert low <= sizes[kind] / total <= high, (kind, sizes)


@pytest.mark.parametrize("name", [*(f"{kind}.txt" for kind in KINDS), "SOURCES.md"])
def test_files_are_clean(name: str) -> None:
    text = (DATA / name).read_bytes().decode("utf-8")
    assert "\r" not in text and "\ufffd" not in text and "\x00" not in text
    for word in ("wikitext", "project gutenberg", "wikipedia.org", "pypi.org", "npmjs", "deb.debian.org"):
        assert word not in text.lower(), word
    assert not re.search(r"(?<![\w.])/(?:work|root|tmp|home)/", text)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_long(kind: str) -> None:
    documents = load_kind(kind)
    assert len(documents) >= 5
    assert all("\f" not in document and document.endswith("\n") for document in documents)
    assert min(map(len, documents)) > 6_000
    assert len(set(documents)) == len(documents)


def test_default_texts_are_interleaved() -> None:
    by_kind = {kind: load_kind(kind) for kind in KINDS}
    texts = load_default_texts()
    assert len(texts) == sum(map(len, by_kind.values()))
    assert sorted(texts) == sorted(document for documents in by_kind.values() for document in documents)
    for position, kind in enumerate(DEAL * 2):
        assert texts[position] == by_kind[kind].pop(0)
    assert load_default_texts() == texts


def test_every_shipped_source_is_named() -> None:
    sources = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    for kind in KINDS:
        section = sources.split(f"## {kind}.txt")[1].split("\n## ")[0]
        assert len(re.findall(r"^\| \d+ \|", section, flags=re.M)) == len(load_kind(kind))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="encyclopedia, prose, code, dialogue, got 'poetry'"):
        load_kind("poetry")


def test_load_texts_reads_in_order(tmp_path) -> None:
    (tmp_path / "b.txt").write_bytes("Zweite Übung\r\nend\r\n".encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    assert load_texts([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == ["Zweite Übung\nend\n", "first"]
    assert load_texts(str(tmp_path / "a.txt")) == ["first"]


def test_load_texts_errors(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="missing.txt does not exist; check the path"):
        load_texts([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="got the directory .*; name the files"):
        load_texts([tmp_path])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match="latin.txt has undecodable bytes at offset 3; convert"):
        load_texts([tmp_path / "latin.txt"])
    (tmp_path / "empty.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="empty.txt is empty"):
        load_texts([tmp_path / "empty.txt"])
    with pytest.raises(ValueError, match="at least one file"):
        load_texts([])


def test_digest() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", text_digest(["a", "b"]))
    assert text_digest(["a", "b"]) == text_digest(iter(["a", "b"]))
    assert len({text_digest(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["ab", ""], [])}) == 5
    assert TEXT_NAME == "default-v2"

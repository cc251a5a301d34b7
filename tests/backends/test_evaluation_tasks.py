"""The tasks of `spectralkv eval` and what they measure inside a cache: what is fed when, and figures made in other ways."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_evaluation import SMALL, VOCABULARY, FakeBackend, LetterTokenizer, run_fake

from spectral_kv_core.evaluation.documents import DEPTHS, NEEDLE, QUESTION, hide_needle
from spectral_kv_core.evaluation.fidelity import sealed_span
from spectral_kv_core.evaluation.report import print_evaluation, save_evaluation
from spectral_kv_core.evaluation.settings import Settings
from spectral_kv_core.evaluation.text import Text
from spectral_kv_core.planning import methods

DRIFT = {"tasks": ("drift",), "turns": 3, "turn_tokens": 20, "documents": 1}
LETTERS = "".join(map(chr, np.random.default_rng(0).integers(ord("a"), ord("z"), 3000)))


class CopyingBackend(FakeBackend):
    """Predicts what followed the last eight tokens when they came before, as a model that can copy does."""

    def feed(self, model, tokens, cache, keep=1):
        super().feed(model, tokens, cache, keep)
        expected = [self.next_token(cache.tokens[: len(cache.tokens) - i]) for i in reversed(range(keep))]
        return self.sharpness * np.eye(256, dtype=np.float32)[expected]

    @staticmethod
    def next_token(tokens):
        for end in reversed(range(8, len(tokens))):
            if tokens[end - 8 : end] == tokens[-8:]:
                return tokens[end]
        return ord(" ")


class DroppingBackend(CopyingBackend):
    """Its caches keep the last `budget_tokens` tokens of the first call."""

    def build_cache(self, model, profile, request):
        name, budget = request.method.name, request.budget_tokens
        self.log.append(("make", name, request.bits, budget))
        return SimpleNamespace(kind=name, tokens=[], budget=budget, first=0)

    def feed(self, model, tokens, cache, keep=1):
        first, logits = not cache.tokens, super().feed(model, tokens, cache, keep)
        if first and getattr(cache, "budget", None):
            cache.first = len(cache.tokens) - cache.budget
            del cache.tokens[: cache.first]
        return logits

    def held_vectors(self, cache, layers):
        for *vectors, _ in super().held_vectors(cache, layers):
            first = getattr(cache, "first", 0)
            yield *vectors, np.arange(first, first + len(cache.tokens))[None] if first else None


class ByteTokenizer(LetterTokenizer):
    def encode(self, text, add_special_tokens=True):
        return (self.first if add_special_tokens else []) + [ord(c) % 256 for c in text]


@pytest.fixture
def dropping(monkeypatch):
    """A method `late` that drops tokens and reads the prefix for it, beside the others."""
    method = replace(methods.get_method("identity"), name="late", scorer="snapkv")
    monkeypatch.setitem(methods.METHODS, "late", method)


# --- drift ----------------------------------------------------------------------------------------------------------


def test_every_turn_is_fed_to_one_cache_and_scored_before_it_is_seen(tmp_path):
    backend = FakeBackend()
    rows = run_fake(backend, tmp_path, **DRIFT)["documents"]
    assert [row["turn"] for row in rows] == [1, 2, 3]
    assert [row["context"] for row in rows] == [80, 109, 138]  # 60 of prefix, then pieces of 20 and 9 scored
    assert all(row["kl"] == row["kl_fresh"] == row["aop"] == 0 and row["top1"] == 1 for row in rows)
    assert [len(tokens) for tokens in backend.fed("plain")] == [60, *([20] + [1] * 9) * 3]
    fills = [call[2] for call in backend.log if call[:2] == ("fill", "identity")]
    assert fills == [60, 80, 109, 138]  # one cache, and a fresh one per turn that holds nothing of what is scored
    turn = [20] + [1] * 8 + [1] * 8 + [1]  # the cache's piece and scored tokens, the fresh one's, the last scored token
    assert [len(tokens) for tokens in backend.fed("identity")] == turn * 3
    fed = [t for tokens in backend.fed("plain") for t in tokens]
    assert fed == [(fed[0] + i) % VOCABULARY for i in range(60 + 3 * 29)]  # everything once and in order
    assert [row["cache_bytes"] for row in rows] == [60 + 28, 60 + 29 + 28, 60 + 2 * 29 + 28]


def test_drift_goes_on_where_it_was_cut_off(tmp_path):
    options = DRIFT | {"methods": ("identity", "spectral"), "bits": (2.0,)}
    whole = run_fake(FakeBackend(), tmp_path, **options)
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["turn"] for line in lines] == [1, 2, 3] * 2
    path.write_bytes(b"".join(lines[:4]))
    backend = FakeBackend()
    again = run_fake(backend, tmp_path, **options)
    assert {call[0] for call in backend.made()} == {"spectral"}
    assert len(path.read_bytes().splitlines()) == 6
    assert [{**row, "seconds": 0} for row in again["rows"]] == [{**row, "seconds": 0} for row in whole["rows"]]
    third = FakeBackend()
    run_fake(third, tmp_path, **options)
    assert not third.log
    more = FakeBackend()
    run_fake(more, tmp_path, **options | {"turn_tokens": 21})
    assert len(path.read_bytes().splitlines()) == 12  # other pieces are other rows


# --- needle ---------------------------------------------------------------------------------------------------------


def test_a_needle_is_hidden_between_sinks_and_window():
    tokenizer, tokens = ByteTokenizer(), [ord(c) for c in LETTERS[:400]]
    span, seen = sealed_span(400, 2, 8), set()
    for depth in (0.0, *DEPTHS, 1.0):
        document = hide_needle(tokenizer, Text("letters", LETTERS), 3, tokens, depth, 2, 8)
        text = "".join(map(chr, document.prefix))
        asked = "".join(map(chr, document.scored["needle"]))
        number = asked[len(QUESTION) + 1 :]
        start, needle = text.index("\n\nRemember"), NEEDLE.format(number)
        assert needle in text and len(document.prefix) == 400 and asked == f"{QUESTION} {number}"
        assert span.start <= start and start + len(needle) <= span.stop
        assert start == pytest.approx(span.start + depth * (span.stop - span.start - len(needle)), abs=1)
        assert text.replace(needle, "") == LETTERS[: 400 - len(needle)]
        assert asked[-document.answer :] == f" {number}" and number not in asked[: -document.answer]
        seen.add(number)
        assert document == hide_needle(tokenizer, Text("letters", LETTERS), 3, tokens, depth, 2, 8)
    assert len(seen) == len(DEPTHS) + 2
    other = hide_needle(tokenizer, Text("letters", LETTERS + "x"), 3, tokens, 1.0, 2, 8)
    assert other.scored != document.scored
    with pytest.raises(ValueError, match=r"at least (\d+) tokens for the task needle") as error:
        hide_needle(tokenizer, Text("letters", LETTERS), 3, tokens[:50], 0.5, 2, 8)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    hide_needle(tokenizer, Text("letters", LETTERS), 3, tokens[:needed], 0.5, 2, 8)
    with pytest.raises(ValueError):
        hide_needle(tokenizer, Text("letters", LETTERS), 3, tokens[: needed - 1], 0.5, 2, 8)


def test_a_number_is_found_where_the_cache_still_holds_it(tmp_path, dropping):
    """Of a cache that keeps the later half the copying model finds the numbers of the later half only."""
    backend = DroppingBackend()
    rows = run_fake(
        backend, tmp_path, texts=[Text("letters", LETTERS)], tokenizer=ByteTokenizer(), methods=("late", "identity"),
        tasks=("needle",), prefixes=(600,), keep=(0.5,),
    )["documents"]  # fmt: skip
    kept = [row for row in rows if row["method"] == "late"]
    assert len(kept) == 20 and sorted({row["depth"] for row in kept}) == list(DEPTHS)
    assert all(row["found_ref"] for row in rows) and all(row["found"] for row in rows if row["method"] == "identity")
    assert [row["found"] for row in kept[:10]] == [row["depth"] > 0.5 for row in kept[:10]]
    for row in rows:
        assert row["needle_kl"] > 1 if not row["found"] else row["needle_kl"] == 0
        assert row["needle_logp_ref"] > -0.1 and (row["needle_logp"] < -5) == (not row["found"])
    # the question is fed to a cache that has read the prefix before it, in one call, and the digits one by one after it
    assert [len(tokens) for tokens in backend.fed("late")[:7]] == [600, len(QUESTION), 1, 1, 1, 1, 1]
    assert all(call[2] == 600 for call in backend.log if call[0] == "fill")


# --- caches that drop tokens ----------------------------------------------------------------------------------------


def test_every_share_is_a_row(tmp_path, dropping):
    backend = DroppingBackend()
    options = {
        "texts": [Text("letters", LETTERS)],
        "tokenizer": ByteTokenizer(),
        "methods": ("late", "identity"),
        "documents": 1,
    }
    result = run_fake(backend, tmp_path, keep=(0.5, 0.2), **options)
    rows = {row["keep"]: row for row in result["documents"]}
    assert [(row["method"], row["keep"], row["budget_tokens"]) for row in result["documents"]] == [
        ("late", 0.5, 30), ("late", 0.2, 12), ("identity", None, None),
    ]  # fmt: skip
    assert [call[1:] for call in backend.log if call[0] == "make"] == [
        ("late", 16.0, 30), ("late", 16.0, 12), ("identity", 16.0, None),
    ]  # fmt: skip
    assert [row.get("keep") for row in result["rows"]] == [0.5, 0.2, None]
    prefix = np.array([ord(c) for c in LETTERS[:60]], float)
    span = sealed_span(60, 2, 8)
    for keep, first in ((0.5, 30), (0.2, 48)):  # what is not held counts as zero
        lost = np.square(prefix[span.start : first]).sum() / np.square(prefix[span]).sum()
        assert rows[keep]["key_error"] == rows[keep]["value_error"] == pytest.approx(lost)
    assert rows[None]["key_error"] == rows[None]["aop"] == 0 and rows[None]["spectral_fidelity"] == pytest.approx(1)
    assert rows[0.2]["aop"] > rows[0.5]["aop"] > 0
    again = DroppingBackend()
    assert run_fake(again, tmp_path, keep=(0.5, 0.2), **options)["documents"] == result["documents"] and not again.log
    default = DroppingBackend()
    run_fake(default, tmp_path, **options | {"methods": ("late",)})
    assert [call[3] for call in default.log if call[0] == "make"] == [15]  # half is there, a quarter is new


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keep": (0.5,), "methods": ("identity",)}, "method that drops tokens for `keep`, identity keep every token"),
        ({"keep": (0.5, 1.5)}, "shares above 0, at most 1, for `keep`, received 1.5"),
        ({"keep": (0.0,)}, "shares above 0"),
        ({"keep": (float("nan"),)}, "shares above 0"),
        ({"keep": (0.15,)}, "2 sinks, the window of 8 and 0 that wait to be coded, received 0.15, 9 of 60"),
        ({"tasks": ("drift",), "methods": ("spectral-stored",)}, "live cache for the task drift"),
        ({"metrics": ("kl", "speed")}, "`metrics` among kl, aop, reconstruction, received 'speed'"),
        ({"greedy": -1}, "`greedy` of at least 0"),
        ({"turns": 0}, "`turns` of at least 1"),
        ({"turn_tokens": 0}, "`turn_tokens` of at least 1"),
    ],
)
def test_wrong_settings(dropping, change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**({"methods": ("late",), "tasks": ("text",)} | SMALL | change))


def test_nothing_runs_when_a_task_does_not_fit(tmp_path):
    backend = FakeBackend(limit=200)
    with pytest.raises(ValueError, match=r"200 tokens, the model's context, .* 60 of prefix and 5 turns of 29\. Lower"):
        run_fake(backend, tmp_path, **DRIFT | {"turns": 5})
    with pytest.raises(ValueError, match="60 of prefix and 141 generated"):
        run_fake(backend, tmp_path, greedy=141)
    with pytest.raises(ValueError, match="at least 2,960 tokens in the text counting.*lower `turns`"):
        run_fake(FakeBackend(), tmp_path, **DRIFT | {"turns": 100})
    with pytest.raises(ValueError, match="for the task needle"):
        run_fake(backend, tmp_path, tasks=("needle",), window=20)
    assert not backend.log and not (tmp_path / "rows.jsonl").exists()


# --- what is measured on the way ------------------------------------------------------------------------------------


def test_greedy_tokens_follow_the_prefix(tmp_path, dropping):
    """The copying model goes on with the prefix's repetition as long as the cache holds where it comes from."""
    text = Text("twice", LETTERS[:40] + LETTERS[:20] + LETTERS[40:200])
    options = {"texts": [text], "tokenizer": ByteTokenizer(), "documents": 1, "methods": ("late", "identity")}
    backend = DroppingBackend()
    result = run_fake(backend, tmp_path, greedy=12, keep=(0.8, 0.25), tasks=("text", "copy"), **options)
    rows = {row["keep"]: row for row in result["documents"] if row["task"] == "text"}
    assert (rows[None]["first_divergence"], rows[None]["token_match"]) == (12, 1)
    assert (rows[0.8]["first_divergence"], rows[0.8]["token_match"]) == (12, 1)  # from position 12 on
    assert rows[0.25]["first_divergence"] == 1 and rows[0.25]["token_match"] < 0.5  # the plain cache gave the first
    assert not any("first_divergence" in row for row in result["documents"] if row["task"] == "copy")
    assert "first_divergence" not in run_fake(DroppingBackend(), tmp_path, greedy=0, **options)["documents"][0]


def test_metrics_can_be_left_out(tmp_path):
    options = {"tasks": ("text", "copy"), "documents": 1}
    (row, copied) = run_fake(FakeBackend(), tmp_path, metrics=("kl",), **options)["documents"]
    assert row["metrics"] == copied["metrics"] == "kl" and not {"aop", "key_error"} & (set(row) | set(copied))
    (row, copied) = run_fake(FakeBackend(), tmp_path, **options)["documents"]  # not taken for the same rows
    assert {"aop", "aop_p95", "aop_max", "aop_layers", "key_error", "value_error", "spectral_fidelity"} <= set(row)
    assert "aop" in copied and "key_error" not in copied
    backend = FakeBackend()
    run_fake(backend, tmp_path, metrics=("aop",), **options)
    assert len(backend.made()) == 1  # the row of the task copy has nothing to leave out


def test_tables_have_the_columns_of_their_task(tmp_path, dropping, capsys):
    options = {"texts": [Text("letters", LETTERS)], "tokenizer": ByteTokenizer(), "methods": ("late", "identity")}
    changes = DRIFT | {"tasks": ("text", "copy", "drift", "needle"), "prefixes": (200,), "greedy": 4, "keep": (0.5,)}
    result = run_fake(DroppingBackend(), tmp_path, **options, **changes)
    save_evaluation(result, tmp_path)
    tables = (tmp_path / "summary.md").read_text().split("\n## ")[1:]
    heads = [table.split("\n")[2] for table in tables]
    assert len(tables) == 6 and all("| keep |" in head for head in heads)
    assert "| KL | worst |" in heads[0] and "| AOP | p95 | max | worst layer | key error |" in heads[1]
    assert "diverges at" in heads[1] and "diverges at" not in heads[3] and "key error" not in heads[3]
    assert "| KL 1 | KL 2 | KL 3 | fresh 1 | fresh 3 | AOP 1 | AOP 3 |" in heads[4] and "| found | plain |" in heads[5]
    for table in tables:
        lines = table.strip().split("\n")[2:]
        assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    print_evaluation(result)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 127
    kept = run_fake(DroppingBackend(), tmp_path / "kept", **options | {"methods": ("identity",)}, documents=1)
    save_evaluation(kept, tmp_path)
    assert "keep |" not in (tmp_path / "summary.md").read_text()  # a column that nothing fills is left out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ("spectral", "knorm")}, "wavelet scorer for `wavelets`, spectral, knorm do not"),
        ({"wavelets": ("haar", "gaus1")}, "discrete wavelet .*'gaus1'"),
        ({"methods": ("waveletkv+spectral",), "tiers": (((0.5, 3.0), (0.5, 1.0)),)}, "drop none with `tiers` alone"),
    ],
)
def test_wavelets_that_cannot_be_used(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**({"methods": ("waveletkv",), "wavelets": ("haar",)} | change))

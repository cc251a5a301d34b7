"""The tasks of `spectralkv eval` and what they measure inside a cache: what is fed when, and figures made in other ways."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_evaluation import NAMES, SMALL, VOCABULARY, FakeBackend, LetterTokenizer, run_fake

from spectral_kv_core.evaluation.documents import DEPTHS, NEEDLE, QUESTION, hide_needle, make_documents
from spectral_kv_core.evaluation.fidelity import sealed_span
from spectral_kv_core.evaluation.report import print_evaluation, save_evaluation
from spectral_kv_core.evaluation.run import evaluate
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


# --- on real caches -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_backend():
    pytest.importorskip("torch")
    from spectral_kv_torch import generation

    return generation


def run_torch(backend, name, folder, **changes):
    from torch_models import TEXT, ByteTokenizer, model_and_profile

    model, profile = model_and_profile(name)
    settings = Settings(
        **{"methods": ("identity", "spectral"), "bits": (1.0, 3.0, 8.0), "prefixes": (160,), "scored": 20, "documents": 1,
           "window": 16, "tasks": ("text",), **changes}
    )  # fmt: skip
    texts = [Text("random", TEXT[0])]
    return evaluate(backend, model, ByteTokenizer(), settings, texts, folder, names=NAMES, profile=profile), model


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])  # gemma3 has layers with a sliding window
def test_errors_shrink_with_bits(torch_backend, tmp_path, name):
    coarse = []
    for changes in ({}, {"step": 5}, {"prefill_chunk": 40}):
        result, _ = run_torch(torch_backend, name, tmp_path, **changes)
        assert result["layers"] == ([1, 2] if name == "gemma3" else [0, 1, 2])
        rows = {(row["method"], row["bits"]): row for row in result["rows"]}
        exact, *coded = rows["identity", 16.0], *(rows["spectral", bits] for bits in (1.0, 3.0, 8.0))
        assert exact["aop_max"] < 1e-4
        if "prefill_chunk" not in changes:
            assert exact["key_error"] == exact["value_error"] == 0 and exact["spectral_fidelity"] == pytest.approx(1)
        for name_ in ("aop", "aop_p95", "key_error", "value_error"):
            assert coded[0][name_] > coded[1][name_] > coded[2][name_] > 0
        assert coded[0]["spectral_fidelity"] < coded[1]["spectral_fidelity"] < coded[2]["spectral_fidelity"] < 1
        for row in coded:
            assert row["aop"] <= row["aop_p95"] <= row["aop_max"] and len(row["aop_layers"]) == len(result["layers"])
            assert row["aop"] == pytest.approx(np.mean(row["aop_layers"]))
        coarse.append(coded[0]["key_error"])
    assert coarse[0] == coarse[1] < 2 * coarse[2]  # at the plan's bits, not at those that a prompt is held at


def perturbation_by_hand(layer, held, prefix: int) -> np.ndarray:
    """[Hq, L] of the queries after `prefix` by a softmax in float64; `layer` (queries, keys, values [H, T, D], times the scale
    of attention), of which a cache gives back `held` keys and values [H, N, D]: all of the prefix, or what it kept."""
    queries, *exact = (np.asarray(x, np.float64) for x in layer)
    errors = np.zeros((len(queries), queries.shape[1] - prefix))
    for head in range(len(queries)):
        kv_head = head * len(exact[0]) // len(queries)
        sides = (
            [x[kv_head] for x in exact],
            [np.concatenate([y[kv_head], x[kv_head, prefix:]]) for x, y in zip(exact, held)],
        )
        for query in range(errors.shape[1]):
            outputs = []
            for keys, values in sides:
                seen = len(keys) - errors.shape[1] + query + 1
                scores = keys[:seen] @ queries[head, prefix + query]
                weights = np.exp(scores - scores.max())
                outputs.append(weights @ values[:seen] / weights.sum())
            errors[head, query] = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[0])
    return errors


def check_perturbation(row: dict, expected: list[np.ndarray]) -> None:
    assert row["aop_layers"] == pytest.approx([x.mean() for x in expected], rel=1e-3)
    assert row["aop_max"] == pytest.approx(np.max(expected), rel=1e-3)
    assert row["aop_p95"] == pytest.approx(np.quantile(expected, 0.95), rel=1e-3)


@pytest.mark.parametrize("name, step", [("llama", 1), ("llama", 3), ("gemma3", 1)])
def test_perturbation_is_that_of_plain_formulas(torch_backend, tmp_path, name, step):
    """Queries and exact keys of one forward pass, the decoded prefix, and a softmax in NumPy; nothing is sealed on the way."""
    from torch_models import TEXT, ByteTokenizer, model_and_profile

    from spectral_kv_torch.profiler import SpectralProfiler

    result, model = run_torch(torch_backend, name, tmp_path, methods=("spectral",), bits=(2.0,), step=step, scored=5)
    settings = Settings(**{k: v for k, v in result["settings"].items() if k != "texts"})
    (document,) = make_documents(ByteTokenizer(), [Text("random", TEXT[0])], settings, None)
    tokens = document.prefix + document.scored["text"][:-1]  # nothing is attended with the last one
    cache = torch_backend.make_prompt_cache(model, model_and_profile(name)[1], 2.0, window=16)
    plain = torch_backend.plain_cache(model)
    torch_backend.feed(model, document.prefix, plain)
    torch_backend.fill(cache, plain)
    captured = SpectralProfiler().activations(model, torch_backend.model_shape(model)[0], tokens)
    held = torch_backend.held_vectors(cache, result["layers"])
    (row,) = result["rows"]
    check_perturbation(row, [perturbation_by_hand(x, y[:2], 160) for x, y in zip(captured, held)])


@pytest.mark.parametrize("name, method", [("llama", "snapkv"), ("gemma3", "knorm"), ("llama", "streaming+spectral")])
def test_dropped_tokens_by_plain_formulas(torch_backend, tmp_path, name, method):
    """As above for the one query that sees what was kept of the prefix; what was dropped counts as zero."""
    from torch_models import TEXT, ByteTokenizer, model_and_profile

    from spectral_kv_torch.profiler import SpectralProfiler

    changes = {"methods": (method,), "bits": (3.0,), "scored": 2, "keep": (0.5, 1.0)}
    result, model = run_torch(torch_backend, name, tmp_path, **changes)
    settings = Settings(**{k: v for k, v in result["settings"].items() if k != "texts"})
    (document,) = make_documents(ByteTokenizer(), [Text("random", TEXT[0])], settings, None)
    cache = torch_backend.make_prompt_cache(
        model, model_and_profile(name)[1], 3.0 if "+" in method else 16.0, method=method, window=16, budget_tokens=80
    )
    torch_backend.feed(model, document.prefix, cache)
    shape = torch_backend.model_shape(model)[0]
    captured = list(SpectralProfiler().activations(model, shape, document.prefix + document.scored["text"][:1]))
    held = list(torch_backend.held_vectors(cache, shape.layers))
    half, whole = result["rows"]
    assert (half["keep"], half["budget_tokens"], whole["budget_tokens"]) == (0.5, 80, 160)
    check_perturbation(half, [perturbation_by_hand(x, y[:2], 160) for x, y in zip(captured, held)])
    errors, span = [], sealed_span(160, 4, 16)
    for (_, *exact), (*vectors, positions) in zip(captured, held):
        assert len(vectors[0][0]) == 80 == positions.shape[1] and (np.diff(positions) > 0).all()
        for x, y in zip(exact, vectors):
            kept = np.zeros_like(x[:, :160])
            for head, places in enumerate(np.broadcast_to(positions, y.shape[:2])):
                kept[head, places] = y[head]
            lost = np.square(x[:, span] - kept[:, span]).sum() / np.square(x[:, span]).sum()
            errors.append(lost)
    assert half["key_error"] == pytest.approx(np.mean(errors[::2])) and half["key_error"] > 0.2
    assert half["value_error"] == pytest.approx(np.mean(errors[1::2]))
    if "+" not in method:  # nothing is lost of the prefix
        assert whole["aop_max"] < 1e-4 and whole["key_error"] < 1e-10 and whole["spectral_fidelity"] == pytest.approx(1)
    assert half["aop"] > whole["aop"] and half["spectral_fidelity"] < whole["spectral_fidelity"]


def test_every_task_runs_on_a_cache_that_drops_tokens(torch_backend, tmp_path):
    changes = {
        "tasks": ("text", "copy", "drift", "needle"),
        "turns": 2,
        "turn_tokens": 40,
        "scored": 8,
        "prefixes": (300,),
    }
    result, _ = run_torch(torch_backend, "llama", tmp_path, **changes, methods=("snapkv",), keep=(0.3, 1.0), greedy=4)
    for task in changes["tasks"]:
        rows = [row for row in result["rows"] if row["task"] == task]
        kl = {
            keep: np.mean([r.get("kl", r.get("needle_kl")) for r in rows if r["keep"] == keep]) for keep in (0.3, 1.0)
        }
        assert kl[0.3] > 1.2 * kl[1.0] > 0, task
    turns = [row for row in result["rows"] if row["task"] == "drift" and row["keep"] == 0.3]
    assert [row["cache_bytes"] for row in turns] == [turns[0]["cache_bytes"]] * 2  # the budget holds while turns come


def test_scores_that_steer_the_codec(torch_backend, tmp_path):
    """Each way of rounding and each tiering is a cache of its own, at the same bits; shares only where they are asked for."""
    tiers = ((0.25, 5.0), (0.75, 1.0))
    options = {
        "methods": ("spectral", "knorm+spectral"),
        "bits": (2.0,),
        "rounding_scores": ("nearest", "expected-attention"),
        "tiers": (tiers,),
        "prefixes": (300,),
        "metrics": ("kl", "reconstruction"),
        "tasks": ("text", "needle"),
    }
    result, _ = run_torch(torch_backend, "llama", tmp_path / "tiers", **options)
    rows = {(r["method"], r["rounding_scores"], r["tiers"]): r for r in result["rows"] if r["task"] == "text"}
    ways = [
        (m, r, t)
        for m, t in (("spectral", None), ("knorm+spectral", "0.25:5,0.75:1"))
        for r in options["rounding_scores"]
    ]
    assert list(rows) == ways and all(row["keep"] is None and row["bits"] == 2 for row in rows.values())
    for row in rows.values():
        assert row["sealed_bits"] == pytest.approx(2, abs=0.1)
    errors = [rows[way]["key_error"] for way in ways]
    assert len(set(errors)) == 4  # which codes and tiers there are does reach the cache
    assert errors[0] < errors[1]  # nearest codes have the least error, weighted ones the least where it matters
    assert sum(row["task"] == "needle" for row in result["rows"]) == 40
    again, _ = run_torch(torch_backend, "llama", tmp_path / "tiers", **options)
    assert again["documents"] == result["documents"]  # read, not run again: seconds agree
    both, _ = run_torch(torch_backend, "llama", tmp_path / "both", **options | {"tasks": ("text",), "keep": (0.5,)})
    assert [(row["keep"], row["tiers"]) for row in both["rows"] if "+" in row["method"]] == [
        (0.5, None), (0.5, None), (None, "0.25:5,0.75:1"), (None, "0.25:5,0.75:1"),
    ]  # fmt: skip


def test_each_wavelet_is_a_cache_of_its_own(torch_backend, tmp_path):
    """Rows of a run without one are not mixed with it, and stay as they were."""
    options = {"methods": ("waveletkv", "knorm"), "keep": (0.5,), "metrics": ("kl",)}
    plain, _ = run_torch(torch_backend, "llama", tmp_path, **options)
    assert all("wavelet" not in row for row in plain["documents"])
    result, _ = run_torch(torch_backend, "llama", tmp_path, **options, wavelets=("db2", "haar", "bior2.2"))
    rows = {(row["method"], row["wavelet"]): row for row in result["rows"]}
    assert list(rows) == [("waveletkv", "db2"), ("waveletkv", "haar"), ("waveletkv", "bior2.2"), ("knorm", None)]
    kl = [row["kl"] for row in rows.values()]
    assert kl[0] == plain["rows"][0]["kl"] and len(set(kl)) == 4
    assert len({row["plan"] for row in result["documents"] if row["method"] == "waveletkv"}) == 1
    assert result["documents"][3] == plain["documents"][1]  # read, not run again
    again, _ = run_torch(torch_backend, "llama", tmp_path, **options)
    assert again["documents"] == plain["documents"]


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


def test_recording_leaves_the_model_as_it_was(torch_backend):
    from torch_models import model_and_profile
    from transformers.modeling_utils import AttentionInterface

    from spectral_kv_torch.integration import ATTENTION, attention_forward, restore

    model, _ = model_and_profile("llama")
    restore(model)
    plain = torch_backend.plain_cache(model)
    expected = torch_backend.feed(model, list(range(3, 40)), torch_backend.plain_cache(model))
    with pytest.raises(KeyError), torch_backend.recorded(model, plain, (0, 2)) as calls:
        got = torch_backend.feed(model, list(range(3, 40)), plain)
        raise KeyError
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert model.config._attn_implementation == "sdpa" and AttentionInterface()[ATTENTION] is attention_forward
    assert set(calls) == {0, 2} and len(calls[0]) == 1
    assert calls[2][0].outputs.shape == (4, 37, 16) and calls[2][0].keys.shape == (1, 2, 37, 16)


def test_drift_and_needle_on_real_caches(torch_backend, tmp_path):
    changes = {
        "tasks": ("drift", "needle"),
        "turns": 3,
        "turn_tokens": 24,
        "bits": (1.0, 8.0),
        "scored": 8,
        "prefixes": (300,),
    }
    rows = run_torch(torch_backend, "llama", tmp_path, **changes)[0]["rows"]
    turns = {(r["method"], r["bits"], r["turn"]): r for r in rows if r["task"] == "drift"}
    assert len(turns) == 9
    for turn in (1, 2, 3):
        exact, coarse, fine = (
            turns[(*job, turn)] for job in (("identity", 16.0), ("spectral", 1.0), ("spectral", 8.0))
        )
        assert exact["kl"] < 1e-6 and exact["kl_fresh"] < 1e-6 and exact["aop"] < 1e-4
        for name in ("kl", "kl_fresh", "aop"):
            assert coarse[name] > 2 * fine[name] > 0
        assert coarse["context"] == 300 + 24 * turn + 8 * (turn - 1)
    depths = [r for r in rows if r["task"] == "needle"]
    assert len(depths) == 30
    exact, coarse, fine = (
        [r["needle_kl"] for r in depths if (r["method"], r["bits"]) == job]
        for job in (("identity", 16.0), ("spectral", 1.0), ("spectral", 8.0))
    )
    assert max(exact) < 1e-6 and np.mean(coarse) > 2 * np.mean(fine) > 0
    assert all(r["found"] == r["found_ref"] and r["needle_logp"] < 0 for r in depths if r["method"] == "identity")


def test_a_method_for_files_is_measured_inside_too(torch_backend, tmp_path, caplog):
    pytest.importorskip("constriction")
    changes = {"methods": ("spectral-stored", "identity"), "bits": (1.0, 4.0), "greedy": 6, "step": 3}
    result, _ = run_torch(
        torch_backend, "gemma3", tmp_path, tasks=("text", "drift"), turns=1, turn_tokens=20, scored=8, **changes
    )
    rows = {(r["method"], r["bits"]): r for r in result["rows"] if r["task"] == "text"}
    coarse, fine = rows["spectral-stored", 1.0], rows["spectral-stored", 4.0]
    for name in ("aop", "key_error", "value_error"):
        assert coarse[name] > fine[name] > rows["identity", 16.0][name]
    assert all(0 <= row["first_divergence"] <= 6 for row in rows.values())
    assert [r["method"] for r in result["rows"] if r["task"] == "drift"] == ["identity"]
    assert [s["task"] for s in result["skipped"]] == ["drift"] * 2 and "needs a live cache" in caplog.text

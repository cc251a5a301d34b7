"""`spectralkv eval`: what is fed and scored, resuming, texts, and one clear line for every wrong use."""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from cases import ToyModel, toy_profile_of

from spectral_kv_core.arrays.divergence import compare_logits
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.cli import main as cli
from spectral_kv_core.evaluation.documents import make_documents
from spectral_kv_core.evaluation.records import RecordFile, summarize
from spectral_kv_core.evaluation.run import evaluate, plan_jobs
from spectral_kv_core.evaluation.settings import Settings
from spectral_kv_core.evaluation.text import (
    Text,
    copy_span,
    default_texts,
    detokenize,
    read_text,
    split_articles,
    split_documents,
)

NAMES = {"model": "tiny", "backend": "torch"}
VOCABULARY = 64


class LetterTokenizer:
    """A token per character; `first` stands before every text, as a beginning-of-text token does."""

    def __init__(self, first: tuple[int, ...] = ()):
        self.first = list(first)

    def encode(self, text, add_special_tokens=True):
        return (self.first if add_special_tokens else []) + [ord(c) % VOCABULARY for c in text]


class FakeBackend:
    """A model that expects every token to be the one before plus 1; caches are lists of tokens; `log` has every call."""

    HOST_PACKAGES = ("safetensors", "no-such-package")

    def __init__(self, profile=None, sharpness=8.0, limit=None):
        self.profile, self.sharpness, self.limit, self.log, self.recording = profile, sharpness, limit, [], {}
        self.toy = toy_profile_of(ToyModel())

    def context_limit(self, model):
        return self.limit

    def model_shape(self, model):
        return self.toy.shape, {}

    def weights_digest(self, model):
        return "0"

    def model_dtype(self, model):
        return "fake.float32"

    def plain_cache(self, model):
        return SimpleNamespace(kind="plain", tokens=[])

    def build_cache(self, model, profile, request):
        self.log.append(("make", request.method.name, request.bits))
        return SimpleNamespace(kind=request.method.name, tokens=[])

    def fill(self, cache, plain):
        assert not cache.tokens
        self.log.append(("fill", cache.kind, len(plain.tokens)))
        cache.tokens = list(plain.tokens)

    def feed(self, model, tokens, cache, keep=1):
        self.log.append(("feed", cache.kind, list(tokens)))
        cache.tokens += tokens
        for calls in self.recording.get(id(cache), {}).values():
            calls.append(SimpleNamespace(tokens=list(tokens), outputs=self.outputs(cache.tokens, len(tokens))))
        expected = (np.array(cache.tokens[-keep:]) + 1) % VOCABULARY
        return self.sharpness * np.eye(VOCABULARY, dtype=np.float32)[expected]

    @staticmethod
    def outputs(tokens, length):
        """[1, length, 2]: says what the tokens that are attended to are, and how many."""
        last = np.arange(len(tokens) - length, len(tokens)) + 1
        return np.stack([np.cumsum(tokens)[last - 1], last], axis=-1)[None].astype(np.float32)

    @contextmanager
    def recorded(self, model, cache, layers):
        self.recording[id(cache)] = {i: [] for i in layers}
        yield self.recording[id(cache)]
        del self.recording[id(cache)]

    def attend(self, cache, layer_idx, call):
        held = vars(cache).setdefault(f"layer{layer_idx}", list(cache.tokens))
        held += call.tokens
        return self.outputs(held, len(call.tokens))

    def held_vectors(self, cache, layers):
        for _ in layers:
            yield *[np.array(cache.tokens, np.float32)[None, :, None]] * 2, None

    def cache_nbytes(self, cache):
        return CacheSize({"exact": len(cache.tokens)}, len(cache.tokens), 4 * len(cache.tokens), 7)

    def made(self):
        return [call[1:] for call in self.log if call[0] == "make"]

    def fed(self, kind):
        return [call[2] for call in self.log if call[0] == "feed" and call[1] == kind]


COUNTING = "".join(map(chr, range(VOCABULARY))) * 40  # every token is the one before plus 1
SMALL = {"prefixes": (60,), "scored": 9, "documents": 2, "window": 8, "sinks": 2}


def run_fake(backend, folder, texts=None, tokenizer=None, profile=None, **changes):
    settings = Settings(**({"methods": ("identity",), "tasks": ("text",)} | SMALL | changes))
    texts = texts or [Text("counting", COUNTING)]
    profile = profile or backend.toy
    return evaluate(
        backend, None, tokenizer or LetterTokenizer(), settings, texts, folder, names=NAMES, profile=profile
    )


def test_a_second_evaluation_of_a_folder_waits_and_takes_the_rows_of_the_first(tmp_path, caplog):
    began, results = threading.Event(), {}

    class Slow(FakeBackend):
        def build_cache(self, *args, **kwargs):
            began.set()
            time.sleep(0.3)
            return super().build_cache(*args, **kwargs)

    backends = {"first": Slow(), "second": FakeBackend()}

    def run(name):
        results[name] = run_fake(backends[name], tmp_path)

    threads = [threading.Thread(target=run, args=(name,)) for name in backends]
    with caplog.at_level(logging.WARNING, "spectralkv"):
        threads[0].start()
        assert began.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert backends["first"].made() and not backends["second"].made()
    assert results["first"]["documents"] == results["second"]["documents"]
    assert f"Another evaluation writes to {tmp_path}: waiting" in caplog.text


@pytest.mark.parametrize("step", [1, 3, 8, 50])
def test_every_scored_token_is_predicted_by_the_one_before(tmp_path, step):
    """The fake model is right about every token of this text, so one that is off by one shows in the perplexity."""
    backend = FakeBackend()
    rows = run_fake(backend, tmp_path, step=step)["documents"]
    sure = 1 + (VOCABULARY - 1) * np.exp(-backend.sharpness)
    assert [row["ppl"] for row in rows] == [row["ppl_ref"] for row in rows] == pytest.approx([sure] * 2)
    assert all(row["kl"] == 0 and row["top1"] == row["top5"] == 1 and row["scored_tokens"] == 9 for row in rows)
    scored = backend.fed("identity")
    assert max(map(len, scored)) == min(step, 8) and sum(map(len, scored)) == 2 * 8  # nothing follows the last one


def test_the_prefix_is_read_once_and_taken_over(tmp_path):
    backend = FakeBackend()
    run_fake(backend, tmp_path, methods=("identity", "spectral"), bits=(2.0, 3.0), tasks=("text", "copy"))
    assert sum(len(tokens) == 60 for tokens in backend.fed("plain")) == 2  # once per document
    assert all(len(tokens) == 1 for kind in ("identity", "spectral") for tokens in backend.fed(kind))
    assert all(call[2] == 60 for call in backend.log if call[0] == "fill")  # scoring spoilt no plain cache


def test_prefill_in_chunks_goes_through_the_compressed_cache(tmp_path):
    backend = FakeBackend()
    row = run_fake(backend, tmp_path, documents=1, prefill_chunk=25)["documents"][0]
    assert [len(tokens) for tokens in backend.fed("identity")[:3]] == [25, 25, 10]
    assert [len(tokens) for tokens in backend.fed("plain")[:1]] == [60]
    assert row["kl"] == 0 and row["cache_bytes"] == 68  # 60 and all scored tokens but the last


def test_copied_tokens_stand_in_the_prefix():
    assert copy_span(1860, 128, 4, 64) == (600, 728)
    settings = Settings(methods=("identity",), **SMALL)
    for document in make_documents(LetterTokenizer(), [Text("counting", COUNTING)], settings, None):
        start, stop = copy_span(60, 9, 2, 8)
        assert (start, stop) == (19, 28) and document.scored["copy"] == document.prefix[19:28]
        assert document.scored["text"][0] == (document.prefix[-1] + 1) % VOCABULARY
    with pytest.raises(ValueError, match=r"at least (\d+) tokens for the task copy") as error:
        copy_span(100, 64, 4, 64)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert copy_span(needed, 64, 4, 64)[1] <= needed - 64 - 15
    with pytest.raises(ValueError):
        copy_span(needed - 1, 64, 4, 64)


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    options = {"methods": ("identity", "spectral"), "bits": (2.0, 3.0), "tasks": ("text", "copy")}
    whole = run_fake(FakeBackend(), tmp_path, **options)["documents"]
    path = tmp_path / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole) == 12
    path.write_bytes(b"".join(lines[:5]) + lines[5][:-20])  # killed while the sixth row was written
    backend = FakeBackend()
    again = run_fake(backend, tmp_path, **options)["documents"]
    assert len(backend.made()) == 7
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in whole]
    assert [json.loads(line)["method"] for line in path.read_text().splitlines()] == [r["method"] for r in whole]
    third = FakeBackend()
    run_fake(third, tmp_path, **options)
    assert not third.log  # nothing left: the model does not even read the prefix


@pytest.mark.parametrize(
    "change", [{"step": 2}, {"window": 9}, {"prefill_chunk": 30}, {"scored": 8}, {"prefixes": (61,)}, {"sinks": 3}]
)
def test_other_settings_are_other_rows(tmp_path, change):
    run_fake(FakeBackend(), tmp_path)
    backend = FakeBackend()
    assert len(run_fake(backend, tmp_path, **change)["documents"]) == len(backend.made()) == 2
    other = FakeBackend()
    run_fake(other, tmp_path, texts=[Text("counting", COUNTING[1:])], **change)
    assert len(other.made()) == 2


def test_a_damaged_file_of_rows_is_not_written_to(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"method": "spectral"}\nnot a row\n{"method": "affine"}\n')
    with pytest.raises(ValueError, match="line 2 is none"):
        RecordFile(path)
    assert path.read_text().endswith('"affine"}\n')


def test_summary_is_over_documents():
    row = dict.fromkeys(("kl_p95", "top1", "top5", "ppl", "ppl_ref", "nd_ppl", "dense_bytes", "compression"), 1.0)
    row |= {"method": "m", "bits": 2.0, "task": "text", "text": "t", "prefix": 8, "scored_tokens": 4, "seconds": 1.0}
    row |= {"bits_per_element": 3.0, "table_bytes": 5, "sealed_bits": 2.0}
    rows = [row | {"kl": kl, "cache_bytes": size} for kl, size in ((0.1, 10), (0.3, 20), (0.2, 30))]
    (summary,) = summarize(rows)
    assert summary["kl"] == pytest.approx(0.2) and summary["kl_worst"] == 0.3
    assert summary["kl_se"] == pytest.approx(0.1 / np.sqrt(3))
    assert summary["cache_bytes"] == 20 and summary["documents"] == 3 and summary["scored_tokens"] == 12
    assert summarize(rows[:1])[0]["kl_se"] is None and "low_ppl" not in summary
    assert len(summarize([*rows, rows[0] | {"prefix": 9}])) == 2


def test_top5_is_the_share_of_the_reference_s_five():
    reference = -np.arange(10.0)[None].repeat(2, 0)  # the likeliest are 0, 1, 2, 3, 4
    test = reference.copy()
    test[1] = -np.abs(np.arange(10.0) - 5)  # 5 and its neighbors: 3, 4, 5, 6, 7
    result = compare_logits(reference, test, [0, 0])
    assert result["top5"] == pytest.approx((1 + 2 / 5) / 2) and result["top1"] == 0.5
    assert result["nd_ppl"] == pytest.approx(result["ppl"] / result["ppl_ref"] - 1)
    assert compare_logits(reference[:, :3], test[:, :3], [0, 0])["top5"] == 1  # of three tokens


def test_predictable_text_is_flagged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "spectralkv"):
        result = run_fake(FakeBackend(), tmp_path, tasks=("text", "copy"))
    assert {row["task"]: row.get("low_ppl") for row in result["documents"]} == {"text": True, "copy": None}
    assert sum("perplexity on counting" in record.message for record in caplog.records) == 1
    flat = run_fake(FakeBackend(sharpness=1.0), tmp_path / "flat", texts=[Text("other", COUNTING)])
    assert not any("low_ppl" in row for row in flat["documents"] + flat["rows"])


def test_pairs_out_of_reach_are_skipped(caplog, tmp_path):
    backend = FakeBackend()
    with caplog.at_level(logging.WARNING, "spectralkv"):
        result = run_fake(backend, tmp_path, methods=("spectral", "identity", "affine"), bits=(2.0, 12.0), documents=1)
    assert backend.made() == [("spectral", 2.0), ("identity", 16.0)]  # affine begins at 2.5, identity has no choice
    assert [(s["method"], s["bits"]) for s in result["skipped"]] == [
        ("spectral", 12.0),
        ("affine", 2.0),
        ("affine", 12.0),
    ]
    assert sum(record.message.startswith("Skipped spectral at 12 bits: Expected") for record in caplog.records) == 1
    with pytest.raises(ValueError, match="bits that it can reach, received methods spectral with bits 12"):
        Settings(methods=("spectral",), bits=(12.0,), **SMALL)
    settings = Settings(methods=("turboquant",), bits=(9.0,), **SMALL)  # which heads of 8 channels have
    with pytest.raises(ValueError, match="bits that it can reach, received methods turboquant with bits 9"):
        plan_jobs(backend, None, None, settings, backend.toy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ("spectrel",)}, "method among"),
        ({"methods": ()}, "at least one value for `methods`"),
        ({"tasks": ("speed",)}, "`tasks` among text, copy, drift, needle, received 'speed'"),
        ({"bits": (0.0,)}, "`bits` above 0"),
        ({"bits": (float("nan"),)}, "`bits` above 0"),
        ({"prefixes": (60, 1)}, "`prefixes` of at least 2, received 1"),
        ({"scored": 1}, "`scored` of at least 2"),
        ({"documents": 0}, "`documents` of at least 1"),
        ({"step": 0}, "`step` of at least 1"),
        ({"prefill_chunk": 0}, "`prefill_chunk` of at least 1"),
        ({"window": -1}, "`window` of at least 0"),
        ({"window": 50, "tasks": ("copy",)}, "for the task copy"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**({"methods": ("identity",)} | SMALL | change))


def test_nothing_runs_when_text_or_context_is_too_short(tmp_path):
    backend = FakeBackend(limit=68)
    with pytest.raises(ValueError, match="at most 68 tokens, the model's context, received 60 of prefix and 9 scored"):
        run_fake(backend, tmp_path)
    short = [Text("counting", COUNTING), Text("short", "abc")]
    with pytest.raises(ValueError, match="at least 69 tokens in the text short, received 3"):
        run_fake(FakeBackend(), tmp_path, texts=short)
    other = toy_profile_of(ToyModel(kv_heads=1))
    with pytest.raises(ValueError, match="profile of this model"):
        run_fake(FakeBackend(), tmp_path, methods=("spectral",), profile=other)
    assert not backend.log and not (tmp_path / "rows.jsonl").exists()


WIKI = """
 = First Title =

 The well @-@ known 1 @,@ 234 <unk> ( 3 @.@ 5 % ) of " the cat 's tail " do n't matter .
 = = Section = =

 More text .
 = Second : a title =

 Other text , longer than the first one by far , so that it is picked when that is asked for .
"""


def test_wikitext_becomes_running_text_and_articles():
    text = read_text("wiki", WIKI).text
    assert "The well-known 1,234 (3.5%) of \"the cat's tail\" don't matter." in text
    assert detokenize("plain - text, as it is.") == "plain - text, as it is."
    assert read_text("mine", "a , b").text == "a , b"  # not in WikiText's style
    first, second = split_articles(text)
    assert first.startswith("= First Title =") and "= = Section = =" in first and first.endswith("More text.")
    assert second.startswith("= Second: a title =")
    unknown = detokenize(" = <unk> <unk> = \n\n One .\n = = <unk> = = \n\n Two .\n = <unk> = \n\n Three .\n")
    assert [article.split()[-1] for article in split_articles(unknown)] == ["Two.", "Three."]
    assert split_articles("x = 1 = 2\ny == 3 ==\n") == []


def test_documents_are_starts_of_articles_or_windows():
    wiki = read_text("wiki", WIKI)
    second = split_articles(wiki.text)[1]
    assert len(split_articles(wiki.text)[0]) > len(second) - 20
    encode = LetterTokenizer().encode
    assert [d[:20] for d in split_documents(LetterTokenizer(), wiki, 30, 5)] == [
        encode(a)[:20] for a in split_articles(wiki.text)
    ]
    with pytest.raises(ValueError, match="an article of at least 1,000 tokens in the text wiki"):
        split_documents(LetterTokenizer(), wiki, 1000, 2)
    letters = Text("letters", "".join(chr(i) for i in range(60)))
    assert [d[0] for d in split_documents(LetterTokenizer(), letters, 10, 3)] == [0, 25, 50]
    assert [d[0] for d in split_documents(LetterTokenizer(), letters, 25, 9)] == [0, 35]
    assert [d[0] for d in split_documents(LetterTokenizer(), letters, 40, 2)] == [0]
    marked = split_documents(LetterTokenizer((63,)), letters, 10, 3)
    assert all(len(d) == 10 and d[0] == 63 and d[1] != 63 for d in marked)


def test_default_texts_are_long_enough_held_out_and_the_same_everywhere():
    from spectral_kv_core.calibration.text import load_default_texts

    prose, code = default_texts()
    assert (prose.name, code.name) == ("prose", "code")
    assert len(prose.text) > 40_000 and len(code.text) > 90_000 and "class LayerCache" in code.text
    assert [text.digest for text in (prose, code)] == ["22aa70b3ef404851", "13bc02faf73581ab"]
    calibration = "\n".join(load_default_texts())
    lines = [line for text in (prose, code) for line in text.text.splitlines() if len(line) > 70]
    assert not [line for line in lines if line in calibration]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("torch")
    from tiny_checkpoint import save_tiny_checkpoint

    folder = tmp_path_factory.mktemp("eval")
    text = "In the beginning there was a table, and on the table stood 23 cups; nobody knew whose they were. "
    (folder / "cups.txt").write_text("".join(text.replace("23", str(i)) for i in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECTRALKV_CACHE", str(folder / "cache"))
        model = str(save_tiny_checkpoint(folder / "model"))
        calibrate = ["--text", str(folder / "cups.txt"), "--tokens", "512", "--document", "256", "--quiet"]
        assert cli.main(["profile", "--model", model, "--backend", "torch", *calibrate]) == 0
        yield SimpleNamespace(folder=folder, model=model, text=str(folder / "cups.txt"))


def command(checkpoint, *more, text=None, output="out"):
    return [
        "eval", "--model", checkpoint.model, "--backend", "torch", "--prefix", "200", "--scored", "8", "--documents", "1",
        "--text", text or checkpoint.text, "--output", str(checkpoint.folder / output), *more,
    ]  # fmt: skip


def test_the_command_reports_and_saves(checkpoint, capsys):
    arguments = command(checkpoint, "--methods", "spectral,identity", "--bits", "3,12", "--window", "32")
    assert cli.main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    assert {"rows", "documents", "model", "backend", "versions", "settings"} <= set(result) and out.count("\n") == 1
    assert {"spectralkv", "numpy", "torch", "transformers"} <= set(result["versions"])
    assert [(r["method"], r["bits"], r["task"]) for r in result["documents"]] == [
        ("spectral", 3, "text"), ("identity", 16, "text"), ("spectral", 3, "copy"), ("identity", 16, "copy"),
    ]  # fmt: skip
    wanted = {
        "kl", "kl_p95", "top1", "top5", "ppl", "ppl_ref", "nd_ppl", "scored_tokens", "cache_bytes", "dense_bytes",
        "compression", "bits_per_element", "table_bytes", "seconds",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in result["documents"] + result["rows"])
    row = result["documents"][0]
    assert row["dense_bytes"] == 207 * 3 * 2 * 2 * 16 * 2 and row["text"] == "cups" and row["dtype"] == "float32"
    folder = checkpoint.folder / "out"
    assert json.loads((folder / "summary.json").read_text()) == result
    assert "| spectral | 3 |" in (folder / "summary.md").read_text()
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 4
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cups, copy: 1 document of 200 tokens" in printed and "spectral" in printed


def test_the_command_runs_every_task(checkpoint, capsys):
    options = [
        "--tasks",
        "text,copy,drift,needle",
        "--turns",
        "2",
        "--turn-tokens",
        "20",
        "--greedy",
        "4",
        "--window",
        "32",
    ]
    arguments = command(checkpoint, "--methods", "spectral", "--bits", "2", *options, output="every")
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in result["documents"]] == ["text", "copy", "drift", "drift", *["needle"] * 10]
    assert result["settings"]["turn_tokens"] == 20 and result["layers"] == [0, 1, 2]
    text, _, first, last, *depths = result["rows"]
    assert {"aop_layers", "key_error", "value_error", "spectral_fidelity", "first_divergence", "token_match"} <= set(
        text
    )
    assert (first["turn"], first["context"], last["turn"], last["context"]) == (1, 220, 2, 248)
    assert {"kl_fresh", "aop"} <= set(last) and [row["depth"] for row in depths] == [i / 20 for i in range(1, 20, 2)]
    assert all({"found", "found_ref", "needle_kl", "needle_logp", "needle_logp_ref"} <= set(row) for row in depths)
    rows = (checkpoint.folder / "every" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 14 and cli.main(arguments) == 0
    assert (checkpoint.folder / "every" / "rows.jsonl").read_text().splitlines() == rows
    printed = capsys.readouterr().out
    assert "cups, drift: 1 document of 200 tokens, 2 turns" in printed and "hidden at 10 depths" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "spectrel"], "method among"),
        (["--methods", "spectral,"], "names separated by commas for --methods"),
        (["--methods", "spectral", "--bits", "4;3"], "numbers separated by commas for --bits, received '4;3'"),
        (["--methods", "spectral", "--bits", "12"], "bits that it can reach"),
        (["--methods", "spectral", "--prefix", "1e3"], "whole numbers separated by commas for --prefix"),
        (["--methods", "spectral", "--prefix", "5000", "--tasks", "text"], "the model's context"),
        (["--methods", "spectral", "--prefix", "3000"], "at least 3,008 tokens in the text cups"),
        (["--methods", "spectral", "--tasks", "speed"], "tasks among"),
        (["--methods", "spectral", "--metrics", "kl;aop"], "metrics among kl, aop, reconstruction, received 'kl;aop'"),
        (["--methods", "spectral", "--keep", "half"], "numbers separated by commas for --keep, received 'half'"),
        (["--methods", "spectral", "--keep", "0.5"], "drops tokens for --keep, spectral keep every token"),
        (["--methods", "affine", "--rounding-scores", "triattention"], "for --rounding-scores, affine do not"),
        (["--methods", "spectral", "--rounding-scores", "snapkv"], "--rounding-scores among nearest"),
        (["--methods", "spectral", "--tiers", "0.5:4,0.5:1"], "SCORER+METHOD for --tiers, spectral are none"),
        (["--methods", "knorm+spectral", "--tiers", "0.5:4,0.4:1"], "quarters and add up to 1"),
        (["--methods", "knorm+spectral", "--tiers", "0.5:4;0.5:1"], "SHARE:BITS separated by commas for --tiers"),
        (["--methods", "spectral", "--tasks", "drift", "--turns", "0"], "--turns of at least 1, received 0"),
        (["--methods", "spectral", "--tasks", "drift", "--turns", "12"], "lower --turns, --turn-tokens, --prefix or"),
        (
            ["--methods", "spectral", "--tasks", "drift", "--turns", "500"],
            "500 turns of 264. Lower --prefix, --turns or",
        ),
        (
            ["--methods", "spectral", "--tasks", "needle", "--window", "150"],
            "tokens for the task needle with a window of 150",
        ),
        (["--methods", "spectral", "--scored", "0"], "--scored of at least 2, received 0"),
        (["--methods", "spectral", "--text", "missing.txt"], "found nothing at missing.txt"),
        (["--methods", "spectral", "--text", "cups=missing.txt"], "found nothing at missing.txt"),
        (["--methods", "spectral", "--text", "=missing.txt"], "NAME=FILE for --text"),
        (["--methods", "spectral", "--profile", "missing.safetensors"], "found nothing at"),
    ],
)
def test_wrong_use_is_one_line(checkpoint, capsys, arguments, message):
    assert cli.main(command(checkpoint, *arguments, output="wrong")) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("spectralkv")][-1:]
    assert message in line and not captured.out and not (checkpoint.folder / "wrong" / "rows.jsonl").exists()


def test_texts_need_different_names_and_output_a_folder(checkpoint, capsys):
    assert cli.main(command(checkpoint, "--methods", "spectral", "--text", checkpoint.text)) == 2
    assert "different names, received cups, cups" in capsys.readouterr().err
    arguments = command(checkpoint, "--methods", "identity")
    arguments[arguments.index("--output") + 1] = checkpoint.text
    assert cli.main(arguments) == 2
    assert "folder for --output" in capsys.readouterr().err
    both = command(
        checkpoint, "--methods", "identity", "--text", f"again={checkpoint.text}", "--tasks", "text", "--json"
    )
    assert cli.main(both) == 0
    assert [row["text"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["cups", "again"]

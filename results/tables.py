"""The tables of README and of this folder, from the JSON that `spectralkv eval` wrote: python results/tables.py [--write]

--write puts them between the markers <!-- table NAME --> and <!-- end --> of the files that have them; --code FILE writes
the code that was read for these tables to a file, which is not the one that `eval` reads by itself; --publish DIR [DIR ...]
takes the summary of a run over, without the rows of single documents, as the first DIR's name, with the rows of the other
runs.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

from spectral_kv_core.evaluation.report import provenance_line
from spectral_kv_core.evaluation.text import Text
from spectral_kv_core.plotting.results import budget_name, variant, variants

HERE = Path(__file__).parent
CODE_MODULES = ("tarfile", "subprocess", "argparse")  # the text code of the tables: their source, in this Python alone
CODE_PYTHON, CODE_DIGEST = "3.11.7", "b308defa15f1f889"
FILES = (
    HERE.parent / "README.md", HERE / "methods.md", HERE / "scorers.md", HERE.parent / "docs/decisions/0011-outliers.md",
    HERE.parent / "docs/guide/memory.md",
)  # fmt: skip
TIMES = 3  # the KL of prose at equal bytes, that texts which a profile does not know may have


def rows(name: str, **fixed) -> list[dict]:
    """Summary rows of `name`.json with the values `fixed`."""
    found = json.loads((HERE / f"{name}.json").read_text())["rows"]
    return [row for row in found if all(row[key] == value for key, value in fixed.items())]


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def codec() -> str:
    """KL on text and copies, and how often the most likely token stays; how much smaller the whole cache is in bfloat16."""
    names = ("spectral", "spectral-trellis", "spectral-dense", "spectral-stored")
    body = []
    for bits in (4, 3, 2, 1.5, 1, 0.5):
        (size,) = rows("codec_smollm2_sizes", bits=bits, method="spectral", task="text")
        cells = [f"{bits:g}", f"{size['compression']:.2f}"]
        for name in names:
            (text,) = rows("codec_smollm2_1024", bits=bits, method=name, task="text")
            (copy,) = rows("codec_smollm2_1024", bits=bits, method=name, task="copy")
            cells.append(f"{text['kl']:.4f} / {copy['kl']:.4f} ({text['top1']:.1%})")
        body.append(cells)
    return table(["bits", "times smaller", *(f"`{name}`" for name in names)], body)


def methods(name: str) -> str:
    """KL on every text by method, at the bits that are really stored."""
    texts, body, seen = _texts(name), [], set()
    for row in rows(name, task="text", text=texts[0]):
        key = row["method"], round(row["sealed_bits"], 2)
        if key in seen:  # asked for more bits than the next step of a grid: the same plan again
            continue
        seen.add(key)
        kl = [rows(name, task="text", text=text, method=row["method"], bits=row["bits"])[0] for text in texts]
        body.append([f"`{row['method']}`", f"{row['sealed_bits']:.2f}", *(f"{x['kl']:.4f}" for x in kl)])
        body[-1] += [f"{kl[0]['top1']:.1%}", f"{row['cache_bytes'] / 1e6:.2f}"]
    order = {method: i for i, method in enumerate(dict.fromkeys(line[0] for line in body))}
    body.sort(key=lambda line: (order[line[0]], -float(line[1])))
    return table(["method", "bits stored", *(f"KL {t}" for t in texts), f"top-1 {texts[0]}", "cache, MB"], body)


def scorers(name: str) -> str:
    """KL of every scorer at every share of the tokens kept, on every text, with the attention output's error."""
    texts, keeps = _texts(name), sorted({row["keep"] for row in rows(name)}, reverse=True)
    body = []
    for method in dict.fromkeys(row["method"] for row in rows(name)):
        cells = [f"`{method}`"]
        for text in texts:
            for keep in keeps:
                (row,) = rows(name, task="text", text=text, method=method, keep=keep)
                aop = f" ({row['aop']:.3f})" if row.get("aop") is not None else ""
                cells.append(f"{row['kl']:.4f}{aop}")
        body.append(cells)
    body.sort(key=lambda line: float(line[1].split()[0]))
    return table(["scorer", *(f"{text} {keep:.0%}" for text in texts for keep in keeps)], body)


def scorer_rows(name: str) -> str:
    """Top-1, perplexity and bytes of what `scorers` shows."""
    texts, keeps = _texts(name), sorted({row["keep"] for row in rows(name)}, reverse=True)
    body = []
    for method in sorted({row["method"] for row in rows(name)}):
        for keep in keeps:
            cells = [f"`{method}`", f"{keep:.0%}"]
            for text in texts:
                (row,) = rows(name, task="text", text=text, method=method, keep=keep)
                cells += [f"{row['top1']:.1%}", f"{row['nd_ppl']:+.1%}"]
            body.append([*cells, f"{row['cache_bytes'] / 1e6:.2f}"])
    head = [f"{label} {text}" for text in texts for label in ("top-1", "ND-PPL")]
    return table(["scorer", "kept", *head, "cache, MB"], body)


def composed(name: str) -> str:
    """KL of `SCORER+spectral` by share and bits, beside every token at as many bits: equal in tokens times bits."""
    texts, columns = _texts(name), ((0.5, 2.0), (0.25, 4.0))
    body = []
    for method in dict.fromkeys(row["method"] for row in rows(name)):
        cells = [f"`{method}`"]
        for keep, bits in columns:
            place = {"bits": bits, "keep": keep} if "+" in method else {"bits": bits * keep}
            found = [rows(name, text=text, method=method, **place)[0] for text in texts]
            kl = " / ".join(f"{row['kl']:.4f}" for row in found)
            cells.append(f"{kl} ({found[0]['cache_bytes'] / 1e6:.2f})")
        body.append(cells)
    body.sort(key=lambda line: float(line[1].split()[0]))
    head = [f"{bits:g} bits on {keep:.0%}" for keep, bits in columns]
    return table([f"{' / '.join(texts)} (MB)", *head], body)


def steering(name: str) -> str:
    """KL on texts and copies by what rounds the codes, and by tiers."""
    order = {"nearest": -2, "expected-attention": -1}
    kinds = [(text, task) for text in _texts(name) for task in ("text", "copy")]
    body = []
    for row in rows(name, task="text", text=kinds[0][0]):
        place = {key: row[key] for key in ("method", "bits", "rounding_scores", "tiers")}
        kl = [rows(name, text=text, task=task, **place)[0]["kl"] for text, task in kinds]
        how = f"tiers {row['tiers']}" if row["tiers"] else f"rounded by `{row['rounding_scores']}`"
        if row["rounding_scores"] == "nearest":
            how = "nearest codes"
        codec, rank = row["method"].rpartition("+")[2], order.get(row["rounding_scores"], 0 if not row["tiers"] else 1)
        cells = [f"`{codec}`", f"{row['bits']:g}", how, *(f"{x:.4f}" for x in kl), f"{row['cache_bytes'] / 1e6:.2f}"]
        body.append(((codec, -row["bits"], rank, kl[0]), cells))
    head = ["method", "bits", "", *(f"{text} {task}" if task == "copy" else text for text, task in kinds), "cache, MB"]
    return table(head, [cells for _, cells in sorted(body)])


def needle(name: str) -> str:
    """Found numbers over the depths, by what is kept."""
    body = []
    for one in variants(rows(name)):
        found = [row for row in rows(name) if variant(row) == one]
        mean = {x: sum(row[x] for row in found) / len(found) for x in ("needle_kl", "needle_logp", "cache_bytes")}
        count = f"{sum(round(row['found']) for row in found)} of {len(found)}"
        cells = [f"`{one[0]}`", budget_name(one), count, f"{mean['needle_kl']:.3f}", f"{mean['needle_logp']:.2f}"]
        body.append([*cells, f"{mean['cache_bytes'] / 1e6:.1f}"])
    head = ["method", "", "found", "KL over the digits", "mean log probability of the digits", "cache, MB"]
    return table(head, sorted(body, key=lambda line: float(line[3])))


def outliers(name: str) -> str:
    """KL of texts that a profile does not know, beside prose and `affine` with no fewer bytes."""
    body = []
    for row in (row for row in rows(name) if "beside" in row):
        prose, affine = row["beside"]["prose"], row["beside"]["affine"]
        short = [x for x in (prose, affine) if x["cache_bytes"] < row["cache_bytes"]]
        cells = [row["text"], f"{row['bits']:g}", f"{row['cache_bytes'] / 1e6:.2f}", f"{row['kl']:.5f}"]
        cells += [f"{x['kl']:.5f} ({x['bits']:g}{' at most' if x in short else ''})" for x in (prose, affine)]
        missed = ["prose"] * (row["kl"] > TIMES * prose["kl"]) + ["affine"] * (row["kl"] > affine["kl"])
        body.append([*cells, f"{row['exact_tokens']:.0f}", " and ".join(missed) or "-"])
    head = ["text", "bits", "cache, MB", "KL", "KL of prose (bits)", "KL of `affine` (bits)", "exact tokens", "misses"]
    return table(head, body)


def outlier_sentence(name: str) -> str:
    """What the figures of `outliers` were made with, and what ordinary text costs."""
    result = json.loads((HERE / f"{name}.json").read_text())
    prose = [row for row in result["rows"] if "least_bytes" in row]
    costs = " and ".join(
        f"{100 * (row['cache_bytes'] / row['least_bytes'] - 1):.2f} % at {row['bits']:g} bits" for row in prose
    )
    many = prose[0]["documents"]
    return (
        f"The {many} documents of prose take more bytes than the plainest of them by {costs}, in the mean.\n"
        f"{provenance_line(result['provenance'])}"
    )


def windows(name: str) -> str:
    """Bytes and KL with the host's own sliding windows, and with packed ones."""
    body = []
    for row in rows(name):
        cells = [f"{row['bits']:g}", row["windows"] or "the host's own"]
        body.append([*cells, f"{row['cache_bytes'] / 1e6:.2f}", f"{row['kl']:.4f}"])
    return table(["bits", "windows", "cache, MB", "KL"], body)


def windows_sentence(name: str) -> str:
    """What the figures of `windows` were made with."""
    result = json.loads((HERE / f"{name}.json").read_text())
    settings = result["settings"]
    return (
        f"{result['model']} in {settings['dtype']}: {settings['documents']} prefixes of {settings['prefix']:,} tokens, each "
        f"with {settings['scored']} tokens behind it, one per call.\n{provenance_line(result['provenance'])}"
    )


def _texts(name: str) -> list[str]:
    return sorted({row["text"] for row in rows(name)}, reverse=True)


def published_code() -> Text:
    """The text `code` of the published tables; raises SystemExit in a Python whose modules are others."""
    code = Text("code", "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES))
    if code.digest != CODE_DIGEST:
        raise SystemExit(
            f"Expected the standard library of Python {CODE_PYTHON} for the text code of the tables, this is Python "
            f"{sys.version.split()[0]}, which has another. Run make results with Python {CODE_PYTHON}."
        )
    return code


def main() -> None:
    if sys.argv[1:2] == ["--code"]:
        Path(sys.argv[2]).write_bytes(published_code().text.encode())
        return
    if sys.argv[1:2] == ["--publish"]:
        run, *others = map(Path, sys.argv[2:])
        summary, *more = (json.loads((folder / "summary.json").read_text()) for folder in (run, *others))
        kept = {key: value for key, value in summary.items() if key != "documents"}
        kept["model"] = Path(kept["model"]).name  # no folder of this machine
        kept["rows"] += [row for other in more for row in other["rows"]]
        if more:
            kept["other_settings"] = [other["settings"] for other in more]
        (HERE / f"{run.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    for path in FILES:
        text = path.read_text(encoding="utf-8") if path.exists() else ""

        def made(match: re.Match) -> str:
            kind, _, name = match[1].partition(" ")
            body = globals()[kind](*([name] if name else []))
            return f"<!-- table {match[1]} -->\n{body}\n<!-- end -->"

        new = re.sub(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", made, text, flags=re.S)
        if "--write" in sys.argv:
            path.write_text(new, encoding="utf-8")
        else:
            print(new if new != text else f"{path.name}: nothing changes")


if __name__ == "__main__":
    main()

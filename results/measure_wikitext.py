"""Bytes, quality and speed on WikiText-2 test, through the command line: python results/measure_wikitext.py TEXT OUT.json

TEXT is `wikitext2-test.txt`. Two articles: 1,024 tokens of prompt, the 128 tokens after it scored one at a
time, 32 tokens generated for the speed. Every row is `spectralkv generate --model demo --raw --prompt-file PREFIX
--score-file NEXT --max-tokens 32 --ignore-eos --json` with the options that the row names; extra arguments are passed on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from spectral_kv_core.demo import demo_model_path
from spectral_kv_core.evaluation_text import detokenize

ROWS = (
    ("spectral", "4"),
    ("spectral", "3"),
    ("spectral", "2"),
    ("affine", "4.5"),
    ("affine", "2.5"),
)
DOCUMENTS, PREFIX, SCORED = 2, 1024, 128


def main(source: str, target: str, extra: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    articles = [detokenize(a) for a in re.split(r"\n (?== [^=])", Path(source).read_text()) if len(a) > 9000]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for d in range(DOCUMENTS):
            ids = tokenizer.encode(articles[d * (len(articles) // DOCUMENTS)]).ids[: PREFIX + SCORED]
            prefix, after = Path(folder) / "prefix.txt", Path(folder) / "after.txt"
            prefix.write_text(tokenizer.decode(ids[:PREFIX], skip_special_tokens=False))
            after.write_text(tokenizer.decode(ids[PREFIX:], skip_special_tokens=False))
            for method, bits in ROWS:
                command = [
                    "generate",
                    "--model",
                    "demo",
                    "--raw",
                    "--prompt-file",
                    str(prefix),
                    "--score-file",
                    str(after),
                ]
                command += ["--method", method, "--bits", bits, "--max-tokens", "32", "--ignore-eos", "--json", *extra]
                out = subprocess.run(["spectralkv", *command], capture_output=True, text=True, check=True).stdout
                row = {"document": d, "method": method, "bits": float(bits), **json.loads(out)}
                assert (row["prompt_tokens"], row["scored_tokens"]) == (PREFIX, SCORED), row
                row.pop("text"), row["dense"].pop("text")
                rows.append(row)
                Path(target).write_text(json.dumps(rows, indent=1) + "\n")
                print(d, method, bits, f"KL {row['kl']:.4f} top-1 {row['top1']:.3f}", file=sys.stderr, flush=True)
    print("| method | sealed bits | cache bytes | times smaller | KL | worst KL | top-1 | decode speed |")
    print("|---|---|---|---|---|---|---|---|")
    for method, bits in ROWS:
        mine = [r for r in rows if (r["method"], r["bits"]) == (method, float(bits))]

        def mean(key, mine=mine):
            return sum(r[key] for r in mine) / len(mine)

        speed = sum(r["decode_tokens_per_s"] / r["dense"]["decode_tokens_per_s"] for r in mine) / len(mine)
        print(
            f"| `{method}` | {bits} | {mean('cache_bytes'):,.0f} | {mean('compression'):.2f} | {mean('kl'):.4f} | "
            f"{max(r['kl'] for r in mine):.4f} | {mean('top1'):.1%} | {speed:.2f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

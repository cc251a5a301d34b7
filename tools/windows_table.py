"""Bytes and KL of caches whose sliding windows are the host's own, and of others whose windows are codes.

    python tools/windows_table.py MODEL PROFILE TEXT --output FILE

MODEL: a folder. PROFILE: of its full-attention layers; that of its windows is found, or made. TEXT: what to read, such as
the test split of WikiText-2. Each document is one prefix in one call, then 64 real tokens, one per call; their KL is taken
against the host's own cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from spectral_kv_core.arrays.divergence import compare_logits
from spectral_kv_core.benchmark.provenance import provenance
from spectral_kv_core.calibration.text import text_digest
from spectral_kv_core.files.replacing import write_whole
from spectral_kv_core.profile.profile import Profile
from spectral_kv_torch import cache_nbytes, generation, load_model, make_prompt_cache

BITS, SCORED = (2.0, 3.0, 4.0, 6.0), 64


def main() -> None:
    """Measure, and write what was found to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("profile")
    parser.add_argument("text")
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="of the weights and of exact tokens")
    parser.add_argument("--output", metavar="FILE", required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.dtype)
    profile = Profile.load(args.profile)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    stride = len(ids) // args.documents
    if stride < args.prefix + SCORED:
        raise SystemExit(
            f"Expected {args.prefix + SCORED:,} tokens for each of {args.documents} documents, found fewer."
        )
    rows: dict[tuple, list] = {}
    for number in range(args.documents):
        document = ids[number * stride :][: args.prefix + SCORED]
        prompt, labels = document[: args.prefix], document[args.prefix :]
        plain = generation.plain_cache(model)
        expected = score(model, prompt, labels, plain)
        for bits in BITS:
            for windows in (None, "spectral"):
                cache = make_prompt_cache(model, profile, bits, windows=windows)
                kl = compare_logits(expected, score(model, prompt, labels, cache), labels)["kl"]
                rows.setdefault((bits, windows), []).append((int(cache_nbytes(cache)), kl))
                print(bits, windows, rows[bits, windows][-1], file=sys.stderr)
    found = [
        {"method": "spectral", "bits": bits, "windows": windows, "cache_bytes": int(of[0]), "kl": float(of[1])}
        for (bits, windows), each in rows.items()
        for of in [np.mean(each, axis=0)]
    ]
    settings = {"prefix": args.prefix, "scored": SCORED, "documents": args.documents, "dtype": args.dtype}
    where = provenance(
        generation,
        threads=torch.get_num_threads(),
        weights=generation.weights_digest(model),
        texts={Path(args.text).name: text_digest([text])},
    )
    result = {"settings": settings, "model": Path(args.model).name, "rows": found, "provenance": where}
    write_whole(args.output, (json.dumps(result, indent=1) + "\n").encode())


def score(model, prompt: list[int], labels: list[int], cache) -> np.ndarray:
    """Logits [len(labels), vocabulary] of every one of `labels`, after `prompt` in one call."""
    logits = [generation.feed(model, prompt, cache)]
    return np.concatenate(logits + [generation.feed(model, [label], cache) for label in labels[:-1]])


if __name__ == "__main__":
    main()

"""What texts that a profile does not know cost, at equal bytes: python tools/outlier_table.py --model DIR --output FILE

Every text is read in one call. Then tokens are fed one at a time, to the plain cache and to others that hold the same
prompt. Beside `spectral` stand `affine` on the same text, and `spectral` on prose, both with no fewer bytes in all.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
from outlier_texts import openings, texts

from spectral_kv_core.arrays.divergence import compare_logits
from spectral_kv_core.benchmark.provenance import provenance
from spectral_kv_core.benchmark.stored_bytes import Stored
from spectral_kv_core.codecs.registry import family_of, make_plan
from spectral_kv_core.evaluation.text import Text, read_text, split_articles
from spectral_kv_core.files.replacing import write_whole
from spectral_kv_core.hosts.backends import load_backend
from spectral_kv_core.hosts.demo_model import demo_model_path
from spectral_kv_core.planning.budget import SEAL, SINKS, WINDOW
from spectral_kv_core.planning.methods import get_method
from spectral_kv_core.profile.profile import Profile

PREFIX, SCORED = 600, 32  # tokens
BITS = (3.0, 8.0)
PROSE_BITS = (3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)  # that prose is tried at
RUN = 536  # tokens that a run has at most: some prose follows in the prefix
DOCUMENTS = 4  # of prose


class Prompt:
    """Tokens of one text with what the plain cache says of those that follow the prefix."""

    def __init__(self, run: Run, name: str, tokens: list[int]):
        self.run, self.name = run, name
        self.prefix, self.labels = tokens[:PREFIX], tokens[PREFIX : PREFIX + SCORED]
        if len(self.labels) < SCORED:
            raise SystemExit(f"Expected {PREFIX + SCORED} tokens of {name}, received {len(tokens)}.")
        self._sizes: dict[tuple[str, float], int] = {}
        backend, model = run.backend, run.model
        self.plain = backend.plain_cache(model)
        self.after = backend.feed(model, self.prefix, self.plain)

    @cached_property
    def reference(self) -> np.ndarray:
        """Logits [SCORED, V] of the plain cache."""
        copied = self.run.backend.plain_cache(self.run.model)
        self.run.backend.fill(copied, self.plain)
        return self._logits(copied)

    def _logits(self, cache) -> np.ndarray:
        steps = [self.run.backend.feed(self.run.model, [token], cache) for token in self.labels[:-1]]
        return np.concatenate([self.after, *steps])

    def filled(self, method: str, bits: float):
        """A cache with the prefix."""
        backend, model = self.run.backend, self.run.model
        profile = self.run.profile if get_method(method).basis_set else None
        cache = backend.make_prompt_cache(model, profile, bits, method=method)
        backend.fill(cache, self.plain)
        return cache

    def nbytes(self, method: str, bits: float) -> int:
        """Bytes of the prefix."""
        if (method, bits) not in self._sizes:
            self._sizes[method, bits] = int(self.run.backend.cache_nbytes(self.filled(method, bits)))
        return self._sizes[method, bits]

    def measured(self, method: str, bits: float) -> dict:
        """A record: bytes of the prefix, and the divergence over the tokens that follow."""
        cache = self.filled(method, bits)
        size = self.run.backend.cache_nbytes(cache)
        record = {
            "task": "outliers", "text": self.name, "method": method, "bits": bits, "prefix": PREFIX,
            "scored_tokens": SCORED, "cache_bytes": int(size), "bytes_by_kind": size.by_kind,
            "exact_tokens": size.exact_tokens, "dense_bytes": size.dense_nbytes, "compression": size.compression,
            "bits_per_element": size.bits_per_element,
        }  # fmt: skip
        record |= compare_logits(self.reference, self._logits(cache), self.labels)
        print(f"{self.name}, {method} at {bits:g} bits: KL {record['kl']:.4f}, {int(size):,} bytes", file=sys.stderr)
        return record


class Run:
    """A model with its prompts."""

    def __init__(self, model: str, profile: str | None, dtype: str):
        self.name, self.backend = load_backend("torch")
        self.model, self.tokenizer = self.backend.load_model(model, dtype)
        self.shape = self.backend.model_shape(self.model)[0]
        self.profile = Profile.load(profile) if profile else self.backend.SpectralProfiler().profile_for(
            self.model, get_method("spectral")
        )[2]  # fmt: skip
        self.plans: dict[str, str] = {}
        self._prose: dict[float, dict] = {}

    def prompts(self, wiki: Text) -> tuple[list[Prompt], dict[str, list[int]]]:
        """Documents of prose, and the tokens of the other texts."""
        encode = self.tokenizer.encode
        articles = [a for a in split_articles(wiki.text) if len(a) > 8 * (PREFIX + SCORED)]
        chosen = [articles[i] for i in np.linspace(0, len(articles) - 1, DOCUMENTS + 1).astype(int)]
        prose = [Prompt(self, "prose", encode(article)) for article in chosen[:-1]]
        start, after = encode(""), encode(chosen[-1], add_special_tokens=False)
        others = {
            name: [*start, *(encode(opening, add_special_tokens=False) * times)[:RUN], *after]
            for name, (opening, times) in openings().items()
        }
        return prose, others | {name: encode(text) for name, text in texts().items()}

    def prose_at(self, prose: list[Prompt], least: int) -> dict:
        """`spectral` on prose with at least so many bytes in every document, the mean; at most bits that there are."""
        for bits in PROSE_BITS:
            if bits < PROSE_BITS[-1] and self._expected(prose, "spectral", bits) < least:
                continue
            if bits not in self._prose:
                self._prose[bits] = self._mean([prompt.measured("spectral", bits) for prompt in prose])
            if self._prose[bits]["least_bytes"] >= least:
                break
        return self._prose[bits]

    def affine_at(self, prompt: Prompt, least: int) -> dict:
        """`affine` on the same text with at least so many bytes, or the most that it has."""
        for bits in self.affine_bits:
            if bits < self.affine_bits[-1] and self._expected([prompt], "affine", bits) < least:
                continue
            record = prompt.measured("affine", bits)
            if record["cache_bytes"] >= least:
                break
        return record

    def _expected(self, prompts: list[Prompt], method: str, bits: float) -> int:
        """Bytes that the smallest of `prompts` takes if its codes are plain."""
        first = PROSE_BITS[0] if method == "spectral" else self.affine_bits[0]
        beside = min(prompt.nbytes(method, first) for prompt in prompts) - self.plain_codes(method, first)
        return beside + self.plain_codes(method, bits)

    @cached_property
    def affine_bits(self) -> list[float]:
        """The bits that `affine` has for this model, ascending."""
        return sorted(family_of(get_method("affine")).bits_options(self.shape, get_method("affine")))

    def plain_codes(self, method: str, bits: float) -> int:
        """Bytes of the codes of `PREFIX` tokens of which nothing is out of the ordinary."""
        recipe = get_method(method)
        plan = make_plan(self.shape, self.profile if recipe.basis_set else None, recipe, bits)
        self.plans[f"{method} at {bits:g} bits"] = plan.hash
        sealed = (PREFIX - SINKS - WINDOW) // SEAL * SEAL
        return Stored(plan, lambda plan: (0, 0)).nbytes(sealed)

    @staticmethod
    def _mean(found: list[dict]) -> dict:
        keys = ("kl", "kl_p95", "top1", "cache_bytes", "exact_tokens", "compression", "bits_per_element")
        means = {key: float(np.mean([record[key] for record in found])) for key in keys}
        least = min(record["cache_bytes"] for record in found)
        codes = float(np.mean([record["bytes_by_kind"]["codes"] for record in found]))
        return found[0] | means | {"documents": len(found), "least_bytes": least, "codes": codes}


def measure(run: Run, wiki: Text) -> list[dict]:
    """A record of every text and bits, with those that stand beside it under `beside`."""
    prose, others = run.prompts(wiki)
    records = []
    for bits in BITS:
        record = run.prose_at(prose, 0 if bits == BITS[0] else 1 << 60)
        extra = record["codes"] / run.plain_codes("spectral", bits) - 1
        records.append(record | {"extra_codes": extra})
    for name, tokens in others.items():
        prompt = Prompt(run, name, tokens)
        for bits in BITS:
            ours = prompt.measured("spectral", bits)
            beside = {
                "prose": run.prose_at(prose, ours["cache_bytes"]),
                "affine": run.affine_at(prompt, ours["cache_bytes"]),
            }
            kept = ("method", "bits", "kl", "top1", "cache_bytes")
            records.append(ours | {"beside": {key: {k: x[k] for k in kept} for key, x in beside.items()}})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory, a hub id, or demo")
    parser.add_argument("--name", help="what the model is called in the table (default: its folder)")
    parser.add_argument("--profile", help="profile file (default: the one that is found, or made)")
    parser.add_argument("--text", required=True, metavar="FILE", help="the test text of WikiText-2")
    parser.add_argument("--dtype", default="float32", help="of the weights (default %(default)s)")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON to write")
    args = parser.parse_args()
    model = str(demo_model_path()) if args.model == "demo" else args.model
    wiki = read_text("wiki", Path(args.text).read_text(encoding="utf-8"))
    run = Run(model, args.profile, args.dtype)
    rows = measure(run, wiki)
    weights = run.backend.weights_digest(run.model)
    threads = load_backend("torch", "bench")[1].threads()
    origin = provenance(run.backend, threads=threads, weights=weights, plans=run.plans, texts={wiki.name: wiki.digest})
    result = {
        "model": args.name or Path(model).name,
        "backend": run.name,
        "dtype": args.dtype,
        "weights": weights,
        "rows": rows,
        "settings": {
            "prefix": PREFIX,
            "scored": SCORED,
            "step": 1,
            "documents": DOCUMENTS,
            "window": WINDOW,
            "sinks": SINKS,
        },
        "provenance": origin,
    }
    write_whole(Path(args.output), f"{json.dumps(result, indent=1)}\n".encode())


if __name__ == "__main__":
    main()

"""How far the predictions with a compressed cache are from those with the plain one."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[..., V] float64, stable."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(reference: np.ndarray, test: np.ndarray) -> float:
    """KL(reference || test) in nats per token of log probabilities [T, V] float32, however small: no term is negative."""
    difference = test - reference
    terms = np.exp(reference) * (np.expm1(difference) - difference)
    return float(terms.sum(-1, dtype=np.float64).mean())


def compare_logits(reference: np.ndarray, test: np.ndarray, labels: list[int]) -> dict[str, float]:
    """KL(reference || test) in nats per token, agreement of the likeliest tokens and perplexities over `labels`.

    `reference`, `test` [T, V] logits for the T tokens `labels`. `top5` is the share of the reference's 5 likeliest
    tokens that are among the test's 5; `nd_ppl` is PPL(test) / PPL(reference) - 1. Raises UsageError on NaN: a broken
    cache must not pass as a number.
    """
    if not (np.isfinite(reference).all() and np.isfinite(test).all()):
        raise UsageError("Expected finite logits, received NaN or infinity: check the weights and the dtype.")
    p, q = log_softmax(reference), log_softmax(test)
    kl = (np.exp(p) * (p - q)).sum(-1)
    rows = np.arange(len(labels))
    ppl_ref, ppl = np.exp(-p[rows, labels].mean()), np.exp(-q[rows, labels].mean())
    return {
        "kl": float(max(kl.mean(), 0.0)),
        "kl_p95": float(max(np.quantile(kl, 0.95), 0.0)),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "top5": _top_overlap(p, q, min(5, p.shape[-1])),
        "ppl": float(ppl),
        "ppl_ref": float(ppl_ref),
        "nd_ppl": float(ppl / ppl_ref - 1),
    }


def compare_tokens(reference: list[int], tokens: list[int]) -> dict[str, float]:
    """`first_divergence`: index of the first of `tokens` that is not the reference's, how many there are if all are; and
    `token_match`, the share of those that are the same."""
    same = np.array(reference) == np.array(tokens)
    return {
        "first_divergence": len(reference) if same.all() else int(same.argmin()),
        "token_match": float(same.mean()),
    }


def _top_overlap(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """Mean share of the `count` largest entries of rows of `p` [T, V] that are among those of `q`."""
    first, second = (np.argpartition(-x, count - 1, axis=-1)[:, :count] for x in (p, q))
    return float((first[:, :, None] == second[:, None, :]).any(-1).mean())

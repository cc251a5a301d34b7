"""Rounding at encode time that spends a block's quantization error on the tokens that will be attended least.

The decoder does not change: only which code a coefficient gets. docs/decisions/rate-distortion-2.md, section 2.2.
"""

from __future__ import annotations

import numpy as np

from ..arrays.rope import Rope, pair_indices, rotate
from ..scorers import Tokens, get_scorer
from ..scorers.terms import zscore

FUTURE = (16, 64, 256, 1024)  # tokens between a key and the queries that are expected to look at it
CLIP = 20.0  # a token weighs at most so many times the mean of its block, and at least one over that


def future_queries(mean: np.ndarray, root: np.ndarray, rope: Rope | None) -> tuple[np.ndarray, np.ndarray]:
    """What scores expected attention on pre-RoPE keys k: linear [H, D, M] and quadratic [H, D, D].

    Queries with mean q and covariance C that come d tokens later look at a key with weight exp(q'k + k'Ck / 2), q and C
    turned by d tokens (the mean of a log-normal; Devoto et al. 2025, Expected Attention). `mean` [Hq, D] and `root`
    [H, D, D] as in `QueryStatistics`. The linear part has a column for every query head of the KV head and every
    distance of `FUTURE`; the quadratic part F, k'Ck / 2 = |k'F|^2, is the mean over the distances.
    """
    heads, dim = root.shape[:2]
    mean, root = np.asarray(mean, np.float64), np.asarray(root, np.float64)
    covariance = root @ root
    by_distance, quadratic = [], np.zeros_like(covariance)
    for distance in FUTURE if rope else (0,):
        turn = turn_matrix(rope, distance, dim)  # q' R(-d) k = (R(d) q)' k
        by_distance.append(mean.reshape(heads, -1, dim) @ turn.T)
        quadratic += turn @ covariance @ turn.T / (len(FUTURE) if rope else 1)
    value, vectors = np.linalg.eigh(quadratic)
    factor = vectors * np.sqrt(np.maximum(value, 0))[:, None, :] / np.sqrt(2)
    linear = np.swapaxes(np.concatenate(by_distance, axis=1), -1, -2)
    return linear.astype(np.float32), factor.astype(np.float32)


def turn_matrix(rope: Rope | None, tokens: int, dim: int) -> np.ndarray:
    """Matrix [D, D] that RoPE applies between two positions `tokens` apart."""
    matrix = np.eye(dim)
    if rope is None or not tokens:
        return matrix
    first, second = pair_indices(rope)
    cos, sin = np.cos(tokens * np.array(rope.inv_freq)), np.sin(tokens * np.array(rope.inv_freq))
    matrix[first, first] = matrix[second, second] = cos
    matrix[first, second], matrix[second, first] = -sin, sin
    return matrix


class BlockScores:
    """What a scorer says of every block of `block` tokens alone, as if it stood at the beginning of a text."""

    def __init__(self, xp, plan, layer_group: int, scorer: str, block: int):
        self.xp, self.block, self.rope = xp, block, plan.rope(layer_group)
        self.scorer, self.statistics = get_scorer(scorer), plan.query_statistics(layer_group)

    def __call__(self, keys, values):
        """Scores [B, H, T], higher matters more, of pre-RoPE `keys` and `values` [B, H, T, D] float32."""
        xp, (batch, heads, tokens, dim) = self.xp, keys.shape

        def blocks(x):
            x = xp.permute_dims(x.reshape(batch, heads, -1, self.block, dim), (0, 2, 1, 3, 4))
            return x.reshape(-1, heads, self.block, dim)

        keys = blocks(keys) if self.rope is None else rotate(xp, blocks(keys), self.rope, 0)
        scores = self.scorer(Tokens(xp, keys, blocks(values), rope=self.rope, **self.statistics))
        scores = xp.permute_dims(scores.reshape(batch, -1, heads, self.block), (0, 2, 1, 3))
        return scores.reshape(batch, heads, tokens)


class TokenWeights:
    """How much each token matters, relative to the others of its block; a function of the block alone, so that no order
    of arrival changes a code.

    By `expected-attention` with the queries of a layer group (`expected_weights`), or exp(z) of what any other scorer
    says (`BlockScores`), z normalized over the block.
    """

    def __init__(self, xp, plan, layer_group: int, table):
        """`table` makes an array that all sequences share."""
        self.xp, self.block = xp, plan.basis_set.block
        self.scores: BlockScores | None = None
        self.tables: tuple = ()
        if plan.method.rounding == "expected-attention":
            statistics = plan.query_statistics(layer_group)
            mean, root = statistics["query_mean"], statistics["query_root"]
            self.tables = tuple(map(table, future_queries(mean, root, plan.rope(layer_group))))
        else:
            self.scores = BlockScores(xp, plan, layer_group, plan.method.rounding, self.block)

    def __call__(self, keys, values):
        """Weights [B, H, T], mean 1 in every block, of pre-RoPE `keys` and `values` [B, H, T, D] float32."""
        if self.scores is None:
            linear, quadratic = self.tables
            return expected_weights(self.xp, keys, values, linear, quadratic, self.block)
        xp, shape = self.xp, keys.shape[:3]
        scores = self.scores(keys, values).reshape(*shape[:2], -1, self.block)
        return _normalized(xp, xp.exp(zscore(xp, scores))).reshape(*shape)


def expected_weights(xp, keys, values, linear, quadratic, block: int):
    """How much each token will be attended, relative to the others of its block: [B, H, T], mean 1 in every block.

    `keys` pre-RoPE and `values` [B, H, T, D] float32; `linear` [H, D, M], `quadratic` [H, D, D] of `future_queries`.
    Expected attention times the norm of the value.
    """
    scores = xp.matmul(keys, linear) + xp.sum(xp.square(xp.matmul(keys, quadratic)), axis=-1, keepdims=True)
    batch, heads, tokens, queries = scores.shape
    scores = scores.reshape(batch, heads, tokens // block, block, queries)
    weights = xp.exp(scores - xp.max(scores, axis=3, keepdims=True))
    weights = xp.mean(weights / xp.sum(weights, axis=3, keepdims=True), axis=-1)
    norm = xp.sqrt(xp.sum(xp.square(values), axis=-1)).reshape(*weights.shape)
    return _normalized(xp, weights * (norm + 1e-30)).reshape(batch, heads, tokens)


def _normalized(xp, weights):
    """`weights` [..., block] over their mean, clipped, with mean 1."""
    weights = xp.clip(weights / xp.mean(weights, axis=-1, keepdims=True), 1 / CLIP, CLIP)
    return weights / xp.mean(weights, axis=-1, keepdims=True)


def round_in_time(xp, z, weights, gain, matrix, tables):
    """Codes uint8 [B, G, n, F, R] that minimize the weighted error of every block, summed over its tokens.

    `z` [B, G, n, F, R]: coefficients in standard deviations; `weights` [B, G, n, F] of a block's tokens; `gain`
    [G, 1, F, R]: root of what losing the whole coefficient costs; `matrix` [F, F]: the time transform; `tables`: the
    quantizers, `CoefficientTables` of [G, 1, F, R]. For every component the error e and its gains r cost
    (r e)' F diag(w) F' (r e); one round of coordinate descent over the frequencies from plain rounding lowers that, and
    more rounds did not lower the divergence of a model's predictions any further.
    """
    if xp.kernels and (codes := xp.kernels.round_in_time(z, weights, gain, matrix, tables)) is not None:
        return codes
    return descend(xp, z, weights, gain, matrix, tables)


def descend(xp, z, weights, gain, matrix, tables):
    """`round_in_time` by the operations of `xp`."""
    metric = xp.matmul(matrix * weights[..., None, :], xp.permute_dims(matrix, (1, 0)))  # [B, G, n, F, F]
    codes = tables.quantize(z)
    error = (z - tables.dequantize(codes)) * gain
    for f in range(z.shape[3]):
        others = xp.matmul(metric[..., f : f + 1, :] / metric[..., f : f + 1, f : f + 1], error)[..., 0, :]
        target = z[..., f, :] + (others - error[..., f, :]) / gain[..., f, :]
        codes[..., f, :] = tables.quantize(target, f)
        error[..., f, :] = (z[..., f, :] - tables.dequantize(codes[..., f, :], f)) * gain[..., f, :]
    return codes

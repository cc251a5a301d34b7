"""Awkward sizes, and toy models of those sizes whose keys and values have a planted low rank."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from spectral_kv_core.arrays import ops
from spectral_kv_core.arrays.rope import Rope, rotate
from spectral_kv_core.calibration.basis_fit import fit_basis_set
from spectral_kv_core.calibration.model_basis import fit_joint_set
from spectral_kv_core.calibration.moments import QueryMoments
from spectral_kv_core.calibration.spool import Spool
from spectral_kv_core.codecs.registry import make_plan
from spectral_kv_core.planning.methods import Method
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.model_shape import ModelShape
from spectral_kv_core.profile.profile import Profile, QueryStatistics
from spectral_kv_core.quantization import trellis
from spectral_kv_core.quantization.packing import unpack_rows
from spectral_kv_core.quantization.quantizer import BIT_WIDTHS


@dataclass(frozen=True)
class ToyModel:
    """Sizes of a model and the statistics of its vectors: `planted` strong directions per head, slow in time.

    rotated: keys are low-rank before the rotation, as in a real model, else after it.
    """

    head_dim: int = 64
    kv_heads: int = 2
    q_heads: int = 4
    layers: int = 2
    rotated: bool = False
    planted: int = 12

    @property
    def rope(self) -> Rope:
        return Rope(tuple(10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)))

    @property
    def shape(self) -> ModelShape:
        hidden = self.q_heads * self.head_dim
        indices = tuple(range(self.layers))
        return ModelShape(self.layers, hidden, self.q_heads, self.kv_heads, self.head_dim, indices, self.rope)

    def sample(self, seed: int, tokens: int, batch: int = 1, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [B, H, T, D] float32 of `tokens` tokens from position 0."""
        keys, values = _sample(self, seed, tokens, batch, layer)
        return keys.copy(), values.copy()

    def queries(self, seed: int, tokens: int, batch: int = 1) -> np.ndarray:
        """Queries [B, Hq, T, D] float32."""
        rng = np.random.default_rng(2000 + seed)
        return rng.standard_normal((batch, self.q_heads, tokens, self.head_dim)).astype(np.float32)


@cache
def _sample(model: ToyModel, seed: int, tokens: int, batch: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1000 + seed)
    latent = rng.standard_normal((tokens, batch, 2 * model.kv_heads, model.head_dim))
    for t in range(1, tokens):
        latent[t] = 0.8 * latent[t - 1] + 0.6 * latent[t]
    scale = np.where(np.arange(model.head_dim) < model.planted, 1.0, 0.03) * 0.98 ** np.arange(model.head_dim)
    axes, mean = _planted(model, layer)
    x = np.moveaxis(latent * scale, 0, 2) @ np.swapaxes(axes, -1, -2) + mean
    keys, values = x[:, : model.kv_heads].astype(np.float32), x[:, model.kv_heads :].astype(np.float32)
    return (rotate(ops, keys, model.rope, 0) if model.rotated else keys), values


@cache
def _planted(model: ToyModel, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions [2H, D, D] with orthonormal columns and means [2H, 1, D] of a layer."""
    rng = np.random.default_rng(3000 + layer)
    axes, _ = np.linalg.qr(rng.standard_normal((2 * model.kv_heads, model.head_dim, model.head_dim)))
    return axes, 0.3 * rng.standard_normal((2 * model.kv_heads, 1, model.head_dim))


@cache
def toy_profile_of(model: ToyModel, group: str = "head", rope: str = "post") -> Profile:
    """Profile of a toy model, saved and loaded once so that it has the precision of a file."""
    rng = np.random.default_rng(4000)
    heads = model.kv_heads
    matters = 1.0 + np.arange(2 * heads)[:, None, None]  # heads differ, which shared bases take into account
    with Spool() as spool, tempfile.TemporaryDirectory() as folder:
        for document in range(3):
            for layer in range(model.layers):
                keys, values = model.sample(500 + document, 500, layer=layer)
                gradients = rng.standard_normal((2, 2 * heads, 500, model.head_dim)) * matters
                spool.add(layer, document, keys[0], values[0], gradients[:, :heads], gradients[:, heads:])
        if group == "model":
            basis_set = fit_joint_set(spool, model.shape)
        else:
            basis_set = fit_basis_set(spool, model.shape, group, rope)
        calibration = {"text": "toy", "tokens": 1500, "target_energy": 0.95}
        moments = [QueryMoments(heads, model.rope) for _ in range(model.layers)]
        for layer, moment in enumerate(moments):
            moment.update((model.queries(layer, 500)[0] + 1) * model.head_dim**-0.5)
        queries = QueryStatistics(*map(np.stack, zip(*(m.result() for m in moments))))
        profile = Profile(model.shape, "toy", calibration, {basis_set.name: basis_set}, queries)
        return Profile.load(profile.save(Path(folder) / "toy.safetensors"))


@dataclass(frozen=True)
class Case:
    """One row of the table: `tokens` in the cache of a toy model."""

    tokens: int
    head_dim: int
    kv_heads: int
    q_heads: int
    batch: int = 1

    @property
    def id(self) -> str:
        return f"T{self.tokens}-D{self.head_dim}-H{self.kv_heads}of{self.q_heads}-B{self.batch}"

    @property
    def model(self) -> ToyModel:
        return ToyModel(self.head_dim, self.kv_heads, self.q_heads, layers=1)


CASES = [
    Case(1, 64, 1, 1),
    Case(16, 80, 2, 4),
    Case(63, 64, 2, 2, batch=2),
    Case(257, 128, 1, 3),
    Case(257, 80, 2, 6, batch=3),
    Case(1500, 64, 2, 4),
    Case(1500, 80, 1, 2),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def codes_of(codec, chunk) -> np.ndarray:
    """Codes [B, rows, n] of a chunk of the spectral codec, all widths below each other."""
    xp, n = codec.xp, chunk.tokens // codec.block
    pairs = zip(chunk.arrays[0::2], chunk.arrays[1::2])
    parts = [xp.to_numpy(unpack_rows(xp, pair, bits, n)) for pair, bits in zip(pairs, codec.bits)]
    return np.concatenate(parts, axis=1) if parts else np.zeros((chunk.batch, 0, n), np.uint8)


@cache
def plan_of(
    model: ToyModel,
    bits: float,
    group: str = "head",
    rope: str = "post",
    rounding: str = "nearest",
    quantizer: str = "scalar",
) -> Plan:
    """Plan of a toy model for the spectral codec."""
    recipe = {"rope": rope, "group": group, "time": "dct", "block": 16, "quantizer": quantizer, "rounding": rounding}
    method = Method("test", "spectral", "", "", **recipe)
    return make_plan(model.shape, toy_profile_of(model, group, rope), method, bits)


def decoded_paths(rows: trellis.Coefficients, levels: dict[int, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Levels of codes [B, G, n, F, R], step by step along every path: the definition, without `trellis.Paths`."""
    _, frequencies, rank = rows.shape
    bits = np.array(BIT_WIDTHS)[rows.slots]
    found = np.zeros(codes.shape, np.float32)
    for f in range(frequencies):
        window = np.zeros((codes.shape[0], codes.shape[2]), int)
        for number in rows.order[f]:
            g, r = divmod(int(number), rank)
            code = codes[:, g, :, f, r].astype(int)
            if bits[g, f, r] in trellis.WIDTHS:
                window = (window << 1 | code & 1) % (2 * trellis.STATES)
                code = code >> 1 << 2 | trellis.label(window)
            if bits[g, f, r]:
                found[:, g, :, f, r] = levels[bits[g, f, r]][code]
    return found


def attention(queries, keys, values, scale: float) -> np.ndarray:
    """Causal softmax attention in float64 for L queries at the end of `keys`; grouped queries."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    group, length, tokens = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    scores = queries @ np.swapaxes(np.repeat(keys, group, 1), -1, -2) * scale
    future = np.arange(tokens) > np.arange(tokens - length, tokens)[:, None]
    weights = np.exp(np.where(future, -np.inf, scores) - scores.max(-1, keepdims=True))
    return weights @ np.repeat(values, group, 1) / weights.sum(-1, keepdims=True)

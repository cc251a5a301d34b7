"""Calibration of a model, whatever the host: text -> captured vectors and gradients -> profile."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from ..arrays import ops
from ..arrays.widths import widened
from ..errors import UsageError, first_line
from ..hosts.demo_model import demo_model_path
from ..hosts.protocol import Captures, Models
from ..planning.budget import whole_number
from ..planning.methods import BASIS_SETS, Method
from ..profile.basis_set import PAIRS, WHOLE_MODEL, BasisSet
from ..profile.model_shape import ModelShape
from ..profile.profile import Profile, QueryStatistics
from ..profile.store import auto_profile, find_profile, name_passed_layers, warn_if_other_weights, warn_once
from .basis_fit import fit_basis_set, thin_below
from .layer_probing import DOCUMENTS, PROBED, LogProbabilities, probed
from .local_gradients import local_gradients
from .model_basis import fit_joint_set
from .moments import QueryMoments
from .spool import Spool
from .text import TEXT_NAME, check_texts, load_default_texts, split_documents, text_digest

log = logging.getLogger("spectralkv")

MAX_POSITIONS = 32768
AS_IT_IS = "Use the model as it is."
SCORED_SHARE = 16  # the last sixteenth of a document is scored: its gradients reach the tokens before it


def check_calibration(target_energy: float, tokens: int, document: int, positions: int | None) -> None:
    """Raise UsageError for options of `ProfilerBase` that are out of range."""
    if not 0 < target_energy <= 1:
        raise UsageError(f"Expected target_energy in (0, 1], received {target_energy}.")
    for name, value in (("tokens", tokens), ("document", document)):
        if value < 64:
            raise UsageError(f"Expected `{name}` of at least 64 tokens, received {value}.")
    if positions is not None:
        whole_number("positions", positions, 1)


class ProfilerBase:
    """Makes the profile of a model from one pass over calibration text; a backend adds its modules.

    The source of the costs, and what they leave out, is docs/decisions/rate-distortion.md.

    Args:
        target_energy: Share of the variance, in (0, 1], that `SpectralProfile.summary` reports ranks at.
        tokens: Calibration tokens in all, 64 or more.
        document: Tokens of one document, 64 or more: it bounds the memory that is needed.
        samples: Label samples per document.
        seed: Seed of the labels.
        positions: Context length in tokens that post-RoPE keys are prepared for. Default: the model's own, at most 32,768.
        gradients: False takes the gradients of every layer's own attention output instead of those of the scored tokens'
            probability. That needs no backward pass and a fraction of the memory, at a price in quality
            (results/experiments.md).
        probes: False keeps the costs of layers as gradients have them. True measures what coding each layer alone does.
        basis_sets: Which ways of grouping vectors the profile covers, as `group.rope`. Default: those of all methods but
            the `-pairs` methods and `kvtc`.
        progress: Whether to show progress bars.
        pairs: Whether to add the basis set of the `-pairs` methods.
        joint: Whether to add the basis set of `kvtc`.
        windows: Whether to profile the layers with a sliding window, and no others: for `windows="spectral"`.

    Raises:
        UsageError: An argument is out of range. `profile_from_model` raises it for a model without layers to compress, for
            text that is too short, and for activations that are not finite.

    Examples:
        >>> from spectral_kv_torch import SpectralProfiler, load_model  # spectral_kv_mlx has the same
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> model, tokenizer = load_model(demo_model_path())
        >>> text = "The sea is a place of endless wonder. " * 9  # a real profile takes the defaults, and no text
        >>> quick = SpectralProfiler(tokens=64, document=64, gradients=False, probes=False, basis_sets=("head.post",))
        >>> profile = quick.profile_from_model(model, tokenizer, texts=[text])
        >>> profile.calibration["documents"], sorted(profile.basis_sets)
        (1, ['head.post'])
    """

    models: Models
    captures: Captures
    xp: Any = None

    def __init__(
        self,
        target_energy: float = 0.95,
        tokens: int = 32768,
        document: int = 2048,
        samples: int = 2,
        seed: int = 0,
        positions: int | None = None,
        gradients: bool = True,
        probes: bool = True,
        basis_sets: tuple[str, ...] = BASIS_SETS,
        progress: bool = True,
        pairs: bool = False,
        joint: bool = False,
        windows: bool = False,
    ):
        check_calibration(target_energy, tokens, document, positions)
        self.target_energy, self.tokens, self.document = target_energy, tokens, document
        self.samples, self.seed, self.positions, self.progress = samples, seed, positions, progress
        self.gradients, self.probes, self.windows = gradients, probes, windows
        self.basis_sets = tuple(dict.fromkeys((*basis_sets, *[PAIRS] * pairs, *[WHOLE_MODEL] * joint)))
        for name in self.basis_sets:
            if name not in (known := (*BASIS_SETS, PAIRS, WHOLE_MODEL)):
                raise UsageError(f"Expected basis sets among {', '.join(known)}, received {name!r}.")

    def load(self, name: str, quantize: str | None = None):
        """Model and tokenizer of a directory or hub id; quantize: `4bit` or `8bit` weights."""
        return self.models.load_model(name, None, quantize)

    def describe(self, model) -> tuple[ModelShape, dict[int, str], str, str, int | None]:
        """Shape, passed-through layers with reasons, weights digest, name, and the context it was made for."""
        models = self.models
        shape, passed = self._shape(model)
        return shape, passed, models.weights_digest(model), models.model_name(model), models.max_context(model)

    def _shape(self, model) -> tuple[ModelShape, dict[int, str]]:
        """Sizes of the layers that are profiled, and the others with the reason."""
        return self.models.window_shape(model) if self.windows else self.models.model_shape(model)

    def activations(self, model, shape: ModelShape, tokens: list[int]) -> Iterator[tuple]:
        """Per compressible layer, float32 NumPy: queries [Hq, T, D] times the attention scale, keys, values [H, T, D]."""
        cache = self.captures.capture(model, tokens, shape.layers)
        for layer_idx in shape.layers:
            yield _wide(shape, *self._arrays(cache, layer_idx, shape))

    def probe(self, model, shape: ModelShape, tokens: list[int], scored: int) -> tuple[list, LogProbabilities]:
        """A document as `layer_probing.probed` takes it, whose last `scored` tokens are predicted."""
        captures, to_numpy = self.captures, self.xp.to_numpy
        outputs: dict[int, Any] = {}
        cache = captures.capture(model, tokens[:-scored], shape.layers)
        layers = [captures.captured(cache, layer_idx) for layer_idx in shape.layers]

        def log_p(changed: dict[int, tuple]) -> np.ndarray:
            by_index = {
                shape.layers[n]: tuple(x[..., :width] for x, width in zip(arrays, shape.side_widths))
                for n, arrays in changed.items()
            }
            return to_numpy(captures.probed_log_probabilities(model, cache, tokens[-scored:], by_index, outputs))

        return [_wide(shape, to_numpy(layer.keys), to_numpy(layer.values)) for layer in layers], log_p

    def vectors(self, model, shape: ModelShape, tokens: list[int], scored: int, seed: int) -> Iterator[tuple]:
        """Per compressible layer, as float32 NumPy arrays, of all but the last `scored` tokens:

        queries [Hq, T, D] times the attention scale, keys and values [H, T, D], and the gradients [S, H, T, D] of the
        scored tokens' log probability with respect to keys and values.
        """
        cache = self.captures.capture(model, tokens[:-scored], shape.layers)
        gradients = self.captures.score_gradients(model, cache, tokens[-scored:], self.samples, seed)
        for layer_idx in shape.layers:
            sides = [np.stack([self.xp.to_numpy(sample[layer_idx][side]) for sample in gradients]) for side in (0, 1)]
            yield _wide(shape, *self._arrays(cache, layer_idx, shape), *sides)

    def _arrays(self, cache, layer_idx: int, shape: ModelShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries times the attention scale, keys and values of a captured layer of batch 1.

        Queries that were not seen are zeros, for which all tokens are alike.
        """
        layer, to_numpy = self.captures.captured(cache, layer_idx), self.xp.to_numpy
        keys, values = to_numpy(layer.keys[0]), to_numpy(layer.values[0])
        if layer.queries is not None:
            return to_numpy(layer.queries[0]) * layer.scale, keys, values
        warn_once(
            "This model has attention code of its own, so its queries are not seen: the profile takes all tokens for alike.",
            str(shape),
        )
        return np.zeros((shape.q_heads, *keys.shape[1:]), np.float32), keys, values

    def profile_from_model(
        self, model, tokenizer=None, texts: list[str] | None = None, name: str = "", quantize: str | None = None
    ) -> Profile:
        """Calibrate `model` (an object, a directory, a hub id or demo) on `texts` (default: the packaged ones).

        quantize: weights that are loaded by name are first quantized, `4bit` or `8bit`. Raises UsageError for a model
        without compressible layers, or without any to pair where pairs are asked for, too little text, or NaN in
        activations.
        """
        if isinstance(model, (str, os.PathLike)):
            name, path = name or str(model), str(demo_model_path()) if model == "demo" else str(model)
            model, tokenizer = self.load(path, quantize)
        elif quantize is not None:
            raise UsageError(
                f"Expected quantize with the name of a model to load, received it with a {type(model).__name__}. "
                "Quantize the model first, or pass its directory or hub id."
            )
        shape, passed, digest, own_name, context = self.describe(model)
        if not shape.layers:
            what = "layers with a sliding window" if self.windows else "full-attention layers"
            raise UsageError(f"Expected {what}, received only: {', '.join(sorted(set(passed.values())))}. {AS_IT_IS}")
        for key in self.basis_sets:
            shape.layer_groups(key.split(".")[0])  # raises before anything long runs
        text_name = TEXT_NAME if texts is None else "own text"
        texts = load_default_texts() if texts is None else check_texts(texts)
        tokenizer = self._tokenizer_for(model, tokenizer)
        documents = split_documents(texts, tokenizer.encode, self.document, self.tokens)
        _warn_if_thin(sum(map(len, documents)), shape.head_dim)
        positions = self.positions or min(context or MAX_POSITIONS, MAX_POSITIONS)
        with Spool() as spool:
            queries, gradients = self._read_documents(model, shape, documents, spool)
            sets = self._fit_basis_sets(shape, spool, positions)
        probes = documents[:: -(-len(documents) // DOCUMENTS)] if self.probes and PROBED in sets else []
        calibration = {
            "text": text_name,
            "text_sha256": text_digest(texts),
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            **self._describe_calibration(),
            "gradients": "score" if gradients else "local",
            "positions": positions,
            "probed": len(probes),
        }
        profile = Profile(shape, name or own_name, calibration, sets, queries, digest)
        if probes:
            self._probe_layers(model, profile, probes)
        return profile

    def profile_for(
        self, model, method: Method, profile: Profile | None = None, tokenizer=None
    ) -> tuple[ModelShape, dict[int, str], Profile | None]:
        """Shape of `model`, layers that pass through, and what `method` reads: the profile given, found, or made now.

        Raises UsageError for a model without layers to compress.
        """
        shape, passed = self._shape(model)
        if not shape.layers:
            what = "layers with a sliding window" if self.windows else "full-attention layers"
            advice = "Leave `windows` out." if self.windows else AS_IT_IS
            raise UsageError(f"Expected {what} to compress, received only: {', '.join(set(passed.values()))}. {advice}")
        if profile is None and method.profile_set:
            if find_profile(shape, method.profile_set, self.windows) is None:
                shape.layer_groups(method.profile_set.split(".")[0])  # raises where no tokenizer would help
                tokenizer = self._tokenizer_for(model, tokenizer)  # raises before anything says that it begins
            profiler = copy.copy(self)
            profiler.basis_sets = tuple(dict.fromkeys((*self.basis_sets, method.profile_set)))
            made = partial(profiler.profile_from_model, model, tokenizer)
            profile = auto_profile(shape, method.profile_set, made, self.windows)
        if not self.windows:
            name_passed_layers(passed)
        if profile is not None and method.profile_set:
            profile.check(shape)
            warn_if_other_weights(profile, self.models.weights_digest(model))
        return shape, passed, profile

    def _tokenizer_for(self, model, tokenizer=None):
        """`tokenizer`, or the one that `model` came with; raises UsageError where nobody knows it."""
        tokenizer = self.models.load_tokenizer(model) if tokenizer is None else tokenizer
        if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
            received = "none" if tokenizer is None else f"a {type(tokenizer).__name__}"
            raise UsageError(
                f"Expected the tokenizer of {self.models.model_name(model)} to make a profile with, received {received}. Give "
                "tokenizer=, or a profile."
            )
        return tokenizer

    def _read_documents(self, model, shape: ModelShape, documents: list, spool: Spool) -> tuple[QueryStatistics, bool]:
        """`_read` with score gradients, where they are asked for and the host has them; returns whether it has."""
        try:
            return self._read(model, shape, documents, spool, self.gradients), self.gradients
        except (RuntimeError, ValueError) as error:
            if isinstance(error, UsageError) or not self.gradients:
                raise
            reason = first_line(error)[:200]
        queries = self._read(model, shape, documents, spool, False)  # raises where gradients are not what is wrong
        log.warning(
            "This model gives no gradients (%s): calibrated as with gradients=False, which costs quality.", reason
        )
        return queries, False

    def _read(self, model, shape: ModelShape, documents: list, spool: Spool, gradients: bool) -> QueryStatistics:
        """Put what every layer makes of `documents` on the `spool`; returns the statistics of the queries."""
        moments = [QueryMoments(shape.kv_heads, shape.rope_of(i), shape.rotary_pairs) for i in shape.layers]
        for d, tokens in enumerate(self._bar(documents, "Reading text")):
            seed = self.seed * len(documents) + d
            made = (self.vectors if gradients else self._local)(model, shape, tokens, _scored(tokens), seed)
            for layer, (queries, *captured) in enumerate(made):
                moments[layer].update(queries)
                spool.add(layer, d, *captured)
        return QueryStatistics(*map(np.stack, zip(*(m.result() for m in moments))))

    def _fit_basis_sets(self, shape: ModelShape, spool: Spool, positions: int) -> dict[str, BasisSet]:
        """All of `basis_sets` by name, post-RoPE keys for contexts of `positions` tokens."""
        spread, sets = max(positions - self.document, 0), {}  # a document starts there at the latest
        for key in self.basis_sets:
            progress = partial(self._bar, what=f"Fitting {key}")
            if key == WHOLE_MODEL:
                sets[key] = fit_joint_set(spool, shape, self.seed, progress)
                continue
            group, rope = key.split(".")
            sets[key] = fit_basis_set(spool, shape, group, rope, positions=spread, progress=progress)
        return sets

    def _probe_layers(self, model, profile: Profile, documents: list[list[int]]) -> None:
        """Set the costs of `profile` to what coding a layer alone does to `documents` (`layer_probing`)."""
        shape, bar = profile.shape, self._bar(documents, "Measuring layers")
        probed(shape, profile, (self.probe(model, shape, tokens, _scored(tokens)) for tokens in bar))

    def _describe_calibration(self) -> dict:
        """What a profile says about the options that it was made with."""
        return {
            "document": self.document,
            "samples": self.samples,
            "seed": self.seed,
            "target_energy": self.target_energy,
        }

    def _local(self, model, shape: ModelShape, tokens: list[int], scored: int, seed: int) -> Iterator[tuple]:
        """As `vectors`, with the gradients of every layer's own attention output."""
        rng = np.random.default_rng(seed)
        for queries, keys, values in self.activations(model, shape, tokens):
            gradients = local_gradients(queries[:, -scored:], keys, values, self.samples, rng)
            yield queries[:, :-scored], keys[:, :-scored], values[:, :-scored], *gradients

    def _bar(self, steps, what: str):
        return tqdm(steps, desc=what, disable=not self.progress, leave=False)


def _warn_if_thin(tokens: int, head_dim: int) -> None:
    """Say that a calibration has fewer than enough `tokens` for heads of `head_dim` channels."""
    enough = thin_below(head_dim)
    if tokens < enough:
        log.warning(
            "Calibrating on %s tokens, which is thin: codes get wide margins, at a price in quality. Give %s tokens or more: "
            "longer texts, and tokens= as many.",
            f"{tokens:,}",
            f"{enough:,}",
        )


def _wide(shape: ModelShape, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """`arrays` [..., D] with zeros behind their channels up to head_dim, where keys and values have other widths."""
    return tuple(widened(ops, x, shape.head_dim) for x in arrays) if shape.widths else arrays


def _scored(tokens: list[int]) -> int:
    """How many of the last tokens of a document are scored."""
    return max(len(tokens) // SCORED_SHARE, 16)

"""What the core asks of a host: the library that has the models, seen through a backend.

A backend implements `Models` and `Host` as its modules `integration` and `host`. Everything that all backends would do
alike is written once, over a `Host`: `cache.model_cache` makes, fills and weighs caches, `cache.prompt_cache` stores
them, `calibration.profiler` calibrates. A cache is what the host's own generation takes; only `Host.layers` looks inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays.namespace import ArrayNamespace

Array = Any  # of the host's array library
ModelShape = Any  # as all that follow, of a package that stands above this one
LayerSurvey = Any
Profile = Any
Method = Any
Plan = Any
CachePlan = Any
Eviction = Any
ExactLayer = Any


@dataclass(frozen=True)
class Generated:
    """Tokens, and the times (seconds) at which prefill began and at which every token came."""

    tokens: list[int]
    times: list[float]

    def prefill_tokens_per_s(self, prompt_tokens: int) -> float:
        return prompt_tokens / max(self.times[1] - self.times[0], 1e-9) if len(self.times) > 1 else 0.0

    def decode_tokens_per_s(self) -> float:
        return (len(self.times) - 2) / max(self.times[-1] - self.times[1], 1e-9) if len(self.times) > 2 else 0.0


class Models(Protocol):
    """What a host says about its models and the layers of its own caches: a backend's module `integration`."""

    def load_model(self, name: str, dtype: str | None = None, quantize: str | None = None) -> tuple:
        """Model and tokenizer of a directory or hub id; quantize: `4bit` or `8bit` weights."""

    def load_tokenizer(self, model) -> Any:
        """The tokenizer that `model` came with, None where the model does not know, or has none."""

    def model_shape(self, model) -> tuple[ModelShape, dict[int, str]]:
        """Sizes of `model`, and by index the layers that are passed through, with the reason."""

    def window_shape(self, model) -> tuple[ModelShape, dict[int, str]]:
        """`model_shape` with the layers that have a sliding window, and no others."""

    def survey(self, model) -> list[LayerSurvey]:
        """How every layer of `model` uses its cache."""

    def model_dtype(self, model) -> Any:
        """Dtype in which `model` keeps keys and values."""

    def model_name(self, model) -> str:
        """Hub id or folder of `model`, else its kind."""

    def weights_digest(self, model) -> str:
        """`hosts.weights.digest_weights` of `model`, empty where it has no final norm."""

    def max_context(self, model) -> int | None:
        """Tokens that `model` was made for, None when unknown."""

    def parts(self, model) -> Iterable:
        """All modules of `model`."""

    def sample_of(self, part) -> Any:
        """Some weights of a module, NumPy; None where none are in memory."""

    def host_layers(self, model, left_padding: list[int] | None = None) -> list:
        """The cache layers that the host would use for `model`, for a batch with `left_padding` in slots."""

    def cache_of(self, layers: list) -> Any:
        """The host's own cache made of `layers`."""

    def exact_layer(self, layer) -> ExactLayer:
        """What a layer of the host's own holds, or a `StateLayer`; raises ValueError for a kind that no file can have."""

    def set_exact_layer(self, layer, held: ExactLayer) -> None:
        """Let an empty layer of the host's own hold the arrays of `held`; raises ValueError when they are too few."""


@dataclass(frozen=True)
class Captures:
    """The functions of a backend's module `capture` that calibration calls.

    capture(model, tokens, layers): a cache that has read `tokens`, and has the queries of `layers` too.
    captured(cache, layer_idx): a compressible layer of it, with `queries` [1, Hq, T, D] (None where nobody sees them), `keys`
    and `values` [1, H, T, D] after RoPE, and the attention `scale`.
    score_gradients(model, cache, tokens, samples, seed): gradients of log p(label) with respect to what such a cache
    holds, for labels of `tokens` behind it that are drawn from the model; a dict per sample, of layer index -> (key,
    value) gradients [H, T, D].
    probed_log_probabilities(model, cache, tokens, changed, outputs): log probabilities [len(tokens), vocabulary] float32
    after what such a cache holds, which stays as it is. changed: by layer index keys and values [1, H, T, D], NumPy, in
    place of the captured ones. outputs: of decoder layers without a change, left by a call without, so that others need
    not run what lies below one.
    """

    capture: Callable[[Any, list[int], Sequence[int]], Any]
    captured: Callable[[Any, int], Any]
    score_gradients: Callable[[Any, Any, list[int], int, int], list[dict[int, tuple]]]
    probed_log_probabilities: Callable[[Any, Any, list[int], dict[int, tuple], dict[int, Any]], Array]


class Host(Protocol):
    """What caches of whole models are made of: a backend's module `host`. `xp` has the names of `arrays.ops`."""

    xp: ArrayNamespace
    models: Models

    def profile_for(
        self, model, method: Method, profile: Profile | None = None, tokenizer=None, windows: bool = False
    ) -> tuple[ModelShape, dict[int, str], Profile | None]:
        """Shape, passed layers, and what `method` reads: the profile given, found, or made now.

        windows: of the layers with a sliding window alone.
        """

    def install(self, model) -> None:
        """Let `model` attend to compressed caches as codes, and get ready what that needs."""

    def device(self, model) -> Any:
        """Where arrays for `model` go, or None where there is no choice; `model` None: one that is loaded now."""

    def compressed_cache(
        self,
        plan: Plan,
        layers: list,
        sinks: int,
        window: int,
        eviction: Eviction | None = None,
        working_set: int = 0,
        left_padding: list[int] | None = None,
    ) -> Any:
        """A cache of `layers` in which those that `plan` codes are replaced by empty compressed ones.

        working_set: bytes, of all layers together. left_padding: slots [B], for a host that is told them here.
        """

    def window_layer(self, plan: CachePlan, layer_group: int, layer, window: int) -> Any:
        """A `WindowLayer` in the place of `layer`, which has a sliding window; its last `window` tokens stay exact."""

    def layers(self, cache) -> list:
        """The layers of `cache`, in a list that may be changed."""

    def copy_layer(self, layer) -> Any:
        """An independent copy of a layer of the host's own, which keeps nothing else alive."""

    def held(self, layer) -> tuple[dict[str, list[Array]], int]:
        """Every array that a layer of the host's own holds, by `cache.size.KINDS`, and how many elements are in use.

        Elements are those of tokens and states, not of counters.
        """

    def most_tokens(self, layer) -> int:
        """How many tokens a layer of the host's own keeps at most; 0 where that is no number of tokens."""

    def buffers(self, arrays: Iterable[Array]) -> dict[int, int]:
        """Bytes that `arrays` keep alive, by the buffer that holds them."""

    def no_gradients(self) -> AbstractContextManager:
        """A context in which nothing is kept for a backward pass."""


class Generation(Protocol):
    """What evaluation, benchmark, engine and command line ask of a backend: its module `generation`.

    It has functions of `Models` too, and those of `cache.model_cache` and `cache.prompt_cache` for its host.
    """

    HOST_PACKAGES: tuple[str, ...]  # whose versions belong to a result
    PREFILL_CHUNK: int  # tokens of a prompt per forward pass

    def generate(
        self,
        model,
        tokenizer,
        prompt: list[int],
        cache,
        max_tokens: int,
        ignore_eos: bool,
        on_token: Callable[[int], None],
    ) -> Generated:
        """Greedy tokens after `prompt`, which follows what `cache` holds, by the host's own loop."""

    def feed(self, model, tokens: list[int], cache, keep: int = 1) -> np.ndarray:
        """Logits [keep, vocabulary] float32 of the last `keep` of `tokens`, which enter `cache` in one call."""

    def prefill(self, model, prompt: list[int], cache) -> np.ndarray:
        """Logits [1, vocabulary] float32 of the last token of `prompt`, which enters `cache` in pieces."""

    def read(self, model, tokens: list[int], cache) -> None:
        """Let `tokens` enter `cache` in one call that makes no logits."""

    def can_crop(self, cache) -> bool:
        """Whether `cache` can forget any number of its last tokens."""

    def crop(self, cache, tokens: int) -> bool:
        """Let `cache` forget its last `tokens`; False where it cannot, and is of no more use."""

    def end_tokens(self, model, tokenizer) -> set[int]:
        """Tokens that end an answer."""

    def token_nbytes(self, model) -> int:
        """`cache.model_cache.token_nbytes`."""

    def text_stream(self, tokenizer) -> Any:
        """The host's detokenizer: text as tokens come."""

    def recorded(self, model, cache, layers: Sequence[int]) -> AbstractContextManager[dict[int, list]]:
        """By layer, what the attention of `layers` is given and gives back while `model` runs with the plain `cache`."""

    def attend(self, cache, layer_idx: int, call) -> np.ndarray:
        """What layer `layer_idx` of `cache` gives for a recorded `call` [Hq, L, D]; its tokens enter the cache."""

    def held_vectors(self, cache, layers: Sequence[int]) -> Iterator[tuple]:
        """`cache.model_cache.held_vectors`."""

    def reset_peak(self) -> None:
        """Start a new measurement of peak memory, where the device counts its own."""

    def peak_bytes(self) -> int:
        """Peak memory so far, in bytes: of the device where it counts, else of the process."""


def score(prefill: Callable, feed: Callable, model, prompt: list[int], continuation: list[int], cache) -> np.ndarray:
    """Logits [len(continuation), vocabulary] float32 for every token of `continuation`, fed one at a time after `prompt`.

    prefill, feed: those of `Generation`.
    """
    logits = [prefill(model, prompt, cache)]
    return np.concatenate(logits + [feed(model, [token], cache) for token in continuation[:-1]])

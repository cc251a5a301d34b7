"""A model with its profile that answers from compressed caches: load once, generate often."""

from __future__ import annotations

from types import ModuleType

from ..errors import UsageError
from ..hosts.chat_template import encode_prompt
from ..hosts.demo_model import demo_model_path
from ..planning.methods import DEFAULT_METHOD, get_live_method
from ..profile.profile import Profile

QUANTIZE = ("4bit", "8bit")  # of weights


class Engine:
    """A model with its profile that answers from compressed caches; a backend adds its module `generation` as `host`.

    The interface of the first library, spectral-kv 1.0.

    Args:
        model_name: A directory, a hub id, or `demo`.
        quantize: `4bit` or `8bit` weights, None as they are stored. The cache is compressed either way.
        bits: Average stored bits per sealed key or value element; None takes the method's default.
        profile: A profile or its file; None finds one, or calibrates.
        dtype: Type of the weights, such as `bfloat16`; None as they are stored.
        cache_options: Further arguments of `make_prompt_cache`: `method`, `window`, `sinks`, `budget_tokens` and others.

    Raises:
        UsageError: The method is unknown, `load` cannot reach the bits, or the profile is of another model; also for a
            `quantize` that this machine cannot do.
        RuntimeError: `generate` is called before `load`.

    Examples:
        >>> from spectral_kv_torch import InferenceEngine  # spectral_kv_mlx has the same
        >>> engine = InferenceEngine("demo", bits=2).load()
        >>> answer = engine.generate("Name a sea.", max_tokens=4)
        >>> engine.cache_nbytes > 0
        True
    """

    host: ModuleType

    def __init__(
        self,
        model_name: str,
        quantize: str | None = None,
        bits: float | None = None,
        *,
        profile: Profile | str | None = None,
        dtype: str | None = None,
        **cache_options,
    ):
        self.model_name, self.quantize, self.bits, self.dtype = model_name, check_quantize(quantize), bits, dtype
        self.method, self.cache_options = get_live_method(cache_options.pop("method", DEFAULT_METHOD)), cache_options
        self.profile = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)
        self.model = self.tokenizer = self.cache = None

    def load(self) -> Engine:
        """Load model and tokenizer, and find the profile or calibrate one; returns itself.

        Raises UsageError for bits that the method cannot reach, a profile of another model, or a `quantize` that this
        machine cannot do.
        """
        name = str(demo_model_path()) if self.model_name == "demo" else self.model_name
        model, tokenizer = self.host.load_model(name, self.dtype, self.quantize)
        profiler = self.host.SpectralProfiler()
        _, _, self.profile = profiler.profile_for(model, self.method, self.profile, tokenizer)
        self._new_cache(model, tokenizer)  # raises for wrong options before anything long runs
        self.model, self.tokenizer = model, tokenizer
        return self

    def generate(self, prompt: str, max_tokens: int = 256, raw: bool = False, on_token=lambda token: None) -> str:
        """Greedy answer to `prompt` from a new compressed cache, which stays in `cache` until the next call.

        raw: no chat template around the prompt; on_token: sees each token as it comes. Raises RuntimeError before
        `load`, ValueError for an empty prompt or more tokens than the model was made for.
        """
        if self.model is None:
            raise RuntimeError("Expected a loaded engine, received a prompt before load(). Call engine.load() first.")
        if not prompt.strip():
            raise UsageError("Expected a prompt, received an empty one.")
        if max_tokens < 1:
            raise UsageError(f"Expected max_tokens of at least 1, received {max_tokens}.")
        tokens = encode_prompt(self.tokenizer, prompt, raw)
        limit = self.host.context_limit(self.model)
        if limit and len(tokens) + max_tokens > limit:
            raise UsageError(
                f"Expected at most {limit:,} tokens, the model's context, received {len(tokens):,} of prompt and "
                f"{max_tokens:,} more. Shorten the prompt or lower max_tokens."
            )
        self.cache = self._new_cache(self.model, self.tokenizer)
        made = self.host.generate(self.model, self.tokenizer, tokens, self.cache, max_tokens, False, on_token)
        return self.tokenizer.decode(made.tokens, skip_special_tokens=True)

    def _new_cache(self, model, tokenizer):
        options = {"method": self.method, "tokenizer": tokenizer, **self.cache_options}
        return self.host.make_prompt_cache(model, self.profile, self.bits, **options)

    @property
    def cache_nbytes(self):
        """Bytes of the cache of the last answer (`CacheSize`), None before the first."""
        return None if self.cache is None else self.host.cache_nbytes(self.cache)


def check_quantize(quantize: str | None) -> str | None:
    """`quantize`; raises UsageError for what no backend can do to weights."""
    if quantize is not None and quantize not in QUANTIZE:
        raise UsageError(f"Expected quantize to be None or one of {', '.join(QUANTIZE)}, received {quantize!r}.")
    return quantize

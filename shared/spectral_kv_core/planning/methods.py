"""The method table: every compression recipe is one row."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import UsageError
from ..profile.basis_set import GROUPS, PAIRS, ROPES, WHOLE_MODEL
from ..scorers import SCORERS, get_scorer

QUANTIZERS = ("scalar", "trellis")
ROUNDINGS = ("nearest", *(scorer.name for scorer in SCORERS.values() if not scorer.needs_recent))
# chunks that cannot grow: a file fills a plain cache, or a live one of another method
FILE_CODECS = ("entropy-coded", "svdq-prompt", "xkv", "kvtc")
CODECS = (
    "none", "affine", "spectral", "entropy-coded", "kivi", "turboquant", "turboquant-qjl", "jarviskv", "svdq", "svdq-prompt",
    "eigen-attention", "think", "xkv", "kvtc",
)  # fmt: skip
LATENT_CODECS = ("turboquant", "turboquant-qjl", "jarviskv")  # attention runs on what they code, per head after RoPE
DROPPING = ("affine", "spectral")  # codecs whose sealed tokens can be dropped
# codecs whose error grows with the mean of keys: scales, norms, energies and channels are those of keys with their mean
WITH_MEANS = ("affine", "kivi", "turboquant", "turboquant-qjl", "jarviskv", "eigen-attention", "think")


@dataclass(frozen=True)
class Method:
    """A recipe over shared parts.

    codec: `none` keeps the host's precision, `affine` quantizes channels as they are, `spectral` quantizes latents,
    `entropy-coded` does so with an entropy coder, for files; those of the published methods are in `codecs`, named as they
    are.
    rope: keys are coded before (`pre`) or after (`post`) the rotary embedding.
    group: what shares one basis (`GROUPS`). block: tokens per time block. time: transform inside a block.
    group_size: numbers that share a scale. reads: the profile's basis set, where it is not that of group and rope.
    quantizer: `scalar`, or `trellis`: codes of 1 to 4 bits are chosen together (module `trellis`).
    rounding: `nearest` code, or by a scorer: the error of a block goes to the tokens that matter least.
    scorer: says which tokens a cache drops (`scorers.SCORERS`); None keeps every token.
    """

    name: str
    codec: str
    summary: str
    source: str
    rope: str = "post"
    group: str = "head"
    time: str = "none"
    block: int = 1
    group_size: int = 64
    quantizer: str = "scalar"
    rounding: str = "nearest"
    scorer: str | None = None
    reads: str | None = None

    def __post_init__(self):
        if self.codec not in CODECS:
            raise UsageError(f"Expected a codec in {CODECS}, received {self.codec!r}.")
        if self.rope not in ROPES:
            raise UsageError(f"Expected rope pre or post, received {self.rope!r}.")
        if self.group not in GROUPS:
            raise UsageError(f"Expected a group in {GROUPS}, received {self.group!r}.")
        if self.quantizer not in QUANTIZERS:
            raise UsageError(f"Expected a quantizer in {QUANTIZERS}, received {self.quantizer!r}.")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"Expected a rounding in {ROUNDINGS}, received {self.rounding!r}.")
        if self.scorer is not None:
            get_scorer(self.scorer)
        one_layer = self.group in GROUPS[:3]
        # a live cache gets its layers one after the other, and attends to each alone
        fitting = ("spectral", "entropy-coded") if self.group == "layer2" else ("entropy-coded",)
        if self.live and not one_layer and self.codec not in fitting:
            raise UsageError(
                f"Expected the codec {' or '.join(fitting)} for the group {self.group}, received {self.codec!r}."
            )
        if self.scorer is not None and not one_layer:
            raise UsageError(
                f"Expected a method that codes every layer alone for the scorer {self.scorer}, {self.name} codes layers "
                "together. Choose spectral-dense."
            )

    @property
    def basis_set(self) -> str | None:
        """Name of the profile's basis set that this method reads, None for a method that needs no profile."""
        return f"{self.group}.{self.rope}" if self.codec in ("spectral", "entropy-coded") else self.reads

    @property
    def profile_set(self) -> str | None:
        """Name of a basis set that a profile for this method has; None for a method that needs no profile."""
        queries = self.scorer is not None and get_scorer(self.scorer).needs_queries
        return self.basis_set or (METHODS[DEFAULT_METHOD].basis_set if queries else None)

    @property
    def compresses(self) -> bool:
        """Whether anything is coded; a method that does not may still drop tokens."""
        return self.codec != "none"

    @property
    def transforms(self) -> bool:
        """Whether it is of the project's own codec, which a cache can also have by tiers of tokens."""
        return self.codec == "spectral"

    @property
    def can_drop(self) -> bool:
        """Whether tokens that it has sealed can be dropped."""
        return self.codec in DROPPING

    @property
    def suffers_from_key_means(self) -> bool:
        """Whether keys with a large constant part, as biases of a projection give them, are coded worse."""
        return self.codec in WITH_MEANS

    @property
    def shares_tokens(self) -> bool:
        """Whether the heads of a layer keep the same tokens, because they are coded together."""
        return self.transforms and (self.group != "head" or self.quantizer == "trellis")

    @property
    def decodes_history(self) -> bool:
        """Whether a step decodes what was sealed before."""
        return self.compresses and not self.latent

    @property
    def live(self) -> bool:
        """Whether tokens can be appended and attended to; a method that is not live makes files only."""
        return self.codec not in FILE_CODECS

    @property
    def latent(self) -> bool:
        """Whether attention can run on the latents: a rotation after the codec, or a shared basis, rules it out."""
        return (self.transforms or self.codec in LATENT_CODECS) and self.rope == "post" and self.group == "head"


METHODS = {
    method.name: method
    for method in (
        Method(
            "spectral",
            "spectral",
            "SVD latents per head, after RoPE, DCT over 16 tokens, bits by sensitivity; attended in the latent space",
            "SVD of keys and values with one bit allocation for the model; transform coding as in KVTC (2511.01815)",
            time="dct",
            block=16,
            rounding="expected-attention",
        ),
        Method(
            "spectral-trellis",
            "spectral",
            "spectral with trellis codes: a third less divergence at the same bytes, some more time per step",
            "as spectral; trellis-coded quantization (Marcellin and Fischer 1990)",
            time="dct",
            block=16,
            quantizer="trellis",
            rounding="expected-attention",
        ),
        Method(
            "spectral-dense",
            "spectral",
            "SVD latents of all keys and values of a layer together, before RoPE, DCT over 16 tokens, trellis codes; decoded",
            "as spectral; one basis for keys and values, both linear in the same hidden state; Marcellin and Fischer 1990",
            rope="pre",
            group="layer",
            time="dct",
            block=16,
            quantizer="trellis",
            rounding="expected-attention",
        ),
        Method(
            "spectral-dense-pairs",
            "spectral",
            "spectral-dense with one basis for every two layers that follow each other; profile made with --pairs",
            "as spectral-dense; neighboring layers read nearly the same hidden state",
            rope="pre",
            group="layer2",
            time="dct",
            block=16,
            quantizer="trellis",
            rounding="expected-attention",
        ),
        Method(
            "spectral-stored",
            "entropy-coded",
            "spectral-dense with uniform quantizers and an entropy coder with static tables; for files and transfer",
            "as spectral-dense; entropy-coded scalar quantization with a dead zone, asymmetric numeral systems (Duda 2013)",
            rope="pre",
            group="layer",
            time="dct",
            block=16,
            rounding="expected-attention",
        ),
        Method(
            "spectral-stored-pairs",
            "entropy-coded",
            "spectral-stored with one basis for every two layers that follow each other; profile made with --pairs",
            "as spectral-stored; neighboring layers read nearly the same hidden state",
            rope="pre",
            group="layer2",
            time="dct",
            block=16,
            rounding="expected-attention",
        ),
        Method(
            "affine",
            "affine",
            "grouped asymmetric quantization per token, in the layout of mlx-lm's QuantizedKVCache",
            "mlx.core.quantize, affine mode; here scale and bias are plain minimum and range, rounded to float16 first",
        ),
        Method(
            "kivi",
            "kivi",
            "asymmetric quantization of keys per channel over 32 tokens and of values per token over 32 channels",
            "KIVI (2402.02750), algorithm 1; the exact residual is the window, values are sealed 32 tokens at a time too",
            block=32,
            group_size=32,
        ),
        Method(
            "turboquant",
            "turboquant",
            "norm of every vector, random rotation, one Gaussian codebook for all coordinates; attended as rotated",
            "TurboQuant (2504.19874), Q_mse (algorithm 1) with signs and Hadamard as rotation, and norm correction",
        ),
        Method(
            "turboquant-qjl",
            "turboquant-qjl",
            "turboquant with one bit less for keys and a sign sketch of what is left of them: unbiased scores",
            "TurboQuant (2504.19874), Q_prod (algorithm 2) for keys with an orthogonal sketch, Q_mse for values",
        ),
        Method(
            "jarviskv",
            "jarviskv",
            "SVD latents per head after RoPE, rotated, b-bit codes and a sign bit of the residual; rank by energy",
            "derived from the package spectral-kv 1.0, no paper known; share of energy and b follow from the bits",
            reads="head.post",
        ),
        Method(
            "svdq",
            "svdq",
            "keys before RoPE, all heads of a layer, SVD latents in 8 groups of falling bits per channel; values in float16",
            "SVDq (2502.15304), section 3: uniform codes at the middle of their cell, ranges over 128 tokens of a channel",
            rope="pre",
            group="side",
            block=128,
            reads="layer.pre",
        ),
        Method(
            "svdq-prompt",
            "svdq-prompt",
            "svdq with the mean and the axes of the prompt's own keys, both stored in float16; for files",
            "SVDq (2502.15304), section 3; axes counted, schedule from the bits and the prompt's length",
            rope="pre",
            group="side",
            block=128,
        ),
        Method(
            "eigen-attention",
            "eigen-attention",
            "low rank per head without quantization: keys before RoPE in a basis of keys and queries, values in their own",
            "Eigen Attention (2408.05646), section 3; one share of the singular values for all layers, from the bits",
            rope="pre",
            reads="layer.pre",
        ),
        Method(
            "think",
            "think",
            "keys without the channels that matter least by query energy times key energy; values in float16",
            "ThinK (2407.21018), equation 6; query energy from the profile instead of the prompt's last queries",
            reads="head.post",
        ),
        Method(
            "xkv",
            "xkv",
            "the prompt's own truncated SVD over every four layers, keys before RoPE; both factors in float16; for files",
            "xKV (2503.18893), section 3; really stored factored, the factors of every layer counted",
            rope="pre",
            group="layer4",
        ),
        Method(
            "kvtc",
            "kvtc",
            "PCA over all layers and heads, keys before RoPE, groups of falling width, DEFLATE; profile made with --joint",
            "KVTC (2511.01815), section 3; groups by a Lagrangian on the spectrum, basis of a bounded sample",
            rope="pre",
            group="model",
            reads="model.pre",
        ),
        Method("identity", "none", "the plain cache: nothing is compressed", "reference"),
        *(
            Method(scorer.name, "none", f"drops tokens, keeps: {scorer.summary}", scorer.source, scorer=scorer.name)
            for scorer in SCORERS.values()
        ),
    )
}
DEFAULT_METHOD = "spectral"
BASIS_SETS = tuple(
    dict.fromkeys(m.basis_set for m in METHODS.values() if m.basis_set not in (None, PAIRS, WHOLE_MODEL))
)


def get_method(name: str | Method) -> Method:
    """The row called `name`, or of `SCORER+METHOD` the method that drops tokens by that scorer.

    Raises UsageError that lists the names there are.
    """
    if isinstance(name, Method):
        return name
    if name in METHODS:
        return METHODS[name]
    scorer, plus, codec = name.partition("+")
    if plus and scorer in SCORERS and codec in METHODS and METHODS[codec].can_drop:
        return replace(METHODS[codec], name=name, scorer=scorer, summary=f"{METHODS[codec].summary}; drops tokens")
    raise UsageError(
        f"Expected a method among {', '.join(METHODS)}, or SCORER+METHOD such as triattention+spectral, received {name!r}."
    )


def rounded_by(method: Method, scorer: str | None) -> Method:
    """`method` with the scores of `scorer` as weights of time rounding, or `nearest` codes; None: as it is.

    Raises UsageError for a method that does not round in time.
    """
    if scorer is None:
        return method
    if method.rounding == "nearest":
        raise UsageError(f"Expected a method that rounds by scores for rounding_scores, {method.name} does not.")
    return replace(method, rounding=scorer)


def get_keeping_method(name: str | Method) -> Method:
    """`get_method` for what is stored as a whole; raises UsageError for a method that drops tokens."""
    method = get_method(name)
    if method.scorer is not None:
        raise UsageError(
            f"Expected a method that keeps every token for a stored prompt, received {method.name}, which drops some."
        )
    return method


def get_live_method(name: str | Method) -> Method:
    """`get_method` for a cache in use; raises UsageError for a method that makes files only."""
    method = get_method(name)
    if not method.live:
        raise UsageError(
            f"Expected a method with a live cache, received {method.name}, which is for files: use save_prompt_cache and "
            "load_prompt_cache, or spectralkv cache-prompt."
        )
    return method

"""Codecs of the methods that the field names, one family a file; spectral, affine and stored are the core's own."""

from __future__ import annotations

from importlib import import_module

FAMILIES = {  # codec of a method -> file, class of its plan
    "kivi": ("kivi", "KiviPlan"),
    "turboquant": ("turboquant", "TurboQuantPlan"),
    "turboquant-qjl": ("turboquant", "TurboQuantPlan"),
    "jarviskv": ("jarviskv", "JarvisPlan"),
    "svdq": ("svdq", "SvdqPlan"),
    "svdq-prompt": ("svdq_prompt", "SvdqPromptPlan"),
    "eigen-attention": ("eigen_attention", "EigenPlan"),
    "think": ("think", "ThinkPlan"),
    "xkv": ("xkv", "XkvPlan"),
    "kvtc": ("kvtc", "KvtcPlan"),
}


def plan_class(codec: str):
    """The `ArrayPlan` of a method's codec, None for the core's own; imported when it is first asked for."""
    if codec not in FAMILIES:
        return None
    file, name = FAMILIES[codec]
    return getattr(import_module(f".{file}", __package__), name)

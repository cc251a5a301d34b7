"""Arguments of mlx-lm's generate functions that say how large a cache may be, and that change no cache of ours."""

from __future__ import annotations

import sys
import warnings

import mlx_lm.generate  # noqa: F401  # the package has a function of this name in place of the module

OURS = {"kv_bits": "bits", "max_kv_size": "budget_tokens"}  # by mlx-lm's name, the argument of make_prompt_cache
_GENERATE = vars(sys.modules["mlx_lm.generate"])


def warn_of_limits() -> None:
    """Warn in one line of such arguments, where a generate function of mlx-lm runs and was given some.

    mlx-lm tells a cache nothing of them, so they are looked for in the functions that are running.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is _GENERATE:
            told = frame.f_locals
            for name, ours in OURS.items():
                value = told.get(name, getattr(told.get("self"), name, None))  # `self`: a BatchGenerator
                if value is not None:
                    warnings.warn(
                        f"{name}={value} changes no cache of spectralkv. Give {ours} to make_prompt_cache instead.",
                        stacklevel=2,
                    )
        frame = frame.f_back

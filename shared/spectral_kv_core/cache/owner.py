"""The model that a cache was made for, and what is said where that is not what uses it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from ..hosts.protocol import Models
from ..profile.store import warn_once


class Owner:
    """Of a cache: looks at each part of a model that attends to it for the first time."""

    def __init__(self, models: Models, model):
        self._model, self._name = weakref.ref(model), models.model_name(model)
        self._parts, self._sample = models.parts, models.sample_of
        self._met: Callable = lambda: None

    def __deepcopy__(self, memo) -> Owner:
        """Itself: copies of a cache are of the same model."""
        return self

    def meet(self, part) -> None:
        """Warn, once, where `part`, which attends to the cache, is of other weights than any part of the model."""
        if self._met() is part:
            return
        self._met, model = weakref.ref(part), self._model()
        if model is None:
            return
        parts = list(self._parts(model))
        if any(known is part for known in parts):
            return
        sample = self._sample(part)
        alike = (self._sample(known) for known in parts if type(known) is type(part))
        if sample is None or any(known is None or np.array_equal(known, sample) for known in alike):
            return  # a copy of the model, or weights that are not in memory
        warn_once(
            f"A cache that was made for {self._name} is used by other weights: what it holds is of another model. Make one "
            "for each model.",
            f"{id(model)} {id(part)}",
        )

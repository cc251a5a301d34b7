"""A kernel that nobody has seen on this kind of card: its first step is compared with stock operations."""

from __future__ import annotations

import warnings
from functools import partial

import torch

from spectral_kv_core import attention

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative RMS; products may be in tf32
_verdicts: dict[tuple, bool] = {}  # by card and dtype of the queries, for this process


class CheckedStep:
    """`step`, or stock operations from the first call on if that raises or differs from them, with one warning."""

    def __init__(self, ops, codec, step):
        self._step, self._stock = step, partial(attention.decode_step, ops, codec)

    def __call__(self, chunks, queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        device = queries.device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        verdict = _verdicts.get((card, queries.dtype))
        if verdict:
            return self._step(chunks, queries, keys, values, scale)
        expected = self._stock(chunks, queries, keys, values, scale)
        if verdict is None:
            _verdicts[card, queries.dtype] = self._agrees(card, (chunks, queries, keys, values, scale), expected)
        return expected

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return self._step.tables()

    def _agrees(self, card: str, call: tuple, expected) -> bool:
        try:
            error = (self._step(*call).float() - expected.float()).norm() / expected.float().norm()
            reason = f"differs by {error:.1%}" if not error <= TOLERANCE[expected.dtype] else None
        except Exception as problem:  # whatever a compiler or a driver may say
            reason = f"fails: {problem}"
        if reason:
            warnings.warn(
                f"spectralkv's kernel {reason} on {card}; stock operations of torch take over, which are slower. "
                "Please report it. SPECTRALKV_KERNELS=0 silences this.",
                stacklevel=4,
            )
        return reason is None

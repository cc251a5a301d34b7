"""Kernels that nobody has seen on this kind of card: the first result of each is compared with stock operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

from spectral_kv_core.arrays import attention

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative RMS; products may be in tf32
CODES_DIFFERING = 1e-4  # share of codes: products of another order move some to the other side of a threshold


class Verdicts:
    """Which kernels gave what stock operations give, by kernel, card, dtype and size."""

    def __init__(self):
        self.known: dict[tuple, bool] = {}

    def about(self, kernel: tuple) -> bool | None:
        """Whether `kernel` was right; None for one that nobody has seen."""
        return self.known.get(kernel)

    def note(self, kernel: tuple, right: bool) -> None:
        """Remember what the first result of `kernel` was."""
        self.known[kernel] = right


OF_PROCESS = Verdicts()


class Checked:
    """A function by a kernel, or by stock operations from the first call on if that raises or differs, with one warning."""

    def __init__(self, name: str, kernel: Callable, stock: Callable):
        self._name, self._kernel, self._stock = name, kernel, stock

    def __call__(self, like: torch.Tensor, size: int, *args):
        """The result for `args`; `like` is on the card and has the dtype, `size` decides what is compiled: channels of a
        head, or 0. Ranks and lengths differ from layer to layer and call to call; kernels take them as they come."""
        key = self._name, like.device, like.dtype, size
        verdict = OF_PROCESS.about(key)
        if verdict:
            return self._kernel(*args)
        expected = self._stock(*args)
        if verdict is None:
            OF_PROCESS.note(key, self._agrees(like.device, args, expected))
        return expected

    def refused(self, like: torch.Tensor, size: int) -> bool:
        """Whether the kernel was wrong."""
        return OF_PROCESS.about((self._name, like.device, like.dtype, size)) is False

    def _agrees(self, device: torch.device, args: tuple, expected) -> bool:
        try:
            reason = self._difference(self._kernel(*args), expected)
        except Exception as problem:  # whatever a compiler or a driver may say
            reason = f"fails: {problem}"
        if reason:
            card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            warnings.warn(
                f"spectralkv's kernel for {self._name} {reason} on {card}; stock operations of torch take over, which are "
                "slower. Please report it. SPECTRALKV_KERNELS=0 silences this.",
                stacklevel=4,
            )
        return reason is None

    @staticmethod
    def _difference(got, expected) -> str | None:
        """What is wrong with `got`, a tensor or several."""
        pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
        for x, y in pairs:
            if x.shape != y.shape or x.dtype != y.dtype:
                return f"gives {x.dtype} {list(x.shape)} for {y.dtype} {list(y.shape)}"
            if not y.dtype.is_floating_point:
                share = (x != y).float().mean().item() if y.numel() else 0.0
                if share * y.numel() > 1 and share > CODES_DIFFERING:
                    return f"differs in {share:.2%} of the codes"
            elif y.numel() and not (error := (x.float() - y.float()).norm() / y.float().norm()) <= TOLERANCE[y.dtype]:
                return f"differs by {error:.1%}"
        return None


class CheckedStep:
    """`step`, an `attention.decode_step`, checked."""

    def __init__(self, ops, codec, step):
        self._step, self._size = step, codec.head_dim
        self._checked = Checked("attention", step, partial(attention.decode_step, ops, codec))

    def __call__(self, chunks, queries, keys, values, scale: float):
        """As `attention.decode_step`."""
        return self._checked(queries, self._size, chunks, queries, keys, values, scale)

    def tables(self) -> list[torch.Tensor]:
        """Every tensor that all sequences share."""
        return self._step.tables()

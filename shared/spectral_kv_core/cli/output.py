"""What reaches the terminal, and in which words."""

from __future__ import annotations

import argparse
import re

import numpy as np

# fields of the library whose option has another name
OPTION_OF = {"prefixes": "prefix", "wavelets": "wavelet", "contexts": "context", "formats": "format", "texts": "text"}


def in_options(message: str, args: argparse.Namespace | None) -> str:
    """An error of the library, which names `fields` in backticks, in the words of the command that `args` are of."""

    def option(found: re.Match) -> str:
        name = OPTION_OF.get(found[1], found[1])
        return f"--{name.replace('_', '-')}" if args is not None and name in args else found[0]

    return re.sub(r"`(\w+)`", option, message)


def to_plain(x):
    """NumPy scalars and arrays as JSON knows them."""
    return x.tolist() if isinstance(x, (np.generic, np.ndarray)) else str(x)

"""What goes to standard output, and how."""

from __future__ import annotations

import numpy as np


def to_plain(x):
    """NumPy scalars and arrays as JSON knows them."""
    return x.tolist() if isinstance(x, (np.generic, np.ndarray)) else str(x)

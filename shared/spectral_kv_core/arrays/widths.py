"""Keys and values of other widths, made one width for codecs: with zeros, which cost no attention anything."""

from __future__ import annotations


def widened(xp, x, channels: int):
    """`x` [..., D] with zeros behind its channels: [..., channels]."""
    missing = channels - x.shape[-1]
    return xp.concat([x, xp.zeros((*x.shape[:-1], missing), dtype=x.dtype, like=x)], axis=-1) if missing else x

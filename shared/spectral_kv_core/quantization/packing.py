"""Bit packing of codes.

Codes are unsigned integers of 1 to 8 bits. Eight codes of `bits` bits are stored in exactly `bits` bytes (a *unit*),
split into planes of 4, 2 and 1 bits so that no code straddles a byte and unpacking is a few shifts on any backend.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

UNIT = 8  # codes per packed unit


def planes(bits: int) -> list[tuple[int, int]]:
    """Split a code of `bits` bits into byte-aligned planes: list of (width, shift), low bits first."""
    if not 1 <= bits <= 8:
        raise ValueError(f"Expected bits between 1 and 8, received {bits}.")
    if bits == 8:
        return [(8, 0)]
    split, shift = [], 0
    for width in (4, 2, 1):
        if bits & width:
            split.append((width, shift))
            shift += width
    return split


def pack(xp, codes, bits: int):
    """Pack `codes` [..., n] uint8 < 2**bits into [..., ceil(n / 8), bits] uint8; the last unit is filled with zeros."""
    *lead, n = codes.shape
    units = -(-n // UNIT)
    if units * UNIT != n:
        codes = xp.concat([codes, xp.zeros((*lead, units * UNIT - n), dtype=xp.uint8, like=codes)], axis=-1)
    packed = []
    for width, shift in planes(bits):
        if width == 8:
            packed.append(xp.copy(codes.reshape(*lead, units, UNIT)))  # a view would keep all codes alive
            continue
        per_byte = 8 // width
        plane = ((codes >> shift) & (2**width - 1)).reshape(*lead, units, width, per_byte)
        byte = plane[..., 0]
        for i in range(1, per_byte):
            byte = byte | (plane[..., i] << (i * width))
        packed.append(byte)
    return packed[0] if len(packed) == 1 else xp.concat(packed, axis=-1)


def unpack(xp, packed, bits: int, n: int):
    """Inverse of `pack`: [..., units, bits] uint8 -> codes [..., n] uint8."""
    *lead, units, _ = packed.shape
    codes: Any = None
    start = 0
    for width, shift in planes(bits):
        plane = packed[..., start : start + width]
        start += width
        if width < 8:
            plane = xp.split_bytes(plane, width)
        plane = plane.reshape(*lead, units * UNIT)
        codes = plane if codes is None else codes | (plane << shift)
    return codes if units * UNIT == n else codes[..., :n]


def lowest_bits(packed, bits: int):
    """Lowest bits of packed codes, eight to a byte: [..., units, bits] uint8 -> [..., units] uint8."""
    width = planes(bits)[0][0]
    if width == 8:
        raise ValueError("Expected codes of fewer than 8 bits, which lie in planes, received 8.")
    found = None
    for byte in range(width):
        for field in range(8 // width):
            bit = (packed[..., byte] >> (field * width) & 1) << (byte * (8 // width) + field)
            found = bit if found is None else found | bit
    return found


def pack_rows(xp, codes, bits: int):
    """Pack rows of codes [B, rows, n] that grow along n: whole units [B, rows, n // 8, bits], and the rest.

    The n % 8 codes that do not fill a unit yet lie side by side for all rows, [B, ceil(rows * (n % 8) / 8), bits], so
    that a short row wastes no bytes.
    """
    batch, rows, n = codes.shape
    whole = n // UNIT * UNIT
    rest = codes[:, :, whole:].reshape(batch, rows * (n - whole))
    return pack(xp, codes[:, :, :whole], bits), pack(xp, rest, bits)


def interleave(pairs: Iterable[tuple]) -> tuple:
    """The whole units and the rest of every width one after the other, as a chunk holds them; `pairs` as of `pack_rows`."""
    return tuple(array for pair in pairs for array in pair)


def unpack_rows(xp, packed, bits: int, n: int):
    """Inverse of `pack_rows` -> [B, rows, n] uint8."""
    units, rest = packed
    batch, rows, whole, _ = units.shape
    codes = unpack(xp, units, bits, whole * UNIT)
    if n == whole * UNIT:
        return codes
    left = n - whole * UNIT
    rest = unpack(xp, rest, bits, rows * left).reshape(batch, rows, left)
    return xp.concat([codes, rest], axis=2) if whole else rest


def append_rows(xp, packed, n: int, codes, bits: int):
    """Append `codes` [B, rows, m] behind the first `n` of `packed`; whole units are not touched."""
    units, rest = packed
    if n % UNIT:
        batch, rows = codes.shape[:2]
        codes = xp.concat([unpack(xp, rest, bits, rows * (n % UNIT)).reshape(batch, rows, n % UNIT), codes], axis=2)
    more, rest = pack_rows(xp, codes, bits)
    return (xp.concat([units, more], axis=2) if more.shape[2] else units), rest

"""Sizes in bytes, and how people write them."""

import re

from network.errors import InvalidArgument

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_FACTORS = {
    "": 1,
    "B": 1,
    "K": KiB, "KIB": KiB, "KB": 1000,
    "M": MiB, "MIB": MiB, "MB": 1000**2,
    "G": GiB, "GIB": GiB, "GB": 1000**3,
    "T": TiB, "TIB": TiB, "TB": 1000**4,
}  # fmt: skip
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Turn `10GiB`, `4M` or `1500` into bytes; K, M, G, T alone are powers of 1024.

    Raises InvalidArgument for anything else, and for a size over 2**62.
    """
    match = _PATTERN.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise InvalidArgument(f"not a size: {text!r} (write for example 10GiB)")
    size = int(float(match[1]) * factor)
    if size > 2**62:
        raise InvalidArgument(f"size too large: {text!r}")
    return size


def format_size(size_bytes: int) -> str:
    """Render bytes for people with a binary unit and at most one decimal."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"

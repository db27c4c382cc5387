"""Sizes as people write them: ``2M`` tokens, ``80GiB``, ``1TiB``."""

from __future__ import annotations

import re

from core.errors import SettingsError

_BINARY = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_TOKENS = re.compile(_NUMBER + r"([KMG]?)\s*", re.IGNORECASE | re.ASCII)
_BYTES = re.compile(_NUMBER + r"(?:([KMGT])(i)?)?(B)?\s*", re.IGNORECASE | re.ASCII)
_LONGEST = 32


def parse_tokens(text: str) -> int:
    """Read a number of tokens; K, M and G are powers of 1024, as in names of context lengths.

    Raises:
        SettingsError: for anything else, or no token at all.

    Example:
        >>> parse_tokens("128K"), parse_tokens("2M"), parse_tokens("1000")
        (131072, 2097152, 1000)
    """
    match = _TOKENS.fullmatch(text) if len(text) <= _LONGEST else None
    count = float(match[1]) * 1024 ** _BINARY[match[2].upper()] if match else 0.0
    if count < 1 or count != int(count):
        raise SettingsError(f"{text[:_LONGEST]!r} is no number of tokens", fix="such as 128K or 2M")
    return int(count)


def parse_bytes(text: str) -> int:
    """Read a number of bytes: GiB is a power of 1024, GB one of 1000, and G means GiB.

    Raises:
        SettingsError: for anything else, or no byte at all.

    Example:
        >>> parse_bytes("80GiB"), parse_bytes("80GB"), parse_bytes("80G") == parse_bytes("80GiB")
        (85899345920, 80000000000, True)
    """
    match = _BYTES.fullmatch(text) if len(text) <= _LONGEST else None
    count = 0
    if match:
        number, prefix, binary, unit = match.groups()
        base = 1000 if unit and prefix and not binary else 1024
        count = int(float(number) * base ** _BINARY[(prefix or "").upper()])
    if count < 1:
        raise SettingsError(
            f"{text[:_LONGEST]!r} is no number of bytes", fix="such as 80GiB or 1TiB"
        )
    return count


def show_bytes(count: float) -> str:
    """Bytes in the largest binary unit of which there is one.

    Example:
        >>> show_bytes(3 * 2**30), show_bytes(512)
        ('3.00 GiB', '512 B')
    """
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count:.0f} B"


def show_tokens(count: int) -> str:
    """Tokens in K or M where that is short.

    Example:
        >>> show_tokens(2 * 2**20), show_tokens(1536), show_tokens(1000)
        ('2M', '1.5K', '1,000')
    """
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count >= size and len(f"{count / size:g}") <= 5 and count * 100 % size == 0:
            return f"{count / size:g}{unit}"
    return f"{count:,}"

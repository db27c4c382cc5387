"""A digest of a tensor's bytes to which shards add up, however the tensor is cut.

Every 32-bit half of a little-endian 64-bit word is multiplied by a pseudo-random coefficient that
depends on the word's place in the whole tensor, and the products are summed modulo 2^64 (a
multilinear hash, Lemire and Kaser, arXiv 1202.4961). Sums commute, so the digests of the parts that
ranks or files hold add up to that of the whole, without anybody gathering it. It finds every flipped
byte and, but for chance, every other accident; it is no protection against an attacker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_WIDTH = 512
"""Words of a row: the coefficient of a word is that of its column times that of its row."""
_ROW = 8 * _WIDTH
_AT_ONCE = 256
"""Rows that are looked at twice while they are in the cache of the processor."""
_HALF = np.uint64(32)
_MASK = 2**64 - 1


def _mixed(numbers: Words, seed: int) -> Words:
    """Odd pseudo-random numbers by counter (SplitMix64, Steele et al. 2014)."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31)) | np.uint64(1)


_SEEDS = 0x243F6A8885A308D3, 0x13198A2E03707344
_COLUMNS = tuple(_mixed(np.arange(_WIDTH, dtype=np.uint64), seed) for seed in _SEEDS)


@dataclass(frozen=True)
class Digest:
    """A sum of weighted words; sums of parts that do not overlap add up to that of the whole.

    Example:
        >>> whole = digest_of(b"0123456789abcdef0")
        >>> whole == digest_of(b"0123456") + digest_of(b"789abcdef0", begin=7)
        True
        >>> whole == digest_of(b"0123456789abcdeF0")
        False
    """

    words: int = 0
    halves: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest((self.words + other.words) & _MASK, (self.halves + other.halves) & _MASK)

    def __str__(self) -> str:
        return f"{self.words:016x}{self.halves:016x}"


def digest_of(data: bytes | bytearray | memoryview | NDArray[np.uint8], begin: int = 0) -> Digest:
    """Digest of some of a tensor's bytes.

    Args:
        data: consecutive bytes of the tensor in row-major order.
        begin: place of the first one in the whole tensor, in bytes.
    """
    octets = np.frombuffer(data, np.uint8)
    first = min(len(octets), -begin % _ROW)
    whole = (len(octets) - first) // _ROW * _ROW
    total = _padded(octets[:first], begin)
    if whole:
        total += _rows(octets[first : first + whole], (begin + first) // _ROW)
    return total + _padded(octets[first + whole :], begin + first + whole)


def _padded(octets: NDArray[np.uint8], begin: int) -> Digest:
    """Digest of bytes inside of one row."""
    if not len(octets):
        return Digest()
    row, before = divmod(begin, _ROW)
    line = np.zeros(_ROW, np.uint8)
    line[before : before + len(octets)] = octets
    return _rows(line, row)


def _rows(octets: NDArray[np.uint8], row: int) -> Digest:
    """Digest of whole rows, the first of which has the number ``row``."""
    words = octets.view("<u8").reshape(-1, _WIDTH)
    sums = np.empty((2, len(words)), np.uint64)
    shifted = np.empty((min(len(words), _AT_ONCE), _WIDTH), np.uint64)
    for begin in range(0, len(words), _AT_ONCE):
        part = words[begin : begin + _AT_ONCE]
        upper = np.right_shift(part, _HALF, out=shifted[: len(part)])
        # Unlike a product of matrices, einsum lets other threads run.
        np.einsum("ij,j->i", part, _COLUMNS[0], out=sums[0, begin : begin + _AT_ONCE])
        np.einsum("ij,j->i", upper, _COLUMNS[1], out=sums[1, begin : begin + _AT_ONCE])
    numbers = np.arange(row, row + len(words), dtype=np.uint64)
    pairs = zip(sums, _SEEDS, strict=True)
    return Digest(*(int((part * _mixed(numbers, ~seed & _MASK)).sum()) for part, seed in pairs))

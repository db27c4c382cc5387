"""Digests of a file, chunk by chunk, so that damage is found and can be named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from core.errors import CheckpointError

_HEX = 32
_SMALLEST_CHUNK, _LARGEST_CHUNK = 512, 2**30


@dataclass(frozen=True)
class Digests:
    """xxh3 digests (128 bits) of a file on a grid of chunks.

    They find bit flips, torn writes and mixed files; they are no protection against an attacker.

    Args:
        start: first byte that is covered; a header before it has a digest of its own.
        chunk: bytes of a grid cell; cell ``i`` begins at ``i * chunk``.
        size: bytes of the file.
        hashes: 32 hex digits for every cell with bytes from ``start`` on.
    """

    start: int
    chunk: int
    size: int
    hashes: tuple[str, ...]

    def ranges(self) -> Iterator[tuple[int, int, str]]:
        """First byte, end and digest of every chunk."""
        grid = cells(self.start, self.chunk, self.size)
        for (begin, end), found in zip(grid, self.hashes, strict=True):
            yield begin, end, found

    def as_json(self) -> dict[str, Any]:
        """JSON object."""
        return {
            "algorithm": "xxh3_128",
            "start": self.start,
            "chunk": self.chunk,
            "size": self.size,
            "hashes": list(self.hashes),
        }

    @classmethod
    def from_json(cls, value: Any) -> Digests:
        """Read what :meth:`as_json` gives.

        Raises:
            CheckpointError: when it is anything else.
        """
        try:
            start, chunk, size = (_whole(value[key]) for key in ("start", "chunk", "size"))
            hashes = tuple(value["hashes"])
            if value["algorithm"] != "xxh3_128":
                raise ValueError(f"unknown algorithm {value['algorithm']!r}")
            if not _SMALLEST_CHUNK <= chunk <= _LARGEST_CHUNK or start > size:
                raise ValueError(f"chunks of {chunk} bytes from {start} of {size}")
            if len(hashes) != count(start, chunk, size) or not all(map(_is_hash, hashes)):
                raise ValueError(f"{len(hashes)} digests for {count(start, chunk, size)} chunks")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError("damaged digests", why=str(error)) from None
        return cls(start, chunk, size, hashes)


def digest(*parts: memoryview | bytes) -> str:
    """xxh3 digest (128 bits, hex) of bytes in several parts."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def count(start: int, chunk: int, size: int) -> int:
    """Number of grid cells with bytes from ``start`` to ``size``."""
    return -(-size // chunk) - start // chunk if size > start else 0


def cells(start: int, chunk: int, size: int) -> Iterator[tuple[int, int]]:
    """First byte and end of every grid cell from ``start`` to ``size``."""
    for index in range(count(start, chunk, size)):
        begin = (start // chunk + index) * chunk
        yield max(begin, start), min(begin + chunk, size)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == _HEX and set(value) <= set("0123456789abcdef")

"""The header of a safetensors file, as it is written.

Layout (safetensors format): 8 bytes with the length of the rest, JSON, spaces, then the data without
a hole. ``__metadata__`` maps strings to strings, and there lie the Python tree, the digests of the
data and the digest of the header itself, so that stock readers read the file as any other.

A header is planned before its data are written and filled in afterwards: digests have a fixed width.
Until then its length field is zero, which every reader refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.checkpoints.safetensors import DTYPES
from core.errors import CheckpointError
from core_fastpersist.direct.digests import Digests, count, digest

VERSION = "1"
ALIGNMENT = 4096
METADATA = "__metadata__"
PREFIX = "fastpersist."
"""Of the keys in the metadata, and of tensors that no user named."""
READABLE: Mapping[str, torch.dtype] = {**DTYPES, "F8_E8M0": torch.float8_e8m0fnu}
"""dtypes that are read; the newest are not written, for older readers refuse a file with them."""

VERSION_KEY, TREE_KEY = PREFIX + "version", PREFIX + "tree"
DIGESTS_KEY, HEADER_KEY = PREFIX + "digests", PREFIX + "header"
LARGEST_HEADER = 100_000_000
NO_HASH = "0" * 32
"""Stands for the header's own digest while that is computed."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        name: its name.
        dtype: what the format calls its dtype.
        shape: elements in every dimension.
        begin: first byte, from the start of the data.
        end: byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Args:
        entries: the tensors, in the order of their bytes.
        metadata: the strings beside them.
        start: first byte of the data in the file.
        size: bytes of the file.
        tree: the Python tree as JSON; ``None`` in a shard, and in a file of another program.
        digests: digests of the data; ``None`` in a file of another program.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    start: int
    size: int
    tree: Any = None
    digests: Digests | None = None

    @property
    def ours(self) -> bool:
        """Whether this package wrote the file."""
        return self.digests is not None


@dataclass(frozen=True)
class Draft:
    """A header whose size is known, before the digests are.

    Args:
        entries: the tensors, in the order of their bytes.
        described: what the header says of them, as JSON without the braces.
        strings: what else stands in the metadata.
        start: first byte of the data in the file.
        size: bytes of the file.
        chunk: bytes of a digest's chunk.
    """

    entries: tuple[Entry, ...] = field(repr=False)
    described: str = field(repr=False)
    strings: Mapping[str, str] = field(repr=False)
    start: int
    size: int
    chunk: int

    def block(self, digests: Digests) -> bytes:
        """The bytes before the data.

        Args:
            digests: of the data, with this draft's start, chunk and size.
        """
        found = (digests.start, digests.chunk, digests.size)
        if found != (self.start, self.chunk, self.size):
            raise ValueError(f"digests of {found} for a header of {self}")
        text = _text(self.described, self.strings, digests).ljust(self.start - 8, b" ")
        zero = (self.start - 8).to_bytes(8, "little") + text
        key = f'"{HEADER_KEY}":"'.encode()
        return zero.replace(key + NO_HASH.encode(), key + digest(zero).encode(), 1)


def draft(
    entries: Sequence[Entry],
    tree: Any,
    *,
    chunk: int,
    residue: int = 0,
    alignment: int = ALIGNMENT,
    extra: Mapping[str, str] | None = None,
) -> Draft:
    """Plan the header of a file.

    Args:
        entries: the tensors, which cover the data without a hole, in the order of their bytes.
        tree: the Python tree as JSON; ``None`` for tensors only.
        chunk: bytes of a digest's chunk.
        residue: what the data's first byte shall be modulo ``alignment``; a multiple of 8.
        alignment: in bytes.
        extra: further strings for the metadata.

    Raises:
        CheckpointError: when the header is larger than the format allows.
    """
    described = _json(_describe(entries))[1:-1]
    strings = {**(extra or {}), **({} if tree is None else {TREE_KEY: _json(tree)})}
    data = entries[-1].end if entries else 0
    start = 0
    while True:
        none = (NO_HASH,) * count(start, chunk, start + data)
        digests = Digests(start, chunk, start + data, none)
        needed = 8 + len(_text(described, strings, digests))
        if start >= needed:
            break
        start = needed + (residue - needed) % alignment
    if start - 8 > LARGEST_HEADER:
        raise CheckpointError(
            f"the header of {len(entries):,} tensors is larger than safetensors allows",
            why=f"{start:,} bytes, and {LARGEST_HEADER:,} is the limit",
            fix="save fewer or larger objects, or as .pt",
        )
    return Draft(tuple(entries), described, strings, start, start + data, chunk)


def _text(described: str, strings: Mapping[str, str], digests: Digests) -> bytes:
    """JSON of a header whose own digest is left out."""
    metadata = {
        "format": "pt",
        VERSION_KEY: VERSION,
        HEADER_KEY: NO_HASH,
        DIGESTS_KEY: _json(digests.as_json()),
        **strings,
    }
    content = [f'"{METADATA}":{_json(metadata)}', *filter(None, [described])]
    return f"{{{','.join(content)}}}".encode("ascii")


def _describe(entries: Iterable[Entry]) -> dict[str, Any]:
    return {
        entry.name: {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (entry.begin, entry.end),
        }
        for entry in entries
    }


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)

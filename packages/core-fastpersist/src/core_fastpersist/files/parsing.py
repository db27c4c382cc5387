"""A parser of safetensors headers that trusts nothing, for files of this package and any other."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.disk import disk_errors
from core.errors import CheckpointError
from core_fastpersist.direct.digests import Digests, digest
from core_fastpersist.files.header import (
    DIGESTS_KEY,
    HEADER_KEY,
    LARGEST_HEADER,
    METADATA,
    NO_HASH,
    PREFIX,
    READABLE,
    TREE_KEY,
    VERSION,
    VERSION_KEY,
    Entry,
    Header,
)

_LARGEST_COUNT = 2**63 - 1
_MOST_DIMENSIONS = 64
_HASH = re.compile(r"[0-9a-f]{32}")


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, of this package or any other.

    Raises:
        CheckpointError: when it is damaged, hostile, unfinished, or does not fit the file's size.
    """
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise CheckpointError(f"{path} is no safetensors file", why=f"it has {size} bytes")
        if length == 0:
            raise CheckpointError(
                f"{path} was never finished",
                why="its header is empty: what wrote it was stopped",
                fix="use an older checkpoint",
            )
        if length > min(LARGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is damaged or no safetensors file",
                why=f"its header claims {length:,} bytes, and the file has {size:,}",
            )
        text = file.read(length)
    if len(text) != length:
        raise CheckpointError(f"{path} is truncated", why="it ends inside of its header")
    try:
        return parse(text, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.what}", why=error.why, fix=error.fix) from None
    except RecursionError:
        raise CheckpointError(f"{path} has a damaged header", why="it nests too deep") from None
    except (ValueError, KeyError, TypeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} has a damaged header", why=why) from None


def parse(text: bytes, size: int) -> Header:
    """Read the JSON of a header.

    Args:
        text: the bytes between the length field and the data.
        size: bytes of the whole file.

    Raises:
        CheckpointError: for digests that are none, or do not fit.
        ValueError, KeyError, TypeError, RecursionError: for anything else that is wrong.
    """
    start = 8 + len(text)
    header = parse_json(text.decode("utf-8"))
    if not isinstance(header, dict):
        raise TypeError("it is no JSON object")
    metadata = _metadata(header.pop(METADATA, {}))
    found = [_entry(name, value) for name, value in header.items()]
    entries = sorted(found, key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise ValueError(f"hole or overlap before {entry.name!r}")
        end = entry.end
    if start + end != size:
        raise ValueError(f"it describes {start + end:,} bytes, and the file has {size:,}")
    tree, digests = _own(metadata, text, start, size)
    return Header(tuple(entries), metadata, start, size, tree, digests)


def parse_json(text: str) -> Any:
    """Parse JSON without the liberties of Python's parser: no key twice, no NaN.

    Raises:
        ValueError: for anything that is no JSON.
        RecursionError: when it nests too deep.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _own(
    metadata: Mapping[str, str], text: bytes, start: int, size: int
) -> tuple[Any, Digests | None]:
    """Tree and digests of a file of this package, whose header must be as it was written."""
    if not any(key.startswith(PREFIX) for key in metadata):
        return None, None
    version = metadata.get(VERSION_KEY)
    expected = metadata.get(HEADER_KEY, "")
    if _HASH.fullmatch(expected) is None:
        raise CheckpointError("the header is damaged", why="its digest is missing")
    key = f'"{HEADER_KEY}":"'.encode()
    blank = text.replace(key + expected.encode(), key + NO_HASH.encode(), 1)
    actual = digest((start - 8).to_bytes(8, "little"), blank)
    if actual != expected:
        raise CheckpointError(
            "the header is damaged",
            why=f"its xxh3 is {actual}, and {expected} was written",
            fix="use an older checkpoint",
        )
    if version != VERSION:
        raise CheckpointError(
            f"the file has format version {version}",
            why=f"this version of core-fastpersist reads {VERSION}",
            fix="update core-fastpersist, or read it as plain safetensors",
        )
    digests = Digests.from_json(parse_json(metadata[DIGESTS_KEY]))
    if (digests.start, digests.size) != (start, size):
        raise CheckpointError("the digests are of another file")
    if TREE_KEY not in metadata:  # a shard, whose tensors have no other structure than their names
        return None, digests
    tree = parse_json(metadata[TREE_KEY])
    if not isinstance(tree, dict) or set(tree) != {"root", "pickles"}:
        raise TypeError("its tree is none")
    return tree, digests


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TypeError("its metadata are no strings")
    return value


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise TypeError(f"{name!r} is described by something else than dtype, shape and offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in READABLE:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    shape = tuple(whole(size) for size in _list(value["shape"]))
    begin, end = (whole(offset) for offset in _list(value["data_offsets"]))
    if begin > end:
        raise ValueError(f"{name!r} ends before it begins")
    if len(shape) > _MOST_DIMENSIONS or math.prod(filter(None, shape)) > _LARGEST_COUNT:
        raise ValueError(f"{name!r} has an impossible shape")
    if math.prod(shape) * READABLE[dtype].itemsize != end - begin:
        raise ValueError(f"{name!r} of {dtype} {list(shape)} cannot have {end - begin:,} bytes")
    return Entry(name, dtype, shape, begin, end)


def whole(value: Any) -> int:
    """A size or offset from JSON.

    Raises:
        ValueError: when it is none, or more than any memory holds.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST_COUNT:
        raise ValueError(f"{str(value)[:40]!r} is no size")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

"""Reading a file into tensors that are there already."""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import CheckpointError
from core_fastpersist.direct.alignment import alignment_of
from core_fastpersist.direct.digests import Digests, cells
from core_fastpersist.direct.memory import buffer
from core_fastpersist.direct.reading import DirectFile, in_parallel, read_file, require_digest
from core_fastpersist.files.header import ALIGNMENT, Entry, Header
from core_fastpersist.files.leaves import Record
from core_fastpersist.files.restoring import Restorer, described
from core_fastpersist.files.scalars import Encoded
from core_fastpersist.files.tree import leaf_pairs
from core_fastpersist.files.views import as_bytes, bits

_SMALLEST_STRAIGHT = 2**20
_STEP = 16 * 2**20
_THREADS = 4

Reads = Callable[[Mapping[str, Tensor]], None]
"""Fills uint8 tensors with the bytes of the stored tensors of these names."""


class Live:
    """The tensors of a live tree, and which stored bytes each of them needs.

    Args:
        root: the encoded tree.
        into: a tree of the same structure.
        entries: the stored tensors by name.

    Raises:
        CheckpointError: where the structures, a shape or a dtype differ.
    """

    def __init__(self, root: Encoded, into: Any, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._objects: dict[int, Any] = {}
        self._claimed: dict[str, Tensor] = {}
        self._later: list[tuple[Tensor, Record]] = []
        for encoded, live in leaf_pairs(root, into):
            self._objects[id(encoded)] = live
            self._add(_record(encoded), live)

    def fill(self, read: Reads) -> Callable[[str], Tensor]:
        """Fill the tree.

        Returns:
            what gives the bytes of any stored tensor.
        """
        data = dict(self._claimed)
        for name, entry in self._entries.items():
            if name not in data:
                data[name] = torch.empty(entry.nbytes, dtype=torch.uint8)
        read(data)
        restorer = Restorer(self._entries, data.__getitem__)
        for target, record in self._later:
            value = restorer.leaf(record)
            if target.is_conj() or target.is_neg():
                target.copy_(value)
            else:
                bits(target).copy_(bits(value))
        return data.__getitem__

    def leaf(self, encoded: Encoded) -> Any:
        """The live object of an encoded leaf."""
        return self._objects[id(encoded)]

    def _add(self, record: Record, live: Any) -> None:
        entry, dtype, shape = described(self._entries, record)
        target = _target(entry.name, live)
        if target.dtype != dtype or tuple(target.shape) != shape:
            raise CheckpointError(
                f"{entry.name!r} does not fit `into`",
                why=f"the file has {dtype} {list(shape)}, `into` {target.dtype} "
                f"{list(target.shape)}",
            )
        plain = record.keys() <= {"tensor", "dtype", "shape"} and entry.nbytes == target.nbytes
        ready = target.device.type == "cpu" and target.is_contiguous()
        lazy = target.is_conj() or target.is_neg() or entry.name in self._claimed
        if plain and ready and not lazy:
            self._claimed[entry.name] = as_bytes(target)
        else:
            self._later.append((target, record))


def fill(path: Path, header: Header, targets: Mapping[str, Tensor], *, verify: bool) -> None:
    """Read the data of a file into tensors.

    Stretches of memory that are congruent with the file are read straight into; the rest goes
    through a buffer. With digests the whole file is checked.

    Args:
        path: the file.
        header: its header.
        targets: uint8 of shape (nbytes,) in host memory for every stored tensor.
        verify: whether the digests of the file are held against the data.
    """
    digests = header.digests if verify else None
    stretches = list(_stretches(header, targets))
    grid = _Grid.of(header, digests)
    modulus = alignment_of(path.parent).memory
    done: list[tuple[int, int]] = []
    for stretch in stretches:
        begin, end = grid.inside(stretch.begin, stretch.end)
        congruent = (stretch.address - stretch.begin) % modulus == 0
        if congruent and end - begin >= _SMALLEST_STRAIGHT:
            read_file(path, stretch.view(begin, end), offset=begin, digests=digests)
            done.append((begin, end))
    expected = {b: found for b, _, found in digests.ranges()} if digests else {}
    with DirectFile(path) as file:

        def read(cell: tuple[int, int]) -> None:
            begin, end = cell
            lead = begin % ALIGNMENT
            with buffer(grid.step + ALIGNMENT) as memory:
                window = memory[lead : lead + end - begin]
                file.read_into(begin, window)
                if begin in expected:
                    require_digest(path, begin, window, expected[begin])
                _scatter(window, begin, stretches)

        in_parallel(read, grid.outside(done), threads=_THREADS)


@dataclass(frozen=True)
class _Stretch:
    """Neighbours in the file whose targets are neighbours in memory."""

    begin: int
    end: int
    address: int

    def view(self, begin: int, end: int) -> memoryview:
        memory = (ctypes.c_ubyte * (end - begin)).from_address(self.address + begin - self.begin)
        return memoryview(memory).cast("B")


@dataclass(frozen=True)
class _Grid:
    """Cells of a file that are read as a whole."""

    edges: Sequence[int]
    step: int

    @classmethod
    def of(cls, header: Header, digests: Digests | None) -> _Grid:
        step = _STEP if digests is None else digests.chunk
        ends = (end for _, end in cells(header.start, step, header.size))
        return cls([header.start, *ends], step)

    def inside(self, begin: int, end: int) -> tuple[int, int]:
        """The cells that lie wholly in a range."""
        first, last = bisect_left(self.edges, begin), bisect_right(self.edges, end) - 1
        return (self.edges[first], self.edges[last]) if first < last else (begin, begin)

    def outside(self, done: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The cells that lie in none of some ranges of cells."""
        ranges = iter([*done, (self.edges[-1], self.edges[-1])])
        begin, end = next(ranges)
        for cell in pairwise(self.edges):
            while cell[0] >= end and end < self.edges[-1]:
                begin, end = next(ranges)
            if cell[0] < begin:
                yield cell


def _stretches(header: Header, targets: Mapping[str, Tensor]) -> Iterator[_Stretch]:
    found: _Stretch | None = None
    for entry in header.entries:
        if entry.nbytes == 0:
            continue
        begin, end = header.start + entry.begin, header.start + entry.end
        address = targets[entry.name].data_ptr()
        if found is not None and address - begin == found.address - found.begin:
            found = _Stretch(found.begin, end, found.address)
            continue
        if found is not None:
            yield found
        found = _Stretch(begin, end, address)
    if found is not None:
        yield found


def _scatter(window: memoryview, start: int, stretches: Sequence[_Stretch]) -> None:
    stop = start + window.nbytes
    index = bisect_right(stretches, start, key=lambda stretch: stretch.end)
    for stretch in stretches[index:]:
        if stretch.begin >= stop:
            return
        begin, end = max(stretch.begin, start), min(stretch.end, stop)
        target = np.frombuffer(stretch.view(begin, end), dtype=np.uint8)
        np.copyto(target, np.frombuffer(window[begin - start : end - start], dtype=np.uint8))


def _record(encoded: Encoded) -> Record:
    found: Record = encoded.get("array") or encoded.get("parameter") or encoded
    return found


def _target(name: str, live: Any) -> Tensor:
    if isinstance(live, np.ndarray):
        if not live.flags.writeable or any(step < 0 for step in live.strides):
            raise CheckpointError(f"cannot fill the array {name!r} in place")
        return torch.from_numpy(live)
    if type(live) not in (Tensor, torch.nn.Parameter) or live.layout != torch.strided:
        raise CheckpointError(f"cannot fill {name!r}", why=f"`into` has a {type(live).__name__}")
    if live.device.type == "meta":
        raise CheckpointError(f"cannot fill {name!r}", why="`into` has it on the meta device")
    plain: Tensor = live.detach()
    return plain

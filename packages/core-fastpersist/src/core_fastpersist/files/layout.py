"""Where every tensor lies in the file: in an order that lets most bytes go straight from memory.

Direct I/O needs memory address and file offset congruent modulo the alignment. Tensors that follow one
another in memory follow one another in the file, and the data begin at the residue that most bytes have.
Every tensor begins at a multiple of its own alignment, though the format allows no padding between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from core_fastpersist.files.leaves import Stored

_WIDEST = 16
"""Bytes of the largest element."""


@dataclass(frozen=True)
class Run:
    """Stored tensors that follow one another in memory.

    Args:
        parts: in the order of their addresses.
        address: of the first byte; ``None`` where the bytes are not in host memory as they are stored.
    """

    parts: tuple[Stored, ...]
    address: int | None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parts in the file."""
        return sum(part.nbytes for part in self.parts)


def in_place(stored: Stored) -> bool:
    """Whether the bytes lie in host memory as they are stored."""
    return stored.data.device.type == "cpu" and stored.data.is_contiguous()


def arrange(tensors: Sequence[Stored], modulus: int) -> tuple[list[Run], int]:
    """Order tensors for a file.

    Args:
        tensors: all of the file.
        modulus: bytes modulo which addresses and file offsets should be congruent; a power of two.

    Returns:
        runs in the order of the file, and what the first byte of the data should be modulo
        ``modulus``. Runs whose size is a multiple of 16 come first, so that any may follow any, then
        single tensors from the widest elements to the narrowest.
    """
    runs, rest = _runs([t for t in tensors if in_place(t) and t.nbytes])
    rest += [t for t in tensors if not (in_place(t) and t.nbytes)]
    weights: Counter[int] = Counter()
    for run in runs:
        weights[(run.address or 0) % modulus] += run.nbytes
    residue = max(weights, key=lambda key: (weights[key], -key), default=0)

    def order(run: Run) -> tuple[bool, bool, int, int]:
        congruent = (run.address or 0) % modulus == residue
        return not congruent, run.nbytes % modulus != 0, -run.nbytes, run.address or 0

    singles = sorted(rest, key=lambda t: (-t.align, not in_place(t), t.data.data_ptr()))
    last = [Run((t,), t.data.data_ptr() if in_place(t) else None) for t in singles]
    return _joined([*sorted(runs, key=order), *last]), residue


def _runs(tensors: Sequence[Stored]) -> tuple[list[Run], list[Stored]]:
    """Runs whose size is a multiple of 16, and what is left."""
    runs: list[Run] = []
    rest: list[Stored] = []
    for parts in _neighbours(sorted(tensors, key=lambda t: t.data.data_ptr())):
        address = parts[0].data.data_ptr()
        size = sum(part.nbytes for part in parts)
        while parts and (size % _WIDEST or address % _WIDEST):
            rest.append(parts.pop())
            size -= rest[-1].nbytes
        if parts:
            runs.append(Run(tuple(parts), address))
    return runs, rest


def _neighbours(tensors: Sequence[Stored]) -> Iterator[list[Stored]]:
    """Cut a sorted sequence where one tensor does not begin at the end of the one before it."""
    group: list[Stored] = []
    for tensor in tensors:
        begin = tensor.data.data_ptr()
        if group and not (_follows(group[-1], tensor) and begin % tensor.align == 0):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _follows(before: Stored, after: Stored) -> bool:
    end = before.data.data_ptr() + before.nbytes
    return before.data.nbytes == before.nbytes and end == after.data.data_ptr()


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbours in the file that are neighbours in memory, too, as one run."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is None or run.address is None or last.address is None:
            found.append(run)
        elif _follows(last.parts[-1], run.parts[0]):
            found[-1] = Run((*last.parts, *run.parts), last.address)
        else:
            found.append(run)
    return found

"""Flat buffers that parameters lie in one after the other, cut over ranks: ZeRO, FSDP1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from core.errors import CheckpointError
from core_ucp.view.boxes import Table
from core_ucp.view.pieces import Pieces


class Span(NamedTuple):
    """Elements of a parameter that a rank holds.

    Attributes:
        parameter: its name.
        begin: first of its row-major elements.
        end: element behind the last.
        place: of the first one in the flat buffer of the rank, in elements.
    """

    parameter: str
    begin: int
    end: int
    place: int


@dataclass(frozen=True, eq=False)
class Spans:
    """What all ranks hold of all parameters of a flat buffer.

    Attributes:
        names: of the parameters.
        parameter: index of the parameter of each span, shape ``(n,)``.
        rank: that holds it, shape ``(n,)``.
        begin: first element, shape ``(n,)``.
        end: element behind the last, shape ``(n,)``.
        place: of the first one in the flat buffer of the rank, in elements, shape ``(n,)``.
        length: elements of the buffer of every rank, padding included, shape ``(ranks,)``.
        padding: elements of it that belong to no parameter, shape ``(ranks,)``.
    """

    names: tuple[str, ...]
    parameter: Table
    rank: Table
    begin: Table
    end: Table
    place: Table
    length: Table
    padding: Table

    def of(self, rank: int) -> list[Span]:
        """What one rank holds, in the order of its buffer."""
        rows = np.flatnonzero(self.rank == rank)
        rows = rows[np.argsort(self.place[rows], kind="stable")]
        columns = (self.parameter, self.begin, self.end, self.place)
        picked = zip(*(column[rows].tolist() for column in columns), strict=True)
        return [Span(self.names[index], *numbers) for index, *numbers in picked]

    def pieces(
        self, shapes: Mapping[str, Sequence[int]], file: Table, offset: Table, itemsize: int
    ) -> dict[str, Pieces]:
        """Where all parameters lie, by name.

        Args:
            shapes: of the parameters.
            file: index of the file of every rank's buffer, shape ``(ranks,)``.
            offset: byte where it begins, shape ``(ranks,)``.
            itemsize: bytes of an element.
        """
        order = np.argsort(self.parameter, kind="stable")
        bounds = np.searchsorted(self.parameter[order], np.arange(len(self.names) + 1))
        # Most parameters have the shape of others, and are placed along with them.
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, name in enumerate(self.names):
            alike.setdefault(tuple(shapes[name]), []).append(index)
        found: dict[str, Pieces] = {}
        for shape, indices in alike.items():
            rows = np.concatenate([order[bounds[i] : bounds[i + 1]] for i in indices])
            rank = self.rank[rows]
            places = offset[rank] + self.place[rows] * itemsize
            row, pieces = Pieces.ranges(
                shape, self.begin[rows], self.end[rows], file[rank], places, itemsize
            )
            cuts = np.searchsorted(self.parameter[rows][row], [*indices, len(self.names)]).tolist()
            for index, cut in zip(indices, pairwise(cuts), strict=True):
                found[self.names[index]] = pieces.take(slice(*cut))
        return {name: found[name] for name in self.names}


@dataclass(frozen=True)
class FlatGroup:
    """One flat vector of all parameters, of which ranks hold equal parts: ZeRO stages 1 and 2.

    The vector is padded at its end until every part is of the same length, and aligned.

    Args:
        order: names of the parameters.
        align: the padded vector is a multiple of this times the number of ranks; DeepSpeed aligns
            parts to 4 bytes, which are 2 elements of half precision.
        parameter_align: elements that every parameter is padded to a multiple of, DeepSpeed's
            ``parameter_alignment``; the padding belongs to no parameter.
    """

    order: tuple[str, ...]
    align: int = 2
    parameter_align: int = 1

    def spans(self, numels: Mapping[str, int], ranks: int) -> Spans:
        """What ranks hold.

        Args:
            numels: elements of the parameters, by name.
            ranks: number of ranks that share the vector.

        Raises:
            CheckpointError: when the order names another set of parameters.
        """
        numel = _numels(self.order, numels)
        taken = -(-numel // self.parameter_align) * self.parameter_align
        # Padding aligns what comes next: there is none behind the last parameter.
        taken[-1:] = numel[-1:]
        first = np.cumsum(taken) - taken
        unit = self.align * ranks
        part = -(-int(taken.sum()) // unit) * unit // ranks
        # The ranks of a parameter are consecutive, from that of its first element to its last's.
        low = first // max(1, part)
        high = np.where(numel > 0, (first + numel - 1) // max(1, part), low - 1)
        counts = high - low + 1
        parameter = np.repeat(np.arange(len(numel), dtype=np.int64), counts)
        rank = np.arange(len(parameter), dtype=np.int64)
        rank += np.repeat(low - (np.cumsum(counts) - counts), counts)
        origin = first[parameter]
        begin = np.maximum(rank * part - origin, 0)
        end = np.minimum((rank + 1) * part - origin, numel[parameter])
        place = origin + begin - rank * part
        length = np.full(ranks, part, np.int64)
        return _spans(self.order, parameter, rank, begin, end, place, length)


@dataclass(frozen=True)
class FlatParam:
    """Every parameter is a vector of its own, of which ranks hold equal parts: ZeRO stage 3.

    Parts are the rounded-up share, padded with zeros, and lie one after the other.

    Args:
        order: names of the parameters of one sub-group.
        align: elements that every part is padded to a multiple of.
    """

    order: tuple[str, ...]
    align: int = 1

    def spans(self, numels: Mapping[str, int], ranks: int) -> Spans:
        """What ranks hold, see :meth:`FlatGroup.spans`."""
        numel = _numels(self.order, numels)
        part = -(-numel // (ranks * self.align)) * self.align
        place = np.cumsum(part) - part
        parameter = np.tile(np.arange(len(numel), dtype=np.int64), ranks)
        rank = np.repeat(np.arange(ranks, dtype=np.int64), len(numel))
        begin = rank * part[parameter]
        end = np.minimum(begin + part[parameter], numel[parameter])
        kept = end > begin
        parameter, rank = parameter[kept], rank[kept]
        length = np.full(ranks, part.sum(), np.int64)
        return _spans(self.order, parameter, rank, begin[kept], end[kept], place[parameter], length)


def _spans(
    names: tuple[str, ...],
    parameter: Table,
    rank: Table,
    begin: Table,
    end: Table,
    place: Table,
    length: Table,
) -> Spans:
    held = np.bincount(rank, end - begin, len(length)).astype(np.int64)
    return Spans(names, parameter, rank, begin, end, place, length, length - held)


def _numels(order: tuple[str, ...], numels: Mapping[str, int]) -> Table:
    if len(set(order)) != len(order) or set(order) != set(numels):
        odd = sorted(set(order) ^ set(numels)) or sorted(
            name for name in set(order) if order.count(name) > 1
        )
        raise CheckpointError(f"a flat buffer does not hold {odd[0]} exactly once")
    return np.array([numels[name] for name in order], np.int64)

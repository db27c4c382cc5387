"""What every lane knows of its chunks: their sizes, which are there, and which are out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import CoreError


class Books:
    """Checks calls of a lane, so that a wrong one fails here and not as a wrong number.

    Args:
        name: of the lane.
        edges: as for :meth:`Store.lane`.
        dim: as for :meth:`Store.lane`.
        dtype: as for :meth:`Store.lane`.
    """

    def __init__(
        self, name: str, edges: Sequence[int], dim: int, dtype: torch.dtype | None
    ) -> None:
        self.name = name
        self.edges = tuple(edges)
        self.there: set[int] = set()
        self.out: Counter[int] = Counter()
        self._spans: dict[int, list[range]] = {}
        self.closed = False
        self._dim = dim
        self._dtype = dtype
        self._like: tuple[int, ...] = ()
        if self.edges[:1] != (0,) or any(b <= a for a, b in itertools.pairwise(edges)):
            raise ValueError(f"the edges of {name} must begin with 0 and grow: {self.edges}")

    @property
    def dtype(self) -> torch.dtype:
        """What chunks are kept in; known from the first one on."""
        assert self._dtype is not None
        return self._dtype

    @property
    def dim(self) -> int:
        """Dimension of the sequence, counted from the front; known from the first chunk on."""
        return self._dim % len(self._like)

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of one token of the sequence; known from the first chunk on."""
        return self._like[: self.dim] + self._like[self.dim + 1 :]

    def nbytes(self, first: int, last: int) -> int:
        """Bytes of chunks ``[first, last)``."""
        tokens = self.edges[last] - self.edges[first]
        return tokens * math.prod(self.row) * self.dtype.itemsize

    def largest(self) -> int:
        """Bytes of the largest chunk."""
        return max(self.nbytes(index, index + 1) for index in range(len(self.edges) - 1))

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of a chunk."""
        return self._shape(index, index + 1)

    def accept(self, chunk: Tensor, first: int, last: int) -> None:
        """Check a chunk that is put, or added to chunks ``[first, last)``.

        Raises:
            CoreError: for a lane that is closed.
            IndexError: for a chunk beyond the sequence.
            ValueError: for one of another size than its place has, or that is out.
        """
        if self.closed:
            raise CoreError(f"the lane {self.name} is closed")
        if not 0 <= first < last < len(self.edges):
            raise IndexError(f"{self.name} has no chunks [{first}, {last})")
        if not self._like:
            self._like = tuple(chunk.shape)
            self._dtype = self._dtype or chunk.dtype
        wanted = self._shape(first, last)
        if tuple(chunk.shape) != wanted:
            raise ValueError(
                f"chunk {first} of {self.name} has shape {tuple(chunk.shape)}, its place {wanted}"
            )
        for index in range(first, last):
            if self.out[index]:
                raise ValueError(f"chunk {index} of {self.name} is out")

    def single(self, first: int, last: int | None) -> None:
        """Refuse more than one chunk, in a lane that is not whole.

        Raises:
            ValueError: for a range.
        """
        if last not in (None, first + 1):
            raise ValueError(f"{self.name} gives one chunk at a time, not [{first}, {last})")

    def lend(self, first: int, last: int) -> None:
        """Note that chunks ``[first, last)`` are out.

        Raises:
            KeyError: for a chunk that is not there.
        """
        span = range(first, max(last, first + 1))
        for index in span:
            if index not in self.there:
                raise KeyError(f"chunk {index} of {self.name} is not there")
        self._spans.setdefault(first, []).append(span)
        self.out.update(span)

    def give_back(self, first: int) -> bool:
        """Note that what was got last from ``first`` on is back; tells whether anything was out."""
        spans = self._spans.get(first)
        if not spans:
            return False
        self.out.subtract(index for index in spans.pop() if self.out[index])
        return True

    def forget(self, index: int) -> None:
        """Note that a chunk is gone."""
        self.there.discard(index)
        self.out.pop(index, None)
        self._spans.pop(index, None)

    def close(self) -> None:
        """Note that all are gone, for good."""
        self.there.clear()
        self.out.clear()
        self._spans.clear()
        self.closed = True

    def _shape(self, first: int, last: int) -> tuple[int, ...]:
        tokens = self.edges[last] - self.edges[first]
        return (*self._like[: self.dim], tokens, *self._like[self.dim + 1 :])

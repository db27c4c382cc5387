"""A lane that lies in one piece, on the device or in a file that is mapped: ranges are views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from core_fpdt.store.books import Books


class Room(Protocol):
    """Bytes for one lane."""

    @property
    def data(self) -> Tensor:
        """All of them, uint8."""
        ...

    def reserve(self, begin: int, end: int) -> None:
        """Make sure that bytes which were forgotten can be written again."""
        ...

    def forget(self, begin: int, end: int) -> None:
        """Give back the memory of some bytes, as far as possible; what they hold is lost."""
        ...

    def soon(self, begin: int, end: int) -> None:
        """Some bytes are going to be read."""
        ...


class WholeLane:
    """A lane in one piece of memory, allocated with the first chunk.

    Args:
        books: what the lane has.
        make: makes room of so many bytes.
    """

    def __init__(self, books: Books, make: Callable[[int], Room]) -> None:
        self._books = books
        self._make = make
        self._room: Room | None = None
        self._tokens: Tensor | None = None
        self._dropped: set[int] = set()

    @property
    def whole(self) -> bool:
        return True

    def put(self, index: int, chunk: Tensor) -> None:
        self._books.accept(chunk, index, index + 1)
        self._target(index, index + 1).copy_(chunk.detach())
        self._books.there.add(index)

    def prefetch(self, index: int) -> None:
        if self._room is not None and index in self._books.there:
            self._room.soon(*self._bytes(index))

    def get(self, first: int, last: int | None = None) -> Tensor:
        last = first + 1 if last is None else last
        self._books.lend(first, last)
        # Not detach(): other chunks are written while autograd holds this one, and both would share
        # one version.
        return self._target(first, last).data

    def done(self, first: int) -> None:
        self._books.give_back(first)

    def add(self, first: int, chunk: Tensor, last: int | None = None) -> None:
        last = first + 1 if last is None else last
        self._books.accept(chunk, first, last)
        target, new = self._target(first, last), set(range(first, last)) - self._books.there
        if len(new) == last - first:
            target.copy_(chunk.detach())
        else:
            for index in new:
                self._target(index, index + 1).zero_()
            target.add_(chunk.detach())
        self._books.there |= new

    def drop(self, index: int) -> None:
        if self._room is not None and index in self._books.there:
            self._room.forget(*self._bytes(index))
            self._dropped.add(index)
        self._books.forget(index)

    def close(self) -> None:
        self._books.close()
        self._room = self._tokens = None

    def _target(self, first: int, last: int) -> Tensor:
        if self._tokens is None:
            self._allocate()
        assert self._tokens is not None
        assert self._room is not None
        for index in self._dropped.intersection(range(first, last)):
            self._room.reserve(*self._bytes(index))
            self._dropped.remove(index)
        edges = self._books.edges
        return self._tokens[edges[first] : edges[last]].movedim(0, self._books.dim)

    def _allocate(self) -> None:
        # The sequence is the outermost dimension, so that a chunk lies in pages of its own.
        books = self._books
        nbytes = books.nbytes(0, len(books.edges) - 1)
        with torch.inference_mode(False):
            self._room = self._make(nbytes)
            flat = self._room.data[:nbytes].view(books.dtype)
            self._tokens = flat.view(books.edges[-1], *books.row)

    def _bytes(self, index: int) -> tuple[int, int]:
        return self._books.nbytes(0, index), self._books.nbytes(0, index + 1)

"""Chunks stay on the device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from core_fpdt.store.books import Books
from core_fpdt.store.contract import Lane
from core_fpdt.store.counters import Counters
from core_fpdt.store.whole import WholeLane


class ResidentStore:
    """Chunks stay where they are made: on CPUs, and where a device has room for all of them.

    Args:
        device: of the chunks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters = Counters()
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()

    @property
    def offloads(self) -> bool:
        return False

    def lane(
        self,
        name: str,
        edges: Sequence[int],
        *,
        dim: int,
        dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> Lane:
        books = Books(name, edges, dim, dtype)
        lane: Lane = WholeLane(books, self._room) if whole else PieceLane(books)
        self._lanes.add(lane)
        return lane

    def used(self) -> int:
        return self.counters.used

    def close(self) -> None:
        for lane in list(self._lanes):
            lane.close()

    def _room(self, nbytes: int) -> DeviceRoom:
        return DeviceRoom(torch.empty(nbytes, dtype=torch.uint8, device=self.device))


class DeviceRoom:
    """Memory of the device, which goes back in one piece."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def reserve(self, begin: int, end: int) -> None:
        """It was never given back."""

    def forget(self, begin: int, end: int) -> None:
        """It cannot be given back in parts."""

    def soon(self, begin: int, end: int) -> None:
        """It is there."""


class PieceLane:
    """A lane of single tensors, whose memory goes back with every chunk that is dropped.

    Args:
        books: what the lane has.
    """

    def __init__(self, books: Books) -> None:
        self._books = books
        self._pieces: dict[int, Tensor] = {}

    @property
    def whole(self) -> bool:
        return False

    def put(self, index: int, chunk: Tensor) -> None:
        self._books.accept(chunk, index, index + 1)
        self._keep(index, chunk)

    def prefetch(self, index: int) -> None:
        """It is there."""

    def get(self, first: int, last: int | None = None) -> Tensor:
        self._books.single(first, last)
        self._books.lend(first, first + 1)
        return self._pieces[first].data

    def done(self, first: int) -> None:
        self._books.give_back(first)

    def add(self, first: int, chunk: Tensor, last: int | None = None) -> None:
        self._books.single(first, last)
        self._books.accept(chunk, first, first + 1)
        if first in self._pieces:
            self._pieces[first].add_(chunk.detach())
        else:
            self._keep(first, chunk)

    def drop(self, index: int) -> None:
        self._books.forget(index)
        self._pieces.pop(index, None)

    def close(self) -> None:
        self._books.close()
        self._pieces.clear()

    def _keep(self, index: int, chunk: Tensor) -> None:
        with torch.inference_mode(False):
            piece = torch.empty(chunk.shape, dtype=self._books.dtype, device=chunk.device)
            piece.copy_(chunk.detach())
        self._pieces[index] = piece
        self._books.there.add(index)

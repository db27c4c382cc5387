"""Memory outside of the device, carved from large regions into blocks of exactly the wanted size.

Page-locked memory is slow to get, and torch's own allocator rounds each block up to a power of two.
Chunks have few sizes and come back in every layer and step, so a region holds blocks of one size,
which are used again and again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.errors import CoreError
from core_fpdt.store.budget import Budget
from core_fpdt.store.counters import Counters
from core_fpdt.store.transport import Area

_ALIGNMENT = 256
REGION = 64 * 2**20
"""Bytes of a region by default."""


@dataclass(frozen=True)
class Region:
    """Memory that is got and given back in one piece.

    Args:
        data: (n,) uint8.
        free: gives it back.
    """

    data: Tensor
    free: Callable[[], None]


MakeRegion = Callable[[int], Region]
"""Makes a region of so many bytes."""


@dataclass(eq=False)
class _Slab:
    region: Region
    size: int
    areas: list[Area]
    free: list[Area] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(self.areas)

    def release(self) -> None:
        for area in self.areas:
            for event in area.before_writing():
                event.synchronize()
        self.region.free()


class Slabs:
    """Blocks of host memory.

    Args:
        make: makes its regions.
        budget: of all regions together.
        counters: what is in use is counted there.
        region: bytes of a region, unless one block takes more.
    """

    def __init__(
        self,
        make: MakeRegion,
        budget: Budget,
        counters: Counters,
        region: int = REGION,
    ) -> None:
        self._make = make
        self._budget = budget
        self._counters = counters
        self._region = region
        self._slabs: list[_Slab] = []
        self._owner: dict[Area, _Slab] = {}
        weakref.finalize(self, _release_all, self._slabs).atexit = False

    @property
    def reserved(self) -> int:
        """Bytes of all regions."""
        return sum(slab.region.data.nbytes for slab in self._slabs)

    def take(self, nbytes: int) -> Area:
        """A block; who writes to it waits for what it was used for before.

        Raises:
            CoreError: when the limit is reached, with the numbers.
        """
        size = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        slab = next((s for s in self._slabs if s.size == size and s.free), None)
        slab = slab or self._grow(size)
        area = slab.free.pop()
        self._owner[area] = slab
        self._counters.take(size)
        return area

    def give(self, area: Area) -> None:
        """Give a block back; work that is queued may still use it."""
        slab = self._owner.pop(area)
        slab.free.append(area)
        self._counters.take(-slab.size)

    def close(self) -> None:
        """Give back all regions without a block in use."""
        self._shrink()

    def _grow(self, size: int) -> _Slab:
        wanted = max(self._region // size, 1) * size
        if self.reserved + wanted > self._budget.available:
            self._shrink()
        room = (self._budget.available - self.reserved) // size * size
        if room < size:
            raise CoreError(
                f"{self._budget.where} has no room for {size:,} more bytes of chunks",
                why=f"{self._counters.used:,} of {self._budget.available:,} bytes are in use",
                fix=f"take a shorter sequence, or {self._budget.fix}",
            )
        with torch.inference_mode(False):
            region = self._make(min(wanted, room))
        ends = range(size, region.data.nbytes + 1, size)
        slab = _Slab(region, size, [Area(region.data[end - size : end]) for end in ends])
        self._slabs.append(slab)
        return slab

    def _shrink(self) -> None:
        for slab in [s for s in self._slabs if len(s.free) == len(s.areas)]:
            self._slabs.remove(slab)
            slab.release()


def _release_all(slabs: list[_Slab]) -> None:
    for slab in slabs:
        slab.release()

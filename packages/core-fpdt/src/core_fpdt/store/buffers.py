"""Memory of the device for chunks that are on their way: a few buffers for each kind of lane."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from core_fpdt.store.transport import Area, Queue, Transport

DEPTH = 3
"""Buffers of a kind: one is read, one is filled, one is written back."""

Kind = tuple[str, int]
"""Name of a lane, and the bytes of its largest chunk: layers have the same ones."""


@dataclass(eq=False)
class Slot:
    """A chunk that is on the device, or on its way there.

    Args:
        index: of the chunk.
        area: where it is.
        write_back: copies it out, if what is outside is older.
        leave: forgets that it is on the device.
        readers: how often it is out.
        dirty: what is outside is older.
    """

    index: int
    area: Area
    write_back: Callable[[Slot], None]
    leave: Callable[[Slot], None]
    readers: int = 0
    dirty: bool = False


@dataclass
class _Shelf:
    free: deque[Area] = field(default_factory=deque[Area])
    idle: dict[Slot, None] = field(default_factory=dict[Slot, None])
    count: int = 0
    lanes: int = 0


class Buffers:
    """Buffers by kind. Those of a kind go back to the device when its last lane is closed.

    Args:
        transport: where they are.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._shelves: dict[Kind, _Shelf] = {}

    def held(self) -> int:
        """Bytes of the device in all buffers."""
        return sum(kind[1] * shelf.count for kind, shelf in self._shelves.items())

    def open(self, kind: Kind) -> None:
        """A lane is going to need buffers."""
        self._shelves.setdefault(kind, _Shelf()).lanes += 1

    def close(self, kind: Kind) -> None:
        """A lane has given back all it had."""
        shelf = self._shelves[kind]
        shelf.lanes -= 1
        if not shelf.lanes:
            del self._shelves[kind]
            for area in shelf.free:
                self._transport.free(area)

    def take(self, kind: Kind) -> Area:
        """A buffer; who writes to it waits for what it was used for before.

        What nobody reads makes room first. When every buffer is read or was asked for, there is one
        more.
        """
        shelf = self._shelves[kind]
        for area in shelf.free:
            if all(event.query() for event in area.before_writing()):
                shelf.free.remove(area)
                return area
        if shelf.count >= DEPTH:
            if shelf.free:
                return shelf.free.popleft()
            if shelf.idle:
                return self._evict(shelf)
        # A buffer that is made while generating serves training later.
        with torch.inference_mode(False):
            area = Area(self._transport.buffer(kind[1]))
        # Work that had this memory before may still be queued, and copies run beside it.
        area.was_written(self._transport.record(Queue.COMPUTE))
        shelf.count += 1
        return area

    def give(self, kind: Kind, area: Area) -> None:
        """Give a buffer back; work that is queued may still use it."""
        shelf = self._shelves[kind]
        self._transport.spoil(area)
        if shelf.count > DEPTH:
            shelf.count -= 1
            self._transport.free(area)
        else:
            shelf.free.append(area)

    def rest(self, kind: Kind, slot: Slot) -> None:
        """Nobody reads a slot for now: it may have to make room."""
        self._shelves[kind].idle[slot] = None

    def wake(self, kind: Kind, slot: Slot) -> None:
        """A slot is wanted."""
        self._shelves[kind].idle.pop(slot, None)

    def _evict(self, shelf: _Shelf) -> Area:
        slot = next(iter(shelf.idle))
        if slot.dirty:
            slot.write_back(slot)
        del shelf.idle[slot]
        slot.leave(slot)
        self._transport.spoil(slot.area)
        return slot.area

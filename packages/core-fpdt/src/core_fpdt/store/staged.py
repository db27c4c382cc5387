"""Chunks wait outside of the device and come back through a few buffers, beside the computation.

Nothing here waits: copies are queued behind events, computation behind the copies it needs, and a
buffer is written again behind all that still reads it (paper arXiv 2408.16978, section 4). What was
put or added to last is still on the device, and needs no copy to be got.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from core_fpdt.store.books import Books
from core_fpdt.store.buffers import Buffers, Kind, Slot
from core_fpdt.store.contract import Lane
from core_fpdt.store.counters import Counters
from core_fpdt.store.slabs import Slabs
from core_fpdt.store.transport import Area, Queue, Transport


class StagedStore:
    """Lanes outside of a device.

    Args:
        transport: how bytes get there and back.
        slabs: where they wait.
        counters: those of ``slabs``.
    """

    def __init__(self, transport: Transport, slabs: Slabs, counters: Counters) -> None:
        self.device = transport.device
        self.counters = counters
        self._transport = transport
        self._slabs = slabs
        self._buffers = Buffers(transport)
        self._lanes: weakref.WeakSet[StagedLane] = weakref.WeakSet()
        self._orphans: deque[Chunks] = deque()

    @property
    def offloads(self) -> bool:
        return True

    def lane(
        self,
        name: str,
        edges: Sequence[int],
        *,
        dim: int,
        dtype: torch.dtype | None = None,
        whole: bool = True,
    ) -> Lane:
        self._bury()
        books = Books(name, edges, dim, dtype)
        chunks = Chunks(books, self._transport, self._slabs, self._buffers, self.counters)
        lane = StagedLane(books, chunks)
        # A lane may be collected in the middle of anything, so that its chunks are only noted then.
        weakref.finalize(lane, self._orphans.append, chunks)
        self._lanes.add(lane)
        return lane

    def used(self) -> int:
        self._bury()
        return self.counters.used

    def on_device(self) -> int:
        """Bytes of the device in buffers."""
        self._bury()
        return self._buffers.held()

    def close(self) -> None:
        for lane in list(self._lanes):
            lane.close()
        self._bury()
        self._transport.close()
        self._slabs.close()

    def _bury(self) -> None:
        while self._orphans:
            self._orphans.popleft().close()


class StagedLane:
    """A lane outside of the device; see :class:`Lane`.

    Args:
        books: what the lane has.
        chunks: where they are.
    """

    def __init__(self, books: Books, chunks: Chunks) -> None:
        self._books = books
        self._chunks = chunks

    @property
    def whole(self) -> bool:
        return False

    def put(self, index: int, chunk: Tensor) -> None:
        self._books.accept(chunk, index, index + 1)
        self._chunks.write(index, chunk)
        self._books.there.add(index)

    def prefetch(self, index: int) -> None:
        if index in self._books.there:
            self._chunks.call(index)

    def get(self, first: int, last: int | None = None) -> Tensor:
        self._books.single(first, last)
        self._books.lend(first, first + 1)
        return self._chunks.read(first)

    def done(self, first: int) -> None:
        if self._books.give_back(first):
            self._chunks.done(first)

    def add(self, first: int, chunk: Tensor, last: int | None = None) -> None:
        self._books.single(first, last)
        self._books.accept(chunk, first, first + 1)
        self._chunks.add(first, chunk, new=first not in self._books.there)
        self._books.there.add(first)

    def drop(self, index: int) -> None:
        self._books.forget(index)
        self._chunks.drop(index)

    def close(self) -> None:
        self._books.close()
        self._chunks.close()


class Chunks:
    """The chunks of a lane: some on the device, the others outside.

    Args:
        books: what the lane has.
        transport: as for :class:`StagedStore`.
        slabs: where chunks wait.
        buffers: where they are on the device.
        counters: what is moved is counted there.
    """

    def __init__(
        self,
        books: Books,
        transport: Transport,
        slabs: Slabs,
        buffers: Buffers,
        counters: Counters,
    ) -> None:
        self._books = books
        self._transport = transport
        self._slabs = slabs
        self._buffers = buffers
        self._counters = counters
        self._kind: Kind | None = None
        self._slots: dict[int, Slot] = {}
        self._blocks: dict[int, Area] = {}

    def write(self, index: int, chunk: Tensor) -> None:
        """Keep a chunk, and begin to copy it out."""
        slot = self._fresh(index)
        self._overwrite(slot, chunk)
        self._write_back(slot)
        self._rest(slot)

    def add(self, index: int, chunk: Tensor, *, new: bool) -> None:
        """Add to a chunk on the device.

        It is copied out when another one is added to: whoever stays with a chunk moves nothing.
        """
        if new:
            slot = self._fresh(index)
            self._overwrite(slot, chunk)
        else:
            slot = self.call(index)
            self._transport.wait(Queue.COMPUTE, slot.area.before_writing())
            self._view(slot).add_(chunk.detach())
            slot.area.was_written(self._transport.record(Queue.COMPUTE))
        slot.dirty = True
        for other in self._slots.values():
            if other.dirty and other is not slot:
                self._write_back(other)
        self._rest(slot)

    def read(self, index: int) -> Tensor:
        """The chunk on the device, for work that is queued from now on."""
        self._counters.late += index not in self._slots
        slot = self.call(index)
        slot.readers += 1
        self._transport.wait(Queue.COMPUTE, slot.area.before_reading())
        # Not the view: its version would change when the buffer gets the next chunk.
        return self._view(slot).data

    def done(self, index: int) -> None:
        """One reader less."""
        slot = self._slots[index]
        slot.readers -= 1
        if slot.readers:
            return
        slot.area.read[Queue.COMPUTE] = self._transport.record(Queue.COMPUTE)
        if slot.dirty:
            self._rest(slot)
        else:
            self._leave(slot)
            self._buffers.give(self._open(), slot.area)

    def call(self, index: int) -> Slot:
        """Where a chunk is on the device; if it is not there, begin to copy it. It stays."""
        found = self._slots.get(index)
        if found is None:
            found = self._fresh(index)
            block, size = self._blocks[index], self._size(found)
            self._counters.fetched += self._move(Queue.IN, block, found.area, size)
        self._buffers.wake(self._open(), found)
        return found

    def drop(self, index: int) -> None:
        """Forget a chunk."""
        slot = self._slots.pop(index, None)
        if slot is not None:
            self._buffers.wake(self._open(), slot)
            slot.area.read[Queue.COMPUTE] = self._transport.record(Queue.COMPUTE)
            self._buffers.give(self._open(), slot.area)
        block = self._blocks.pop(index, None)
        if block is not None:
            self._transport.spoil(block)
            self._slabs.give(block)

    def close(self) -> None:
        """Forget all."""
        for index in {*self._slots, *self._blocks}:
            self.drop(index)
        if self._kind is not None:
            self._buffers.close(self._kind)
            self._kind = None

    def _open(self) -> Kind:
        if self._kind is None:
            self._kind = self._books.name, self._books.largest()
            self._buffers.open(self._kind)
        return self._kind

    def _fresh(self, index: int) -> Slot:
        """A slot whose content is to be written."""
        slot = self._slots.get(index)
        if slot is None:
            area = self._buffers.take(self._open())
            slot = Slot(index, area, self._write_back, self._leave)
            # At once: whatever fails from here on, close() gives the buffer back.
            self._slots[index] = slot
        return slot

    def _overwrite(self, slot: Slot, chunk: Tensor) -> None:
        self._transport.wait(Queue.COMPUTE, slot.area.before_writing())
        self._view(slot).copy_(chunk.detach())
        slot.area.was_written(self._transport.record(Queue.COMPUTE))

    def _write_back(self, slot: Slot) -> None:
        block = self._blocks.get(slot.index)
        if block is None:
            block = self._slabs.take(self._size(slot))
            self._blocks[slot.index] = block
        self._counters.put += self._move(Queue.OUT, slot.area, block, self._size(slot))
        slot.dirty = False

    def _view(self, slot: Slot) -> Tensor:
        flat = slot.area.data[: self._size(slot)].view(self._books.dtype)
        return flat.view(self._books.shape(slot.index))

    def _rest(self, slot: Slot) -> None:
        self._buffers.rest(self._open(), slot)

    def _leave(self, slot: Slot) -> None:
        del self._slots[slot.index]

    def _size(self, slot: Slot) -> int:
        return self._books.nbytes(slot.index, slot.index + 1)

    def _move(self, queue: Queue, source: Area, target: Area, size: int) -> int:
        """Queue a copy behind whatever wrote the source, and whatever used the target."""
        self._transport.wait(queue, [*source.before_reading(), *target.before_writing()])
        self._transport.copy(queue, source.data[:size], target.data[:size])
        event = self._transport.record(queue)
        source.read[queue] = event
        target.was_written(event)
        return size

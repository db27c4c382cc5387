"""Chunks of a GPU in files: beyond host memory, on a fast local disk."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from core_fpdt.store.file import MappedFile, usable_folder
from core_fpdt.store.slabs import Region
from core_fpdt.store.threads import Done, Threads
from core_fpdt.store.transport import Area, Event, Queue

STAGE = 16 * 2**20
"""Bytes of page-locked memory that each direction goes through."""


class FileRegions:
    """Makes regions of files, for stores that copy to and from a device.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: str = "") -> None:
        self._folder = usable_folder(folder)

    def __call__(self, nbytes: int) -> Region:
        """A region of ``nbytes`` bytes."""
        file = MappedFile(nbytes, self._folder)
        return Region(file.data, file.close)


class CudaFiles(Threads):
    """Copies between a GPU and files: a thread for each direction, through page-locked memory.

    The computation waits on the host where a chunk has not come yet, as only the host knows when a
    file was read; what was asked for in time is there.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stages: dict[Queue, tuple[torch.cuda.Stream, Tensor]] = {}

    def wait(self, queue: Queue, events: Iterable[Event]) -> None:
        if queue is Queue.COMPUTE:
            # Its own marks are in order already.
            events = [event for event in events if isinstance(event, Done)]
        super().wait(queue, events)

    def record(self, queue: Queue) -> Event:
        if queue is not Queue.COMPUTE:
            return super().record(queue)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def free(self, area: Area) -> None:
        # Reads of the computation are in the order of its stream; the threads are not.
        for event in area.before_writing():
            if isinstance(event, Done):
                event.synchronize()

    def move(self, queue: Queue, source: Tensor, target: Tensor) -> None:
        stream, stage = self._stage(queue)
        for begin in range(0, source.numel(), STAGE):
            piece = slice(begin, begin + STAGE)
            part = stage[: source[piece].numel()]
            with torch.cuda.stream(stream):
                if queue is Queue.OUT:
                    part.copy_(source[piece], non_blocking=True)
                    stream.synchronize()
                    target[piece].copy_(part)
                else:
                    part.copy_(source[piece])
                    target[piece].copy_(part, non_blocking=True)
                    stream.synchronize()

    def _stage(self, queue: Queue) -> tuple[torch.cuda.Stream, Tensor]:
        if queue not in self._stages:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stage = torch.empty(STAGE, dtype=torch.uint8, pin_memory=True)
            self._stages[queue] = stream, stage
        return self._stages[queue]

"""A transport whose queues are threads: for proofs, and where bytes go through a file."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from queue import SimpleQueue

import torch
from torch import Tensor

from core_fpdt.store.transport import Area, Event, Queue


class Done:
    """An event that a thread sets."""

    def __init__(self) -> None:
        self._set = threading.Event()

    def set(self) -> None:
        """All before it is done."""
        self._set.set()

    def query(self) -> bool:
        return self._set.is_set()

    def synchronize(self) -> None:
        self._set.wait()


class Threads:
    """Copies beside the computation, one thread for each direction.

    The computation is the calling thread, which therefore waits itself. The threads are started
    with the first copy and end with :meth:`close`, or when nobody holds the transport any more.

    Args:
        device: where chunks are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._work: dict[Queue, SimpleQueue[Callable[[], None] | None]] = {}
        self._failed: list[BaseException] = []

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def wait(self, queue: Queue, events: Iterable[Event]) -> None:
        for event in events:
            if queue is Queue.COMPUTE:
                event.synchronize()
            else:
                self._submit(queue, event.synchronize)
        if self._failed:
            raise self._failed.pop(0)

    def copy(self, queue: Queue, source: Tensor, target: Tensor) -> None:
        self._submit(queue, lambda: self.move(queue, source, target))

    def record(self, queue: Queue) -> Event:
        event = Done()
        if queue is Queue.COMPUTE:
            event.set()
        else:
            self._submit(queue, event.set)
        return event

    def spoil(self, area: Area) -> None:
        """Nothing is proven here."""

    def free(self, area: Area) -> None:
        for event in area.before_writing():
            event.synchronize()

    def close(self) -> None:
        for where in list(self._work):
            self.record(where).synchronize()
            self._work.pop(where).put(None)

    def move(self, queue: Queue, source: Tensor, target: Tensor) -> None:
        """Copy bytes, in the thread of a queue."""
        target.copy_(source)

    def _submit(self, where: Queue, task: Callable[[], None]) -> None:
        if where not in self._work:
            work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            self._work[where] = work
            weakref.finalize(self, work.put, None)
            name = f"core-fpdt-{where.value}"
            thread = threading.Thread(
                target=_work_off, args=(work, self._failed), name=name, daemon=True
            )
            thread.start()
        self._work[where].put(task)


def _work_off(work: SimpleQueue[Callable[[], None] | None], failed: list[BaseException]) -> None:
    while (task := work.get()) is not None:
        try:
            task()
        except (
            BaseException
        ) as error:  # the caller raises it; events behind it must come all the same
            failed.append(error)
        finally:
            del task

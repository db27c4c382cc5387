"""Host memory of a GPU: page-locked, with one stream for each direction."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from core_fpdt.store.slabs import Region
from core_fpdt.store.transport import Area, Event, Queue

logger = logging.getLogger("core")


class Cuda:
    """Streams of a GPU. The host never waits.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._out, self._in = streams

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def wait(self, queue: Queue, events: Iterable[Event]) -> None:
        stream = self._stream(queue)
        for event in events:
            stream.wait_event(cast(Any, event))

    def copy(self, queue: Queue, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._stream(queue)):
            target.copy_(source, non_blocking=True)

    def record(self, queue: Queue) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream(queue))
        return event

    def spoil(self, area: Area) -> None:
        """Nothing is proven here."""

    def free(self, area: Area) -> None:
        # The allocator knows of one stream only: its next user must come after the copies.
        self.wait(Queue.COMPUTE, area.before_writing())
        area.data.record_stream(self._stream(Queue.COMPUTE))

    def close(self) -> None:
        self._out.synchronize()
        self._in.synchronize()

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        if queue is Queue.COMPUTE:
            return torch.cuda.current_stream(self.device)
        return self._out if queue is Queue.OUT else self._in


class Pinned:
    """Makes page-locked memory of exactly the wanted sizes.

    What cannot be locked stays as it is: copies are slower then, and one line in the log says so.

    Args:
        lock: locks bytes from an address on; 0 when it could. CUDA's by default.
        unlock: undoes that.
    """

    def __init__(
        self,
        lock: Callable[[int, int], int] | None = None,
        unlock: Callable[[int], object] | None = None,
    ) -> None:
        self.locked = 0
        self._lock = lock or _cuda_lock
        self._unlock = unlock or _cuda_unlock
        self._warned = False

    def __call__(self, nbytes: int) -> Region:
        """A region of ``nbytes`` bytes."""
        # Private, and kept from children: a fork would copy pages that the GPU writes to.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
            if hasattr(mmap, advice):
                with suppress(OSError):
                    memory.madvise(getattr(mmap, advice))
        data = torch.frombuffer(memory, dtype=torch.uint8)
        result = self._lock(data.data_ptr(), nbytes)
        if result:
            self._warn(nbytes, result)
            return Region(data, _nothing)
        self.locked += nbytes
        return Region(data, partial(self._release, data.data_ptr(), nbytes))

    def _release(self, address: int, nbytes: int) -> None:
        self._unlock(address)
        self.locked -= nbytes

    def _warn(self, nbytes: int, result: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "fpdt: %s bytes cannot be page-locked (error %s; %s are): copies of chunks are "
                "slower; raise the limit (ulimit -l), or lower fpdt.host_memory",
                f"{nbytes:,}",
                result,
                f"{self.locked:,}",
            )


def _cuda_lock(address: int, nbytes: int) -> int:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(runtime.cudaHostRegister(address, nbytes, 0))


def _cuda_unlock(address: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)


def _nothing() -> None:
    """Memory that is not locked goes back by itself."""

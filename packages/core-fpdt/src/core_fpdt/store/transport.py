"""How bytes get to the device and back: three queues of work, and events between them.

The engine in :mod:`core_fpdt.store.staged` decides what is copied where, and what waits for what.
What it is decided for differs in a few lines: streams of CUDA, or threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Queue(Enum):
    """Where work is queued; each queue is worked off in order, beside the others."""

    COMPUTE = "compute"
    """What the model does: the current stream of the caller."""
    OUT = "out"
    """Copies that leave the device."""
    IN = "in"
    """Copies that come to the device."""


class Event(Protocol):
    """A mark in a queue."""

    def query(self) -> bool:
        """Whether all that was queued before it is done."""
        ...

    def synchronize(self) -> None:
        """Wait for that."""
        ...


@dataclass(eq=False)
class Area:
    """Bytes that several queues read and write, with what has to be waited for before.

    Args:
        data: (n,) uint8.
        written: after the last write.
        read: after the last read of each queue since then.
    """

    data: Tensor
    written: Event | None = None
    read: dict[Queue, Event] = field(default_factory=dict[Queue, Event])

    def before_reading(self) -> list[Event]:
        """What a reader waits for."""
        return [] if self.written is None else [self.written]

    def before_writing(self) -> list[Event]:
        """What a writer waits for."""
        return [*self.before_reading(), *self.read.values()]

    def was_written(self, event: Event) -> None:
        """Note a write, which has waited for all before it."""
        self.written, self.read = event, {}


class Transport(Protocol):
    """Queues of a device. What is queued keeps its order within a queue, and nothing else."""

    @property
    def device(self) -> torch.device:
        """Where chunks are computed."""
        ...

    def buffer(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8."""
        ...

    def wait(self, queue: Queue, events: Iterable[Event]) -> None:
        """What is queued from now on begins after some events. The caller need not wait itself."""
        ...

    def copy(self, queue: Queue, source: Tensor, target: Tensor) -> None:
        """Queue a copy of bytes."""
        ...

    def record(self, queue: Queue) -> Event:
        """Mark what is queued until now."""
        ...

    def spoil(self, area: Area) -> None:
        """Nobody may read any more what an area held. A proof may destroy it."""
        ...

    def free(self, area: Area) -> None:
        """Memory of the device is dropped by the caller right after this."""
        ...

    def close(self) -> None:
        """Wait for all that is queued, and end."""
        ...

"""A device that is none: copies come late, and what must not be read any more turns into NaN."""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor

from core_fpdt.store.slabs import Region
from core_fpdt.store.threads import Threads
from core_fpdt.store.transport import Area, Queue

POISON = 0xFF
"""This in every byte is NaN in all float types, and -1 in all integers."""


class Simulated(Threads):
    """A transport that proves on CPUs that nothing is read too early or too late.

    Args:
        delay: seconds that a copy waits at most; how long is drawn anew each time.
        seed: of the delays.
    """

    def __init__(self, delay: float, seed: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self._delay = delay
        self._random = random.Random(seed)

    def buffer(self, nbytes: int) -> Tensor:
        return super().buffer(nbytes).fill_(POISON)

    def move(self, queue: Queue, source: Tensor, target: Tensor) -> None:
        time.sleep(self._random.uniform(0, self._delay))
        super().move(queue, source, target)

    def spoil(self, area: Area) -> None:
        def poison() -> None:
            area.data.fill_(POISON)

        before = area.before_writing()
        if all(event.query() for event in before):
            poison()
            return
        self.wait(Queue.OUT, before)
        self._submit(Queue.OUT, poison)
        area.was_written(self.record(Queue.OUT))


def plain_memory(nbytes: int) -> Region:
    """A region of ordinary memory, poisoned."""
    return Region(torch.full((nbytes,), POISON, dtype=torch.uint8), lambda: None)

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from core_fpdt.store.budget import Budget
from core_fpdt.store.contract import Store
from core_fpdt.store.counters import Counters
from core_fpdt.store.cuda_files import FileRegions
from core_fpdt.store.file import FileStore
from core_fpdt.store.resident import ResidentStore
from core_fpdt.store.simulated import Simulated, plain_memory
from core_fpdt.store.slabs import Slabs
from core_fpdt.store.staged import StagedStore
from core_fpdt.store.threads import Done, Threads
from core_fpdt.store.transport import Event, Queue

DELAY = 3e-4


class Unhurried(Simulated):
    """Queues that do nothing before somebody waits for it: whatever may be late is late."""

    def __init__(self) -> None:
        super().__init__(delay=0)
        self._tasks: dict[Queue, deque[Callable[[], None]]] = defaultdict(deque)

    def _submit(self, where: Queue, task: Callable[[], None]) -> None:
        self._tasks[where].append(task)

    def record(self, queue: Queue) -> Event:
        event = Pulled(self._tasks[queue])
        if queue is Queue.COMPUTE:
            event.set()
        else:
            self._submit(queue, event.set)
        return event

    def close(self) -> None:
        for queue in (Queue.OUT, Queue.IN):
            self.record(queue).synchronize()


class Pulled(Done):
    """An event that works off its queue when somebody waits for it."""

    def __init__(self, tasks: deque[Callable[[], None]]) -> None:
        super().__init__()
        self._tasks = tasks

    def synchronize(self) -> None:
        while not self.query():
            self._tasks.popleft()()


def unhurried() -> StagedStore:
    counters = Counters()
    budget = Budget(2**40, "host memory", "raise fpdt.host_memory")
    return StagedStore(Unhurried(), Slabs(plain_memory, budget, counters, region=4096), counters)


def simulated(delay: float = DELAY, limit: int = 2**40) -> StagedStore:
    counters = Counters()
    budget = Budget(limit, "host memory", "raise fpdt.host_memory")
    return StagedStore(
        Simulated(delay), Slabs(plain_memory, budget, counters, region=4096), counters
    )


def staged_files(folder: str) -> StagedStore:
    counters = Counters()
    budget = Budget(2**40, "the disk", "take a larger one")
    slabs = Slabs(FileRegions(folder), budget, counters, region=4096)
    return StagedStore(Threads(torch.device("cpu")), slabs, counters)


STORES: dict[str, Callable[[str], Store]] = {
    "resident": lambda _: ResidentStore(torch.device("cpu")),
    "file": FileStore,
    "simulated": lambda _: simulated(),
    "unhurried": lambda _: unhurried(),
    "staged files": staged_files,
}


@pytest.fixture(params=STORES)
def store_maker(request: pytest.FixtureRequest) -> tuple[Callable[[str], Store], bool]:
    # Its store in a folder, and whether its lanes can be whole.
    return STORES[request.param], request.param in ("resident", "file")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = STORES[request.param](str(tmp_path))
    yield made
    made.close()


@pytest.fixture
def make_simulated() -> Iterator[Callable[..., StagedStore]]:
    """Makes simulated stores and closes them."""
    made: list[StagedStore] = []

    def make(**changes: float) -> StagedStore:
        made.append(simulated(**changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["simulated", "unhurried"])
def poisoning(request: pytest.FixtureRequest) -> Iterator[StagedStore]:
    """A store in which whatever is read too early or too late is poison."""
    made = simulated(1e-4) if request.param == "simulated" else unhurried()
    yield made
    made.close()

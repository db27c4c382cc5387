"""The store of a GPU: nothing waits on the host, copies run beside the computation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core_fpdt.settings import FPDTSettings
from core_fpdt.store.contract import Lane, Store
from core_fpdt.store.host import Cuda
from core_fpdt.store.making import make_store
from core_fpdt.store.staged import StagedStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT = 12
TOKENS = 4096
EDGES = range(0, (COUNT + 1) * TOKENS, TOKENS)


@pytest.fixture(params=["host", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    settings = FPDTSettings(offload=request.param, folder=str(tmp_path), host_memory=4)
    made = make_store(torch.device("cuda", 0), settings)
    yield made
    made.close()


def _chunk(index: int) -> torch.Tensor:
    return torch.full((1, TOKENS, 1024), float(index), device="cuda", dtype=torch.bfloat16)


def _fill(lane: Lane) -> None:
    for index in range(COUNT):
        chunk = _chunk(index)
        lane.put(index, chunk)
        chunk.fill_(-1)


def _sum(lane: Lane, busy: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), device="cuda")
    lane.prefetch(0)
    for index in range(COUNT):
        lane.prefetch(min(index + 1, COUNT - 1))
        chunk = lane.get(index)
        for _ in range(4):
            busy = busy @ busy
        total += chunk.float().mean()
        lane.done(index)
    return total + 0 * busy[0, 0]


def test_chunks_come_back_while_the_gpu_is_busy(store: Store) -> None:
    busy = torch.zeros(4096, 4096, device="cuda")
    lane = store.lane("keys", EDGES, dim=1)
    for _ in range(3):
        _fill(lane)
        assert _sum(lane, busy).item() == sum(range(COUNT))
    lane.close()
    assert store.used() == 0


def test_sums_are_exact(store: Store) -> None:
    lane = store.lane("gradients", EDGES, dim=1, dtype=torch.float32)
    for _ in range(3):
        for index in range(COUNT):
            lane.add(index, _chunk(index))
            lane.prefetch((index + 1) % COUNT)
    for index in range(COUNT):
        assert (lane.get(index) == 3 * index).all()
        lane.done(index)


def test_the_host_never_waits() -> None:
    store = make_store(torch.device("cuda", 0), FPDTSettings(offload="host", host_memory=4))
    busy = torch.zeros(1024, 1024, device="cuda")
    lane = store.lane("keys", EDGES, dim=1)
    _fill(lane)
    _sum(lane, busy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _fill(lane)
        total = _sum(lane, busy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.item() == sum(range(COUNT))
    store.close()


def test_copies_run_beside_the_computation() -> None:
    """A copy that was queued behind a long computation on another stream is done before it."""
    transport = Cuda(torch.device("cuda", 0))
    store = make_store(torch.device("cuda", 0), FPDTSettings(offload="host", host_memory=4))
    assert isinstance(store, StagedStore)
    assert transport.device == store.device
    lane = store.lane("keys", EDGES, dim=1)
    _fill(lane)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of the compute stream
    after = torch.cuda.Event()
    after.record()
    lane.prefetch(0)
    slot = lane._chunks._slots[0]  # the only place that knows of the copy
    slot.area.written.synchronize()
    assert not after.query()
    store.close()

"""What is counted, how little is copied, and how few buffers it takes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from core.errors import CoreError
from core_fpdt.store.buffers import DEPTH
from core_fpdt.store.contract import Lane
from core_fpdt.store.simulated import Simulated
from core_fpdt.store.staged import StagedStore
from core_fpdt.store.transport import Event, Queue

EDGES = (0, 4, 8, 12, 16, 20, 24)
CHUNK = torch.arange(32.0).view(1, 4, 8)
BYTES = 128


def _filled(store: StagedStore, name: str = "keys") -> Lane:
    lane = store.lane(name, EDGES, dim=1)
    for index in range(6):
        lane.put(index, CHUNK + index)
    return lane


def test_what_was_put_last_is_still_there(make_simulated: Callable[..., StagedStore]) -> None:
    store = make_simulated()
    lane = _filled(store)
    assert torch.equal(lane.get(5), CHUNK + 5)
    lane.done(5)
    assert (store.counters.fetched, store.counters.late) == (0, 0)
    assert store.counters.put == 6 * BYTES


def test_what_was_asked_for_in_time_is_not_late(make_simulated: Callable[..., StagedStore]) -> None:
    store = make_simulated()
    lane = _filled(store)
    lane.prefetch(0)
    for index in range(3):
        lane.prefetch(index + 1)
        assert torch.equal(lane.get(index), CHUNK + index)
        lane.done(index)
    assert store.counters.late == 0
    lane.get(0)
    lane.done(0)
    assert store.counters.late == 1


def test_a_pass_over_any_number_of_chunks_takes_a_few_buffers(
    make_simulated: Callable[..., StagedStore],
) -> None:
    store = make_simulated()
    layers = [_filled(store) for _ in range(5)]
    for lane in layers:
        for index in range(6):
            lane.prefetch(min(index + 1, 5))
            lane.get(index)
            lane.done(index)
        lane.prefetch(0)
        lane.drop(0)
    assert store.on_device() == DEPTH * BYTES
    for lane in layers:
        lane.close()
    assert store.on_device() == store.used() == 0


def test_more_readers_than_buffers_get_more_and_give_them_back(
    make_simulated: Callable[..., StagedStore],
) -> None:
    store = make_simulated()
    lane = _filled(store)
    found = [lane.get(index) for index in range(6)]
    assert all(torch.equal(chunk, CHUNK + index) for index, chunk in enumerate(found))
    assert store.on_device() == 6 * BYTES
    for index in range(6):
        lane.done(index)
    assert store.on_device() == DEPTH * BYTES


def test_a_new_buffer_is_filled_behind_whatever_had_its_memory(
    make_simulated: Callable[..., StagedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that an allocator gives out again may still be read by work that is queued."""
    store = make_simulated()
    lane = _filled(store)
    for index in (5, 4, 3):
        lane.get(index)
    marks: list[Event] = []
    waited: list[Event] = []
    record, wait = Simulated.record, Simulated.wait

    def recorded(self: Simulated, queue: Queue) -> Event:
        event = record(self, queue)
        marks.extend([event] if queue is Queue.COMPUTE else [])
        return event

    def waited_for(self: Simulated, queue: Queue, events: Iterable[Event]) -> None:
        found = list(events)
        waited.extend(found if queue is Queue.IN else [])
        wait(self, queue, found)

    monkeypatch.setattr(Simulated, "record", recorded)
    monkeypatch.setattr(Simulated, "wait", waited_for)
    before = store.on_device()
    lane.prefetch(0)
    assert store.on_device() == before + BYTES
    assert len(marks) == 1
    assert marks[0] in waited


def test_adding_to_one_chunk_again_and_again_moves_nothing(
    make_simulated: Callable[..., StagedStore],
) -> None:
    store = make_simulated()
    lane = store.lane("gradients", EDGES, dim=1, dtype=torch.float32)
    for _ in range(10):
        lane.add(3, CHUNK.bfloat16())
    assert torch.equal(lane.get(3), 10 * CHUNK)
    lane.drop(3)
    assert (store.counters.put, store.counters.fetched, store.used()) == (0, 0, 0)


def test_sums_of_chunks_that_come_and_go(poisoning: StagedStore) -> None:
    lane = poisoning.lane("gradients", EDGES, dim=1, dtype=torch.float32)
    for _ in range(4):
        for index in range(6):
            lane.prefetch(index)
            lane.add(index, CHUNK + index)
    assert poisoning.counters.fetched > 0
    for index in range(6):
        assert torch.equal(lane.get(index), 4 * (CHUNK + index))
        lane.done(index)


def test_sums_are_in_the_dtype_of_the_lane(make_simulated: Callable[..., StagedStore]) -> None:
    lane = make_simulated().lane("gradients", EDGES, dim=1, dtype=torch.float32)
    small = torch.full((1, 4, 8), 2.0**-9, dtype=torch.bfloat16)
    lane.add(0, torch.ones_like(small))
    for _ in range(512):
        lane.add(0, small)
    assert torch.equal(lane.get(0), torch.full((1, 4, 8), 2.0))


def test_a_chunk_that_was_given_back_is_poison(make_simulated: Callable[..., StagedStore]) -> None:
    lane = _filled(make_simulated())
    late = lane.get(0)
    lane.done(0)
    assert late.isnan().all()


def test_a_lane_that_nobody_holds_gives_everything_back(
    make_simulated: Callable[..., StagedStore],
) -> None:
    store = make_simulated()
    lane = _filled(store)
    lane.get(0)
    assert store.used() > 0
    del lane
    gc.collect()
    assert store.used() == store.on_device() == 0


def test_an_interrupted_put_leaves_nothing_behind(
    make_simulated: Callable[..., StagedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_simulated()
    lane = _filled(store)

    copy, here = torch.Tensor.copy_, threading.get_ident()

    def interrupted(target: torch.Tensor, *args: Any) -> torch.Tensor:
        # Threads of the store may still be copying what was put before.
        if threading.get_ident() == here:
            raise KeyboardInterrupt
        return copy(target, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lane.put(0, CHUNK)
    lane.close()
    assert store.used() == store.on_device() == 0
    again = _filled(store)
    assert torch.equal(again.get(2), CHUNK + 2)


def test_host_memory_that_runs_out_is_an_error_with_numbers(
    make_simulated: Callable[..., StagedStore],
) -> None:
    store = make_simulated(limit=4 * 256)
    lane = store.lane("keys", EDGES, dim=1)
    for index in range(4):
        lane.put(index, CHUNK)
    with pytest.raises(CoreError, match=r"256 more bytes .* 1,024 of 1,024 bytes are in use"):
        lane.put(4, CHUNK)
    lane.close()
    wider = store.lane("wider", (0, 8), dim=1)
    wider.put(0, torch.ones(1, 8, 32))  # what was in blocks of another size makes room
    assert store.used() == 1024


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_every_dtype_and_stride_comes_back(
    make_simulated: Callable[..., StagedStore], dtype: torch.dtype
) -> None:
    lane = make_simulated().lane("any", (0, 3, 5), dim=-2)
    whole = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = whole.permute(1, 0, 2)
    lane.put(0, whole[:, :3])
    lane.put(1, whole[:, 3:])
    assert torch.equal(torch.cat([lane.get(0), lane.get(1)], dim=1), whole)


def test_chunks_put_while_generating_serve_a_training_step(
    make_simulated: Callable[..., StagedStore],
) -> None:
    store = make_simulated()
    with torch.inference_mode():
        lane = _filled(store)
        assert torch.equal(lane.get(0), CHUNK)
        lane.close()
    lane = _filled(store)
    leaf = lane.get(0).requires_grad_()
    (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, 2 * CHUNK)

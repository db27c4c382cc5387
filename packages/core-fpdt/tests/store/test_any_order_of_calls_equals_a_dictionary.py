"""Whatever is put, brought, got, added and dropped in whatever order: every store gives what a
dictionary would give."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core_fpdt.store.contract import Lane, Store

# Lanes of one name share buffers, as those of all layers do.
EDGES = {
    "keys": (0, 3, 6, 9, 12, 14),
    "sums": (0, 3, 6, 9, 12, 14),
    "sums of the next layer": (0, 3, 6, 9, 12, 14),
    "single": (0, 2),
}
DIMS = {"keys": 2, "sums": 1, "sums of the next layer": 1, "single": -1}
FLOAT = torch.float32
DTYPES = {
    "keys": torch.bfloat16,
    "sums": FLOAT,
    "sums of the next layer": FLOAT,
    "single": torch.int64,
}
LANES = st.sampled_from(sorted(EDGES))
CHUNKS = st.integers(0, 4)
SEEDS = st.integers(0, 2**16)


def _chunk(name: str, first: int, last: int, seed: int) -> torch.Tensor:
    shape = [2, 3, 4]
    shape[DIMS[name]] = EDGES[name][last] - EDGES[name][first]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-50, 50, shape, generator=generator).to(DTYPES[name])


class Against(RuleBasedStateMachine):
    make: Callable[[str], Store]
    whole = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = type(self).make(self.folder.name)
        self.lanes: dict[str, Lane] = {}
        self.known: dict[str, dict[int, torch.Tensor]] = {}
        self.out: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []

    @initialize()
    def begin(self) -> None:
        for name in EDGES:
            self.open(name)

    def open(self, name: str) -> None:
        lane = self.store.lane(
            name.partition(" ")[0], EDGES[name], dim=DIMS[name], whole=self.whole
        )
        self.lanes[name], self.known[name] = lane, {}

    def is_out(self, name: str, index: int) -> bool:
        dim = DIMS[name]
        return any(
            n == name and first <= index < first + self.chunks_of(name, wanted.shape[dim], first)
            for n, first, _, wanted in self.out
        )

    def chunks_of(self, name: str, tokens: int, first: int) -> int:
        return EDGES[name].index(EDGES[name][first] + tokens) - first

    def usable(self, name: str, index: int) -> bool:
        return index < len(EDGES[name]) - 1

    @rule(name=LANES, index=CHUNKS, seed=SEEDS)
    def put(self, name: str, index: int, seed: int) -> None:
        if not self.usable(name, index):
            return
        chunk = _chunk(name, index, index + 1, seed)
        if self.is_out(name, index):
            with pytest.raises(ValueError, match="is out"):
                self.lanes[name].put(index, chunk)
            return
        self.known[name][index] = chunk.clone()
        self.lanes[name].put(index, chunk)
        chunk.zero_()  # whoever put it may write to it at once

    @rule(name=LANES, index=CHUNKS, seed=SEEDS)
    def add(self, name: str, index: int, seed: int) -> None:
        if not self.usable(name, index) or self.is_out(name, index):
            return
        chunk = _chunk(name, index, index + 1, seed)
        old = self.known[name].get(index)
        self.known[name][index] = chunk.clone() if old is None else old + chunk
        self.lanes[name].add(index, chunk)
        chunk.zero_()

    @rule(name=LANES, index=CHUNKS)
    def prefetch(self, name: str, index: int) -> None:
        self.lanes[name].prefetch(index)

    @rule(name=LANES, index=CHUNKS)
    def get(self, name: str, index: int) -> None:
        wanted = self.known[name].get(index)
        if wanted is None:
            with pytest.raises(KeyError):
                self.lanes[name].get(index)
            return
        self.out.append((name, index, self.lanes[name].get(index), wanted))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def done(self, data: Any) -> None:
        place = data.draw(st.integers(0, len(self.out) - 1))
        name, first, _, _ = self.out[place]
        # Two that begin at one place are given back the last one first.
        place = max(i for i, one in enumerate(self.out) if one[:2] == (name, first))
        self.lanes[name].done(first)
        del self.out[place]

    @rule(name=LANES, index=CHUNKS)
    def drop(self, name: str, index: int) -> None:
        self.lanes[name].drop(index)
        self.known[name].pop(index, None)
        self.out = [o for o in self.out if not (o[0] == name and self.covers(o, index))]

    def covers(self, one: tuple[str, int, torch.Tensor, torch.Tensor], index: int) -> bool:
        name, first, _, wanted = one
        return first <= index < first + self.chunks_of(name, wanted.shape[DIMS[name]], first)

    @rule(name=LANES)
    def close_and_open_again(self, name: str) -> None:
        self.lanes[name].close()
        self.lanes[name].close()
        self.out = [one for one in self.out if one[0] != name]
        self.open(name)

    @rule(name=LANES)
    def lose_and_open_again(self, name: str) -> None:
        """As when a graph dies that was never gone backwards."""
        self.out = [one for one in self.out if one[0] != name]
        del self.lanes[name]
        self.open(name)

    @invariant()
    def what_is_out_is_right(self) -> None:
        for name, first, got, wanted in self.out:
            assert got.dtype is DTYPES[name]
            assert torch.equal(got, wanted), (name, first)

    def teardown(self) -> None:
        self.out.clear()
        self.store.close()
        assert self.store.used() == 0
        self.folder.cleanup()


class AgainstWhole(Against):
    """Ranges besides, of lanes that give them."""

    @rule(name=LANES, first=CHUNKS, count=st.integers(1, 5))
    def get_range(self, name: str, first: int, count: int) -> None:
        last = first + count
        if last >= len(EDGES[name]):
            return
        parts = [self.known[name].get(index) for index in range(first, last)]
        if any(part is None for part in parts):
            with pytest.raises(KeyError):
                self.lanes[name].get(first, last)
            return
        wanted = torch.cat([part for part in parts if part is not None], dim=DIMS[name])
        self.out.append((name, first, self.lanes[name].get(first, last), wanted))

    @rule(name=LANES, first=CHUNKS, count=st.integers(1, 5), seed=SEEDS)
    def add_range(self, name: str, first: int, count: int, seed: int) -> None:
        last = first + count
        if last >= len(EDGES[name]):
            return
        if any(self.is_out(name, index) for index in range(first, last)):
            return
        chunk = _chunk(name, first, last, seed)
        sizes = [end - begin for begin, end in pairwise(EDGES[name][first : last + 1])]
        for index, part in enumerate(chunk.split(sizes, dim=DIMS[name]), first):
            old = self.known[name].get(index)
            self.known[name][index] = part.clone() if old is None else old + part
        self.lanes[name].add(first, chunk, last)
        chunk.zero_()


BOOKS = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("pieces", [False, True])
def test_any_order(store_maker: Any, pieces: bool) -> None:
    maker, whole = store_maker
    base = AgainstWhole if whole and not pieces else Against
    machine = type("Machine", (base,), {"make": staticmethod(maker), "whole": not pieces})
    run_state_machine_as_test(machine, settings=BOOKS)

"""What each rank is to write of a state that several hold, planned for them in one process."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings, strategies as st
from torch.distributed.checkpoint.planner import SavePlan

from core.errors import CheckpointError
from core_fastpersist.dcp.balance import BalancedSavePlanner
from core_fastpersist.dcp.places import Writers


def noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    flat = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    return flat.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def plan(
    states: list[dict[str, Any]], writers: Writers = "replica"
) -> tuple[list[BalancedSavePlanner], list[SavePlan]]:
    """What each of some ranks with these states is to write."""
    planners = [BalancedSavePlanner(writers) for _ in states]
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(state, is_coordinator=rank == 0)
    shared, _ = planners[0].create_global_plan([one.create_local_plan() for one in planners])
    return planners, [one.finish_plan(own) for one, own in zip(planners, shared, strict=True)]


SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 6), st.data())
def test_pieces_make_up_every_tensor_and_are_even(
    shapes: list[tuple[int, ...]], world: int, data: st.DataObject
) -> None:
    state = {f"t{i}": noise(i, shape, data.draw(DTYPES)) for i, shape in enumerate(shapes)}
    planners, plans = plan([state] * world)
    rebuilt: dict[str, dict[int, torch.Tensor]] = {key: {} for key in state}
    loads = [0] * world
    for rank, (planner, own) in enumerate(zip(planners, plans, strict=True)):
        for item in own.items:
            piece = planner.resolve_data(item)
            assert isinstance(piece, torch.Tensor)
            assert item.index.offset is not None
            first = item.index.offset[0] if item.index.offset else 0
            assert first not in rebuilt[item.index.fqn]
            rebuilt[item.index.fqn][first] = bits(piece)
            loads[rank] += piece.nbytes
    for key, pieces in rebuilt.items():
        whole = torch.cat([pieces[first] for first in sorted(pieces)])
        assert torch.equal(whole, bits(state[key]))
    rows = [one.nbytes // max(1, one.shape[0] if one.dim() else 1) for one in state.values()]
    assert max(loads) - min(loads) <= max(rows, default=0)


def test_pieces_are_views_of_the_ranks_own_tensor() -> None:
    states = [{"x": torch.arange(40.0).view(10, 4).requires_grad_()} for _ in range(3)]
    planners, plans = plan(states)
    for state, planner, own in zip(states, planners, plans, strict=True):
        for item in own.items:
            piece = planner.resolve_data(item)
            assert isinstance(piece, torch.Tensor)
            assert piece.untyped_storage().data_ptr() == state["x"].untyped_storage().data_ptr()
            assert not piece.requires_grad


def test_a_random_state_is_never_made_of_two() -> None:
    states = [{"random": noise(rank, (5056,), torch.uint8)} for rank in range(2)]
    planners, plans = plan(states)
    pieces = [planners[r].resolve_data(item) for r in range(2) for item in plans[r].items]
    assert len(pieces) == 1
    assert isinstance(pieces[0], torch.Tensor)
    assert any(torch.equal(pieces[0], state["random"]) for state in states)


def test_objects_are_written_by_the_first_rank_that_has_them() -> None:
    states: list[dict[str, Any]] = [
        {"x": torch.ones(4)},
        {"x": torch.ones(4), "note": "a"},
        {"note": "b"},
    ]
    planners, plans = plan(states)
    rank, item = next((r, i) for r in range(3) for i in plans[r].items if i.index.fqn == "note")
    assert rank == 1
    stored = planners[1].resolve_data(item)
    assert isinstance(stored, io.BytesIO)
    stored.seek(0)
    assert torch.load(stored, weights_only=True) == "a"
    assert all(one.index.fqn == "x" for r in (0, 2) for one in plans[r].items)


def test_the_same_planner_saves_again_what_has_changed(tmp_path: Path) -> None:
    planner = BalancedSavePlanner()
    for rows in (5, 3):
        state = {"x": noise(rows, (rows, 2), torch.int64)}
        dcp.save(state, checkpoint_id=tmp_path / str(rows), planner=planner, no_dist=True)
        target = {"x": torch.zeros(rows, 2, dtype=torch.int64)}
        dcp.load(target, checkpoint_id=tmp_path / str(rows), no_dist=True)
        assert torch.equal(target["x"], state["x"])


def test_rows_of_another_save_are_refused() -> None:
    planners, plans = plan([{"x": torch.ones(8, 2)}] * 2)
    planners[1].set_up_planner({"x": torch.ones(2, 2)})
    planners[1].create_local_plan()
    with pytest.raises(CheckpointError, match="rows of x that it does not hold"):
        planners[1].resolve_data(plans[1].items[0])


def test_unknown_writers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no writers called 'machines'"):
        BalancedSavePlanner("machines")  # type: ignore[arg-type]

"""Parameters of all shapes come out of flat vectors of all stages, for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from core_ucp.sources.deepspeed import open_view

Shape = tuple[int, ...]
shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
groups_of_shapes = st.lists(st.lists(shapes, min_size=1, max_size=5), min_size=1, max_size=3)
optimizers = st.sampled_from([("exp_avg", "exp_avg_sq"), ("momentum_buffer",), ()])


def groups_of(
    drawn: list[list[Shape]], states: tuple[str, ...], values: Any
) -> list[dict[str, dict[str, Tensor]]]:
    """Parameters of all groups with their states."""
    return [
        {
            f"layer{g}.p{p}.weight": values(*shape, seed=10 * g + p, states=states)
            for p, shape in enumerate(group)
        }
        for g, group in enumerate(drawn)
    ]


def assert_holds(view: Any, read: Any, groups: list[dict[str, dict[str, Tensor]]]) -> None:
    """Compare all of a view with what was cut."""
    view.prove()
    expected = 0
    for group in groups:
        for name, states in group.items():
            for state, value in states.items():
                key = f"optim.state.{name}.{state}" if state else f"model.{name}"
                assert torch.equal(read(view, key), value), key
            assert read(view, f"optim.state.{name}.step") == 3
            expected += 1 + len(states)
    assert len(view.atoms) == expected


@settings(max_examples=60, deadline=None)
@given(
    drawn=groups_of_shapes,
    dp=st.integers(1, 6),
    align=st.sampled_from([1, 4, 8]),
    states=optimizers,
)
def test_stage_1(
    drawn: list[list[Shape]],
    dp: int,
    align: int,
    states: tuple[str, ...],
    writer: Any,
    values: Callable[..., dict[str, Tensor]],
    read: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    groups = groups_of(drawn, states, values)
    made = writer(tmp_path_factory.mktemp("zero1"), dp)
    made.model(0, groups)
    made.zero12(groups, align=align)
    view = open_view(made.path)
    assert_holds(view, read, groups)
    assert view.mesh == {"dp": dp}
    assert set(view.twins) == {key for key in view.atoms if key.startswith("model.")}
    for g, group in enumerate(groups):
        assert all(view.resume.hyper[name]["lr"] == pytest.approx(0.1 * (g + 1)) for name in group)


@settings(max_examples=60, deadline=None)
@given(drawn=groups_of_shapes, dp=st.integers(1, 6), states=optimizers)
def test_stage_3(
    drawn: list[list[Shape]],
    dp: int,
    states: tuple[str, ...],
    writer: Any,
    values: Callable[..., dict[str, Tensor]],
    read: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    groups = groups_of(drawn, states, values)
    made = writer(tmp_path_factory.mktemp("zero3"), dp)
    made.zero3(groups)
    assert_holds(open_view(made.path), read, groups)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dp=st.integers(1, 6))
def test_frozen_weights_of_stage_3(
    shape: Shape,
    dp: int,
    writer: Any,
    values: Callable[..., dict[str, Tensor]],
    read: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    groups = [{"w": values(5)}]
    whole = values(*shape)[""].bfloat16()
    made = writer(tmp_path_factory.mktemp("frozen"), dp)
    made.zero3(groups)
    part = -(-math.prod(shape) // dp)
    flat = torch.cat([whole.view(-1), torch.zeros(part * dp - whole.numel()).bfloat16()])
    for rank in range(dp):
        path = made.path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        tree = torch.load(path)
        tree["frozen_param_shapes"] = {"frozen": torch.Size(shape)}
        tree["frozen_param_fragments"] = {"frozen": flat[rank * part : (rank + 1) * part].clone()}
        torch.save(tree, path)
    view = open_view(made.path)
    view.prove()
    assert torch.equal(read(view, "model.frozen"), whole)
    assert "optim.state.frozen.step" not in view.atoms

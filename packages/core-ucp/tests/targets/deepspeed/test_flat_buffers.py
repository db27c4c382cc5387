"""Flat buffers of every stage hold each parameter where DeepSpeed looks for it."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core_ucp.targets.deepspeed import DeepSpeedOptions

shapes = st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=6).map(
    lambda found: {f"p{index}": shape for index, shape in enumerate(found)}
)
_numbers = itertools.count()


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), shapes=shapes, stage=st.sampled_from([1, 2, 3]), world=st.integers(1, 5))
def test_every_element_is_where_deepspeed_looks_for_it(
    tmp_path: Path,
    viewed: Callable[..., Any],
    written: Callable[..., Any],
    adam: Callable[..., Any],
    data: st.DataObject,
    shapes: dict[str, tuple[int, ...]],
    stage: Any,
    world: int,
) -> None:
    folder = tmp_path / str(next(_numbers))
    folder.mkdir()
    tensors = adam(shapes)
    decays = {name: data.draw(st.sampled_from([0.0, 0.1])) for name in shapes}
    hyper = {
        name: {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": d} for name, d in decays.items()
    }
    options = DeepSpeedOptions(
        stage=stage,
        world_size=world,
        dtype=data.draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        alignment=data.draw(st.booleans()),
        round_robin=data.draw(st.booleans()),
        sub_group_size=data.draw(st.sampled_from([1, 5, 30, 10**9])),
    )
    made = written(viewed(folder / "source", tensors, hyper=hyper), folder / "target", options)
    found = made.tensors()
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor), key
    groups = made.base(world - 1)["param_groups"]
    assert [group["weight_decay"] for group in groups] == list(dict.fromkeys(decays.values()))
    for path in sorted(made.folder.iterdir()):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def test_sub_groups_close_with_the_parameter_that_reaches_the_limit(
    tmp_path: Path,
    viewed: Callable[..., Any],
    written: Callable[..., Any],
    adam: Callable[..., Any],
) -> None:
    shapes = {"a": (6,), "b": (6,), "c": (6,), "d": (20,), "e": (2,)}
    hyper = {name: {"lr": 0.1 if name < "d" else 0.2} for name in shapes}
    options = DeepSpeedOptions(stage=3, world_size=2, sub_group_size=6)
    made = written(viewed(tmp_path / "s", adam(shapes), hyper=hyper), tmp_path / "t", options)
    assert [list(named) for named in made.model()["param_shapes"]] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert [group["params"] for group in made.base(0)["param_groups"]] == [[0, 1], [2, 3]]
    assert [len(part) for part in made.optimizer(1)["fp32_flat_groups"]] == [6, 3, 10, 1]


@pytest.mark.parametrize(("alignment", "between"), [(False, [0, 0, 0]), (True, [5, 1, 0])])
def test_paddings_are_those_that_deepspeed_compares(
    tmp_path: Path,
    viewed: Callable[..., Any],
    written: Callable[..., Any],
    adam: Callable[..., Any],
    alignment: bool,
    between: list[int],
) -> None:
    tensors = adam({"a": (3,), "b": (7,), "c": (2,)})
    view = viewed(tmp_path / "s", tensors, hyper={name: {"lr": 0.1} for name in "abc"})
    options = DeepSpeedOptions(stage=2, world_size=4, alignment=alignment)
    made = written(view, tmp_path / "t", options)
    ranks = [made.optimizer(rank) for rank in range(4)]
    assert all(rank["param_alignment_paddings"] == [between] for rank in ranks)
    assert all(rank["partition_count"] == [4] for rank in ranks)
    # 12 elements, or 18 with what aligns them, in four parts of 4 or 6.
    tails = [[0], [0], [0], [4]] if not alignment else [[0], [0], [0], [6]]
    assert [rank["group_paddings"] for rank in ranks] == tails
    moments = [rank["base_optimizer_state"]["state"][0]["exp_avg"] for rank in ranks]
    weights = [rank["single_partition_of_fp32_groups"][0] for rank in ranks]
    for part, moment, (tail,) in zip(weights, moments, tails, strict=True):
        assert len(part) == len(moment) - tail


def test_fragments_say_where_parameters_lie_in_a_rank(
    tmp_path: Path,
    viewed: Callable[..., Any],
    written: Callable[..., Any],
    adam: Callable[..., Any],
) -> None:
    tensors = adam({"a": (5,), "b": (2, 3)})
    view = viewed(tmp_path / "s", tensors, hyper={name: {"lr": 0.1} for name in "ab"})
    made = written(view, tmp_path / "t", DeepSpeedOptions(world_size=2))
    addresses = [
        {
            name: (a.start, a.numel)
            for name, a in made.optimizer(rank)["param_slice_mappings"][0].items()
        }
        for rank in range(2)
    ]
    assert addresses == [{"a": (0, 5), "b": (5, 1)}, {"b": (0, 5)}]
    address = made.optimizer(0)["param_slice_mappings"][0]["a"]
    assert type(address).path == "deepspeed.utils.tensor_fragment.fragment_address"


def test_round_robin_deals_parameters_out_to_ranks(
    tmp_path: Path,
    viewed: Callable[..., Any],
    written: Callable[..., Any],
    adam: Callable[..., Any],
) -> None:
    tensors = adam(dict.fromkeys("abcde", (4,)))
    view = viewed(tmp_path / "s", tensors, hyper={name: {"lr": 0.1} for name in "abcde"})
    options = DeepSpeedOptions(stage=2, world_size=2, round_robin=True)
    made = written(view, tmp_path / "t", options)
    assert list(made.model()["param_shapes"][0]) == ["a", "c", "e", "b", "d"]

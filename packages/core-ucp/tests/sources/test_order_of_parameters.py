"""Numbers of parameters become names when there is just one way, and only then."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from core.errors import CheckpointError
from core_ucp.sources.order import names_by_index

MODEL = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (3, 4), "b.bias": (3,)}


def groups(*numbers: list[int]) -> list[dict[str, list[int]]]:
    return [{"params": list(row)} for row in numbers]


def test_one_group_follows_the_order_of_the_model() -> None:
    shapes = dict(enumerate(MODEL.values()))
    assert names_by_index(groups([0, 1, 2, 3]), shapes, MODEL) == dict(enumerate(MODEL))


def test_groups_with_and_without_decay() -> None:
    shapes = {0: (4, 3), 1: (3, 4), 2: (4,), 3: (3,)}
    found = names_by_index(groups([0, 1], [2, 3]), shapes, MODEL)
    assert found == {0: "a.weight", 1: "b.weight", 2: "a.bias", 3: "b.bias"}


def test_a_buffer_between_parameters_is_left_out() -> None:
    model = {"a": (2,), "buffer": (5,), "b": (3,)}
    assert names_by_index(groups([0, 1]), {0: (2,), 1: (3,)}, model) == {0: "a", 1: "b"}


def test_parameters_without_state_take_the_place_that_is_left() -> None:
    assert names_by_index(groups([0, 1]), {1: (3,)}, {"a": (2,), "b": (3,)}) == {0: "a", 1: "b"}


def test_names_in_the_groups_go_before_everything() -> None:
    named = [{"params": [0, 1], "param_names": ["b", "a"]}]
    assert names_by_index(named, {0: (2,), 1: (2,)}, {"a": (2,), "b": (2,)}) == {0: "b", 1: "a"}


@pytest.mark.parametrize(
    ("rows", "model"),
    [
        ([[0], [1]], {"a": (2,), "b": (2,)}),
        ([[0]], {"weight": (2,), "buffer": (2,)}),
    ],
)
def test_several_ways_are_refused(rows: list[list[int]], model: dict[str, tuple[int]]) -> None:
    with pytest.raises(CheckpointError, match="several orders fit"):
        names_by_index(groups(*rows), dict.fromkeys(range(2), (2,)), model)


def test_no_way_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no order fits"):
        names_by_index(groups([0]), {0: (7,)}, MODEL)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_groups_that_shapes_tell_apart_are_always_found(kinds: list[int]) -> None:
    """Whatever the number of groups, where each has shapes of its own."""
    model = {f"p{index}": (kind + 1,) * (kind + 1) for index, kind in enumerate(kinds)}
    rows: list[list[int]] = [[], [], []]
    expected: dict[int, str] = {}
    for kind in range(3):
        for name, shape in model.items():
            if len(shape) == kind + 1:
                rows[kind].append(len(expected))
                expected[len(expected)] = name
    shapes = {number: model[name] for number, name in expected.items()}
    assert names_by_index(groups(*rows), shapes, model) == expected

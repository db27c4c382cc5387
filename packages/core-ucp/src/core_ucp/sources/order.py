"""Which parameter an optimizer means by a number: states of torch number parameters by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import CheckpointError

Shape = tuple[int, ...]
_MOST_CHOICES = 5_000


def names_by_index(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[int, Shape],
    model: Mapping[str, Shape],
) -> dict[int, str]:
    """Names of the parameters that an optimizer numbers.

    Torch writes the names into the groups where the optimizer was made from named parameters.
    Otherwise groups hold parameters in the order of the model, as every trainer makes them. The
    names follow when just one such way of dealing the model out to the groups fits all shapes.

    Args:
        groups: ``param_groups`` of the optimizer's state.
        shapes: of the state tensors, by number; numbers without state have none.
        model: shapes of the model's parameters and buffers, in its order.

    Raises:
        CheckpointError: when no way fits, or several do.
    """
    numbers = [[int(number) for number in group.get("params", [])] for group in groups]
    if groups and all("param_names" in group for group in groups):
        named = [[str(name) for name in group["param_names"]] for group in groups]
        return {
            number: name
            for row, names in zip(numbers, named, strict=True)
            for number, name in zip(row, names, strict=True)
        }
    return _dealt(numbers, shapes, model)


class _Deal:
    """Ways to deal parameters out to groups, followed parameter by parameter."""

    def __init__(self, numbers: Sequence[Sequence[int]], shapes: Mapping[int, Shape]) -> None:
        self.numbers, self.shapes = numbers, shapes
        self.ways: dict[tuple[int, ...], int] = {(0,) * len(numbers): 1}
        self.steps: list[tuple[str, dict[tuple[int, ...], tuple[int, ...]]]] = []

    def next(self, name: str, shape: Shape, spare: int) -> None:
        """Give a parameter to any group that it fits, or to none while there are some to spare."""
        ways: dict[tuple[int, ...], int] = {}
        came: dict[tuple[int, ...], tuple[int, ...]] = {}
        for state, count in self.ways.items():
            follow = [
                self._taken(state, g) for g in range(len(state)) if self._fits(state, g, shape)
            ]
            if len(self.steps) - sum(state) < spare:
                follow.append(state)
            for after in follow:
                ways[after] = min(2, ways.get(after, 0) + count)
                came[after] = state
        if len(ways) > _MOST_CHOICES:
            raise _unclear("too many orders fit")
        self.ways = ways
        self.steps.append((name, came))

    def _fits(self, state: tuple[int, ...], group: int, shape: Shape) -> bool:
        if state[group] == len(self.numbers[group]):
            return False
        return self.shapes.get(self.numbers[group][state[group]], shape) == shape

    @staticmethod
    def _taken(state: tuple[int, ...], group: int) -> tuple[int, ...]:
        return (*state[:group], state[group] + 1, *state[group + 1 :])

    def names(self) -> dict[int, str]:
        """The names, when there is just one way."""
        state = tuple(len(row) for row in self.numbers)
        ways = self.ways.get(state, 0)
        if ways != 1:
            raise _unclear("no order fits the shapes" if ways == 0 else "several orders fit")
        found: dict[int, str] = {}
        for name, came in reversed(self.steps):
            before = came[state]
            for group, (now, then) in enumerate(zip(state, before, strict=True)):
                if now != then:
                    found[self.numbers[group][then]] = name
            state = before
        return found


def _dealt(
    numbers: Sequence[Sequence[int]], shapes: Mapping[int, Shape], model: Mapping[str, Shape]
) -> dict[int, str]:
    spare = len(model) - sum(map(len, numbers))
    deal = _Deal(numbers, shapes)
    for name, shape in model.items():
        deal.next(name, shape, spare)
    return deal.names()


def _unclear(why: str) -> CheckpointError:
    return CheckpointError(
        "the optimizer numbers its parameters, and their names cannot be told",
        why=why,
        fix="save it with names: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict,"
        " or an optimizer that was made from model.named_parameters()",
    )

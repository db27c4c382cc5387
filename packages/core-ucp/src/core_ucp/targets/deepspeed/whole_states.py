"""The optimizer of stage 0, which stands in the model's file: tensors of the parameters' shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from core_ucp.files.new_pickles import Room
from core_ucp.targets.deepspeed.common import param_groups
from core_ucp.targets.deepspeed.counting import known_step
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.targets.deepspeed.parameters import Group, Parameters
from core_ucp.targets.deepspeed.scaling import scaler_numbers
from core_ucp.view.keys import state_key, weight_key
from core_ucp.view.view import View


@dataclass(frozen=True)
class WholeOptimizer:
    """The tree of an optimizer, and what goes into its rooms.

    Attributes:
        tree: as DeepSpeed writes it.
        rooms: (key of the atom, room).
    """

    tree: dict[str, Any]
    rooms: list[tuple[str, Room]]


def whole_optimizer(
    view: View, parameters: Parameters, options: DeepSpeedOptions, scaler: dict[str, Any]
) -> WholeOptimizer:
    """Lay out the optimizer of stage 0.

    In half precision it holds master weights, and in full precision it is that of torch.
    """
    rooms: list[tuple[str, Room]] = []

    def room(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Room:
        rooms.append((key, Room(dtype, shape)))
        return rooms[-1][1]

    def states(name: str, group: Group) -> dict[str, Any]:
        found: dict[str, Any] = {
            state: room(state_key(name, state), atom.dtype, atom.shape)
            for state, atom in parameters.states.get(name, {}).items()
        }
        if "exp_avg_sq" in found and "step" not in found:
            found["step"] = known_step(view, group.hyper)
        return found

    members: list[list[int]] = []
    state: dict[int, dict[str, Any]] = {}
    for group in parameters.groups:
        count = sum(map(len, members))
        members.append(list(range(count, count + len(group.names))))
        found = {n: states(name, group) for n, name in zip(members[-1], group.names, strict=True)}
        state |= {number: held for number, held in found.items() if held}
    base = {"state": state, "param_groups": param_groups(parameters, members)}
    if options.dtype == "fp32":
        return WholeOptimizer(base, rooms)
    masters = [
        [room(weight_key(n), torch.float32, parameters.atoms[n].shape) for n in group.names]
        for group in parameters.groups
    ]
    tree = {**scaler_numbers(scaler), "optimizer_state_dict": base, "fp32_groups": masters}
    return WholeOptimizer(tree, rooms)

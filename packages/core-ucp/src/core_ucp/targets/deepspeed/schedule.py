"""The state of the learning-rate schedule, whose lists have one value for every parameter group."""

from __future__ import annotations

from typing import Any

from core.errors import CheckpointError
from core_ucp.targets.deepspeed.made import Made
from core_ucp.targets.deepspeed.parameters import Parameters, source_groups
from core_ucp.view.view import View

_BY_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


def scheduler_state(made: Made, view: View, parameters: Parameters) -> dict[str, Any] | None:
    """The schedule's state for the groups of the target.

    Raises:
        CheckpointError: when its lists fit neither the groups of the source nor of the target.
    """
    if not view.resume.scheduler:
        made.remarks.append(
            "the source has no learning-rate schedule: where the run has one, load with"
            " load_lr_scheduler_states=False"
        )
        return None
    held = [group.names[0] for group in parameters.groups]
    trained = {name for group in parameters.groups for name in group.names}
    known = source_groups(view, [name for name in view.resume.hyper if name in trained])
    state = dict(view.resume.scheduler)
    for key in _BY_GROUP:
        values = state.get(key)
        if not isinstance(values, list):
            continue
        if len(values) == len(known):
            state[key] = [values[_place(known, name)] for name in held]
        elif len(values) != len(held):
            raise CheckpointError(
                f"{view.path} has a schedule for {len(values)} parameter groups",
                why=f"the source has {len(known)}, the target {len(held)}",
                fix="name the groups in the options",
            )
    return state


def _place(known: list[tuple[str, ...]], name: str) -> int:
    return next(index for index, names in enumerate(known) if name in names)

"""What stands in several files of a DeepSpeed checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.targets.deepspeed.parameters import Parameters

VERSION = "0.19.8"
"""Version of DeepSpeed whose files these are like."""
_NO_HYPER = ("params", "param_names")


def configuration(options: DeepSpeedOptions) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that decides how files look."""
    zero: dict[str, Any] = {"stage": options.stage}
    if options.alignment:
        zero["parameter_alignment"] = True
    if options.round_robin:
        zero["round_robin_gradients"] = True
    if options.stage == 3:
        zero["sub_group_size"] = options.sub_group_size
    precision: dict[str, Any] = (
        {} if options.dtype == "fp32" else {options.dtype: {"enabled": True}}
    )
    return {"zero_optimization": zero, **precision}


def param_groups(parameters: Parameters, members: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Parameter groups as torch writes them.

    Args:
        parameters: with the groups.
        members: numbers of what every group holds.
    """
    found: list[dict[str, Any]] = []
    for group, numbers in zip(parameters.groups, members, strict=True):
        hyper = {key: value for key, value in group.hyper.items() if key not in _NO_HYPER}
        if "betas" in hyper:
            # The Adam of DeepSpeed asks for it, that of torch does not mind.
            hyper.setdefault("bias_correction", True)
        found.append({**hyper, "params": list(numbers)})
    return found

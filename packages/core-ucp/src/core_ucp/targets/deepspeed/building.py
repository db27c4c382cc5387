"""Checkpoints that DeepSpeed's ``load_checkpoint`` takes for its own.

DeepSpeed loads optimizer states only into a run of the same stage, number of ranks, parameter
groups and order of parameters as the one that has saved them. The files are therefore made for one
such run, which the options describe.
"""

from __future__ import annotations

from dataclasses import replace

from core_ucp.targets.deepspeed.buckets import group_buckets, sub_buckets
from core_ucp.targets.deepspeed.flat_states import write_optimizer
from core_ucp.targets.deepspeed.made import Made
from core_ucp.targets.deepspeed.model_states import write_model
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.targets.deepspeed.parameters import Parameters, parameters
from core_ucp.targets.deepspeed.scaling import scaler_state
from core_ucp.targets.deepspeed.whole_states import whole_optimizer
from core_ucp.targets.target import NewFile, Target
from core_ucp.view.keys import parse_key
from core_ucp.view.view import View


def build(view: View, options: DeepSpeedOptions) -> Target:
    """Lay out a checkpoint for a run of DeepSpeed.

    Args:
        view: what it is made from.
        options: the run that is to load it.

    Raises:
        CheckpointError: for what DeepSpeed's files cannot express, naming parameters and reason.
    """
    found = parameters(view, options)
    steps = view.resume.counters.get("global_steps", view.resume.step or 0)
    options = replace(options, tag=options.tag or f"global_step{steps}")
    made = Made()
    made.remarks += found.remarks
    made.files.append(_latest(options))
    scaler, remarks = scaler_state(view, options)
    made.remarks += remarks
    made.remarks += _left_out(view, found, options)
    buckets = sub_buckets(found, options) if options.stage == 3 else []
    if options.stage in (1, 2):
        buckets = group_buckets(found, options)
    whole = None
    if options.stage == 0 and found.has_optimizer:
        whole = whole_optimizer(view, found, options, scaler)
    write_model(made, view, found, options, buckets, whole)
    if options.stage == 3 or (buckets and found.has_optimizer):
        write_optimizer(made, view, found, options, buckets, scaler)
    return made.target()


def _latest(options: DeepSpeedOptions) -> NewFile:
    tag = options.tag.encode()
    return NewFile("latest", len(tag), ((0, tag),))


def _left_out(view: View, found: Parameters, options: DeepSpeedOptions) -> list[str]:
    remarks: list[str] = []
    extra = [key for key in view.atoms if parse_key(key) is None]
    if extra:
        remarks.append(
            f"{len(extra):,} further tensors have no place in DeepSpeed: {extra[0]}, ..."
        )
    if not found.has_optimizer:
        remarks.append(
            "the source has no optimizer: load with load_optimizer_states=False and"
            " load_lr_scheduler_states=False"
        )
    half = options.half.itemsize
    rounded = [name for name in found.frozen if found.atoms[name].dtype.itemsize > half]
    if rounded:
        remarks.append(
            f"{len(rounded):,} frozen weights are rounded to {options.dtype}, DeepSpeed keeps no"
            f" others: {rounded[0]}, ..."
        )
    return remarks

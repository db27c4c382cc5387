"""Flat buffers of DeepSpeed: a parameter group of stages 1 and 2, a sub-group of stage 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from core.errors import CheckpointError
from core_ucp.layout.flat import FlatGroup, FlatParam, Spans
from core_ucp.targets.deepspeed.counting import known_step, require_equal
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.targets.deepspeed.parameters import Group, Parameters
from core_ucp.view.boxes import Table
from core_ucp.view.view import Atom, View


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters that lie in one flat buffer.

    Attributes:
        group: index of their parameter group.
        names: of the parameters in the order of the buffer.
        spans: what ranks hold.
        tail: elements at the end of each rank's part that belong to nothing, shape ``(ranks,)``.
        between: elements behind each parameter that align the next one.
    """

    group: int
    names: tuple[str, ...]
    spans: Spans
    tail: Table
    between: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class State:
    """One state of the optimizer for all parameters of a bucket.

    Attributes:
        name: of the state.
        dtype: of the buffer or number.
        atoms: by parameter name; parameters may lack it.
        shared: whether it is one number for all, and not a buffer.
        known: the number where no file has it.
    """

    name: str
    dtype: torch.dtype
    atoms: Mapping[str, Atom]
    shared: bool
    known: torch.Tensor | None = None


def group_buckets(parameters: Parameters, options: DeepSpeedOptions) -> list[Bucket]:
    """One buffer for every parameter group: stages 1 and 2."""
    numels = {name: math.prod(shape) for name, shape in parameters.shapes.items()}
    return [
        _group_bucket(index, group, numels, options)
        for index, group in enumerate(parameters.groups)
    ]


def _group_bucket(
    index: int, group: Group, numels: Mapping[str, int], options: DeepSpeedOptions
) -> Bucket:
    ranks, align = options.world_size, options.parameter_align
    names = group.names
    if options.round_robin:
        names = tuple(name for rank in range(ranks) for name in names[rank::ranks])
    layout = FlatGroup(names, parameter_align=align)
    spans = layout.spans({name: numels[name] for name in names}, ranks)
    numel = np.array([numels[name] for name in names], np.int64)
    between = -numel % align
    between[-1] = 0
    end = np.cumsum(spans.length)
    tail = np.clip(end - int((numel + between).sum()), 0, spans.length)
    return Bucket(index, names, spans, tail, tuple(between.tolist()))


def sub_buckets(parameters: Parameters, options: DeepSpeedOptions) -> list[Bucket]:
    """One buffer for every sub-group: stage 3."""
    ranks = options.world_size
    numels = {name: math.prod(shape) for name, shape in parameters.shapes.items()}
    found: list[Bucket] = []
    for index, group in enumerate(parameters.groups):
        for names in _sub_groups(group.names, numels, options):
            spans = FlatParam(names).spans({name: numels[name] for name in names}, ranks)
            none = np.zeros(ranks, np.int64)
            found.append(Bucket(index, names, spans, none, (0,) * len(names)))
    return found


def _sub_groups(
    names: tuple[str, ...], numels: Mapping[str, int], options: DeepSpeedOptions
) -> list[tuple[str, ...]]:
    """A sub-group is closed by the parameter with which its part reaches the limit."""
    found: list[list[str]] = [[]]
    held = 0
    for name in names:
        if held >= options.sub_group_size:
            found.append([])
            held = 0
        found[-1].append(name)
        held += -(-numels[name] // options.world_size)
    return [tuple(part) for part in found]


def bucket_states(view: View, parameters: Parameters, bucket: Bucket) -> list[State]:
    """The states of the optimizer for a bucket, numbers first.

    Raises:
        CheckpointError: for states that cannot lie in a flat buffer, and numbers that differ.
    """
    names: dict[str, dict[str, Atom]] = {}
    for parameter in bucket.names:
        for state, atom in parameters.states.get(parameter, {}).items():
            names.setdefault(state, {})[parameter] = atom
    found = [_state(view, parameters, bucket, name, atoms) for name, atoms in names.items()]
    if "exp_avg_sq" in names and "step" not in names:
        step = known_step(view, parameters.groups[bucket.group].hyper)
        found.append(State("step", step.dtype, {}, True, step))
    return sorted(found, key=lambda state: not state.shared)


def _state(
    view: View, parameters: Parameters, bucket: Bucket, name: str, atoms: Mapping[str, Atom]
) -> State:
    dtypes = {atom.dtype for atom in atoms.values()}
    dtype = next(iter(dtypes))
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    # The step of a parameter without dimensions looks like one of its moments.
    if name == "step" or all(atom.relation == "scalar" for atom in atoms.values()):
        require_equal(view, name, list(atoms), list(atoms.values()))
        return State(name, dtype, atoms, True)
    for parameter, atom in atoms.items():
        if atom.relation != "elementwise" or atom.shape != parameters.atoms[parameter].shape:
            raise CheckpointError(
                f"{name} of {parameter} cannot lie in a flat buffer of DeepSpeed",
                why=f"it is {atom.relation} of shape {list(atom.shape)}",
                fix="choose stage 0",
            )
    return State(name, dtype, atoms, False)


def incomplete(buckets: Sequence[Bucket], states: Sequence[Sequence[State]]) -> list[str]:
    """Parameters without a state that others of their buffer have."""
    return [
        f"{state.name} of {name}"
        for bucket, found in zip(buckets, states, strict=True)
        for state in found
        for name in bucket.names
        if not state.shared and name not in state.atoms
    ]

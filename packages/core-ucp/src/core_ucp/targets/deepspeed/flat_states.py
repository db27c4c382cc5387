"""Optimizer files of stages 1 to 3: every rank's part of the flat buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core_ucp.files.new_archives import Archive, new_archive
from core_ucp.files.new_pickles import Call, Encoded, Instance, Reference, Room, encode
from core_ucp.targets.deepspeed.buckets import Bucket, State, bucket_states, incomplete
from core_ucp.targets.deepspeed.common import VERSION, configuration, param_groups
from core_ucp.targets.deepspeed.made import Made
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.targets.deepspeed.parameters import Parameters
from core_ucp.targets.deepspeed.scaling import scaler_object
from core_ucp.view.boxes import Table
from core_ucp.view.keys import state_key, weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import View

_FRAGMENT = Reference("deepspeed.utils.tensor_fragment", "fragment_address")
_STAGE = Reference("deepspeed.runtime.zero.config", "ZeroStageEnum")

Rooms = list[tuple[Room, dict[str, Any]]]
"""For every bucket that of the master weights, and the states by name."""


def write_optimizer(
    made: Made,
    view: View,
    parameters: Parameters,
    options: DeepSpeedOptions,
    buckets: Sequence[Bucket],
    scaler: dict[str, Any],
) -> None:
    """Add the optimizer files of all ranks, and what goes into them.

    Raises:
        CheckpointError: for states that cannot lie in a flat buffer.
    """
    states = [bucket_states(view, parameters, bucket) for bucket in buckets]
    missing = incomplete(buckets, states)
    if missing:
        made.remarks.append(
            f"{len(missing):,} states are zeros, as of parameters that had no gradient in DeepSpeed:"
            f" {missing[0]}, ..."
        )
    same = _same_everywhere(parameters, options, buckets, scaler)
    start = len(made.files)
    per_rank: list[tuple[Archive, Rooms]] = []
    for rank in range(options.world_size):
        name = f"{options.tag}/{_name(options, rank)}"
        if options.stage == 3 and per_rank:
            archive, rooms = per_rank[0]
            per_rank.append((archive.named(name), rooms))
        else:
            rooms = _rooms(buckets, states, rank)
            tree = _tree(options, buckets, rooms, same, rank)
            per_rank.append((new_archive(name, tree), rooms))
    for archive, _ in per_rank:
        made.add(archive)
    files = np.arange(start, start + options.world_size, dtype=np.int64)
    for index, (bucket, found) in enumerate(zip(buckets, states, strict=True)):
        _want(made, parameters, bucket, found, per_rank, index, files)


def _name(options: DeepSpeedOptions, rank: int) -> str:
    prefix = "bf16_" if options.dtype == "bf16" else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _members(parameters: Parameters, buckets: Sequence[Bucket]) -> list[list[int]]:
    """Numbers of the buffers of every parameter group."""
    numbered = list(enumerate(bucket.group for bucket in buckets))
    return [[n for n, group in numbered if group == g] for g in range(len(parameters.groups))]


def _rooms(buckets: Sequence[Bucket], states: Sequence[Sequence[State]], rank: int) -> Rooms:
    return [
        _bucket_rooms(bucket, found, rank) for bucket, found in zip(buckets, states, strict=True)
    ]


def _bucket_rooms(
    bucket: Bucket, states: Sequence[State], rank: int
) -> tuple[Room, dict[str, Any]]:
    length, tail = int(bucket.spans.length[rank]), int(bucket.tail[rank])
    rooms: dict[str, Any] = {}
    for state in states:
        if state.known is not None:
            rooms[state.name] = state.known
        elif state.shared:
            rooms[state.name] = Room(state.dtype, next(iter(state.atoms.values())).shape)
        else:
            rooms[state.name] = Room(state.dtype, (length,))
    # DeepSpeed cuts the padding from the weights and leaves it in the states.
    return Room(torch.float32, (length - tail,)), rooms


@dataclass(frozen=True)
class _Same:
    """What is the same in the files of all ranks, pickled once."""

    groups: Encoded
    paddings: Encoded
    scaling: dict[str, Encoded]
    settings: Encoded


def _same_everywhere(
    parameters: Parameters,
    options: DeepSpeedOptions,
    buckets: Sequence[Bucket],
    scaler: dict[str, Any],
) -> _Same:
    scaling = {
        "loss_scaler": scaler_object(scaler),
        "dynamic_loss_scale": scaler["dynamic"],
        "overflow": False,
    }
    return _Same(
        encode(param_groups(parameters, _members(parameters, buckets))),
        encode([list(bucket.between) for bucket in buckets]),
        {key: encode(value) for key, value in scaling.items()},
        encode(configuration(options)),
    )


def _tree(
    options: DeepSpeedOptions, buckets: Sequence[Bucket], rooms: Rooms, same: _Same, rank: int
) -> dict[str, Any]:
    base = {
        "state": {index: states for index, (_, states) in enumerate(rooms) if states},
        "param_groups": same.groups,
    }
    masters = [master for master, _ in rooms]
    # The limit of clipping is left out: DeepSpeed would put it in the place of the run's own.
    state: dict[str, Any] = {"zero_stage": Call(_STAGE, (options.stage,)), **same.scaling}
    if options.stage == 3:
        state |= {
            "partition_count": options.world_size,
            "optimizer_state_dict": base,
            "fp32_flat_groups": masters,
        }
    else:
        state |= {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": masters,
            "group_paddings": [int(bucket.tail[rank]) for bucket in buckets],
            "param_alignment_paddings": same.paddings,
            "partition_count": [options.world_size] * len(buckets),
            "ds_version": VERSION,
            "param_slice_mappings": [_fragments(bucket, rank) for bucket in buckets],
        }
    return {"optimizer_state_dict": state, "ds_config": same.settings, "ds_version": VERSION}


def _fragments(bucket: Bucket, rank: int) -> OrderedDict[str, Instance]:
    return OrderedDict(
        (span.parameter, Instance(_FRAGMENT, {"numel": span.end - span.begin, "start": span.place}))
        for span in bucket.spans.of(rank)
    )


def _want(
    made: Made,
    parameters: Parameters,
    bucket: Bucket,
    states: Sequence[State],
    per_rank: Sequence[tuple[Archive, Rooms]],
    index: int,
    files: Table,
) -> None:
    """Have a bucket filled in the files of all ranks."""

    def places(state: str) -> Table:
        held = [(archive, *rooms[index]) for archive, rooms in per_rank]
        return np.array([a.places[found[state] if state else m] for a, m, found in held], np.int64)

    shapes = {name: parameters.atoms[name].shape for name in bucket.names}
    first = places("")
    masters = bucket.spans.pieces(shapes, files, first, torch.float32.itemsize)
    for name, pieces in masters.items():
        made.want(weight_key(name), shapes[name], torch.float32, pieces)
    for state in states:
        if state.known is not None:
            continue
        at = places(state.name)
        if state.shared:
            name, atom = next(iter(state.atoms.items()))
            made.want_copies(state_key(name, state.name), atom.shape, state.dtype, files, at)
            continue
        same = state.dtype.itemsize == torch.float32.itemsize
        found = (
            {name: _moved(pieces, int(files[0]), at - first) for name, pieces in masters.items()}
            if same
            else bucket.spans.pieces(shapes, files, at, state.dtype.itemsize)
        )
        for name in state.atoms:
            made.want(state_key(name, state.name), shapes[name], state.dtype, found[name])


def _moved(pieces: Pieces, start: int, by: Table) -> Pieces:
    """The same boxes at other places of the same files."""
    return Pieces(pieces.boxes, pieces.file, pieces.offset + by[pieces.file - start], pieces.stride)

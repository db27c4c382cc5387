"""The model's files: weights that compute, buffers, frozen weights, and all that is no tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from core.errors import CheckpointError
from core_ucp.files.new_archives import new_archive
from core_ucp.files.new_pickles import Room
from core_ucp.targets.deepspeed.buckets import Bucket
from core_ucp.targets.deepspeed.common import VERSION, configuration
from core_ucp.targets.deepspeed.made import Made
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.targets.deepspeed.parameters import Parameters
from core_ucp.targets.deepspeed.schedule import scheduler_state
from core_ucp.targets.deepspeed.whole_states import WholeOptimizer
from core_ucp.view.keys import weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import View


def write_model(
    made: Made,
    view: View,
    parameters: Parameters,
    options: DeepSpeedOptions,
    buckets: Sequence[Bucket],
    whole: WholeOptimizer | None,
) -> None:
    """Add the model's file, or those of all ranks (stage 3), and what goes into them.

    Raises:
        CheckpointError: when a file cannot hold a value that the source has saved along.
    """
    if options.stage == 3:
        _write_parts(made, view, parameters, options, buckets)
    else:
        _write_whole(made, view, parameters, options, buckets, whole)


def _write_whole(
    made: Made,
    view: View,
    parameters: Parameters,
    options: DeepSpeedOptions,
    buckets: Sequence[Bucket],
    whole: WholeOptimizer | None,
) -> None:
    rooms = {
        name: Room(_dtype(parameters, options, name), atom.shape)
        for name, atom in parameters.atoms.items()
    }
    frozen = [*parameters.frozen, *parameters.unclear]
    tree = {
        **_facts(made, view, parameters, options, buckets),
        **_frozen(parameters, frozen if options.stage == 2 else None, rooms),
        "module": _module(view, rooms),
        "optimizer": whole.tree if whole else None,
    }
    archive = new_archive(f"{options.tag}/mp_rank_00_model_states.pt", tree)
    file = made.add(archive)
    held = [(weight_key(name), room) for name, room in rooms.items()]
    for key, room in [*held, *(whole.rooms if whole else [])]:
        made.want_dense(key, room.shape, room.dtype, file, archive.places[room])


def _write_parts(
    made: Made,
    view: View,
    parameters: Parameters,
    options: DeepSpeedOptions,
    buckets: Sequence[Bucket],
) -> None:
    if parameters.unclear:
        raise CheckpointError(
            f"{parameters.unclear[0]} is a frozen weight or a buffer",
            why="stage 3 cuts the one and not the other, and the source does not tell",
            fix="name it in the options, under frozen or under buffers",
        )
    buffers = {
        name: Room(parameters.atoms[name].dtype, parameters.atoms[name].shape)
        for name in parameters.buffers
    }
    ranks = options.world_size
    fragments = {
        name: Room(options.half, (-(-parameters.atoms[name].numel // ranks),))
        for name in parameters.frozen
    }
    # Weights are cut to pieces when DeepSpeed saves, and nothing is left of them in the module.
    module = {name: buffers.get(name) or Room(options.half, (0,)) for name in parameters.atoms}
    tree = {
        **_facts(made, view, parameters, options, buckets),
        **_frozen(parameters, parameters.frozen, fragments),
        "module": _module(view, module),
        "optimizer": None,
    }
    archive = new_archive("", tree)
    start = len(made.files)
    for rank in range(ranks):
        name = f"{options.tag}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        made.add(archive.named(name))
    files = np.arange(start, start + ranks, dtype=np.int64)
    for name, room in buffers.items():
        pieces = _everywhere(room, files, archive.places[room])
        made.want(weight_key(name), room.shape, room.dtype, pieces)
    for name, room in fragments.items():
        atom = parameters.atoms[name]
        begin = np.minimum(np.arange(ranks, dtype=np.int64) * room.shape[0], atom.numel)
        end = np.minimum(begin + room.shape[0], atom.numel)
        offset = np.full(ranks, archive.places[room], np.int64)
        _, pieces = Pieces.ranges(atom.shape, begin, end, files, offset, room.dtype.itemsize)
        made.want(weight_key(name), atom.shape, room.dtype, pieces)


def _everywhere(room: Room, files: Any, offset: int) -> Pieces:
    """The whole of a tensor at the same place of several files."""
    one = Pieces.dense(room.shape, 0, offset, room.dtype.itemsize)
    rows = np.zeros(len(files), np.int64)
    copies = one.take(rows)
    return Pieces(copies.boxes, files, copies.offset, copies.stride)


def _dtype(parameters: Parameters, options: DeepSpeedOptions, name: str) -> torch.dtype:
    """Weights compute in the run's precision, buffers stay as they are."""
    known = parameters.atoms[name].dtype
    kept = name in parameters.buffers or not known.is_floating_point
    return known if kept else options.half


def _module(view: View, rooms: dict[str, Room]) -> OrderedDict[str, Room]:
    names = {alias: rooms[owner] for alias, owner in view.aliases.items() if owner in rooms}
    return OrderedDict({**rooms, **names})


def _frozen(
    parameters: Parameters, names: Sequence[str] | None, rooms: dict[str, Room]
) -> dict[str, Any]:
    if names is None:
        return {"frozen_param_shapes": None, "frozen_param_fragments": None}
    shapes = [(name, torch.Size(parameters.atoms[name].shape)) for name in names]
    return {
        "frozen_param_shapes": OrderedDict(shapes),
        "frozen_param_fragments": OrderedDict((name, rooms[name]) for name in names),
    }


def _facts(
    made: Made,
    view: View,
    parameters: Parameters,
    options: DeepSpeedOptions,
    buckets: Sequence[Bucket],
) -> dict[str, Any]:
    """Everything that is no tensor, with what the user has saved along."""
    counters = view.resume.counters
    steps = int(counters.get("global_steps", view.resume.step or 0))
    shapes = [
        OrderedDict((name, torch.Size(parameters.atoms[name].shape)) for name in bucket.names)
        for bucket in buckets
    ]
    facts = {
        "module": None,
        "buffer_names": list(parameters.buffers),
        "optimizer": None,
        "param_shapes": shapes if options.stage else None,
        "frozen_param_shapes": None,
        "shared_params": dict(view.aliases) if options.stage else None,
        "frozen_param_fragments": None,
        "lr_scheduler": scheduler_state(made, view, parameters),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": int(counters.get("skipped_steps", 0)),
        "global_steps": steps,
        "dp_world_size": options.world_size,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": configuration(options),
        # The converter of DeepSpeed refuses files without it.
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "ds_version": VERSION,
    }
    if "global_samples" in counters:
        facts["global_samples"] = int(counters["global_samples"])
    taken = sorted(set(facts) & set(view.resume.client))
    if taken:
        made.remarks.append(
            f"DeepSpeed has values of its own under these names: {', '.join(taken)}"
        )
    return {**view.resume.client, **facts}

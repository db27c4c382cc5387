"""ZeRO stage 3: every parameter is cut into equal parts of its own, which lie in sub-groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import CheckpointError
from core_ucp.files.pickles import Located
from core_ucp.layout.flat import FlatParam
from core_ucp.sources.deepspeed.content import Content, Model, Optimizer
from core_ucp.sources.deepspeed.scalars import Scalars
from core_ucp.sources.deepspeed.shares import Share
from core_ucp.sources.deepspeed.zero12 import Shapes, shapes_of
from core_ucp.view.keys import state_key, weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom


def read_zero3(content: Content, mp: int) -> Share:
    """What a model-parallel rank holds under ZeRO-3.

    Raises:
        CheckpointError: when the files do not hold what they say.
    """
    ranks = [content.optimizers[dp, mp] for dp in range(content.dp)]
    _require_plain(content, ranks)
    share = Share()
    groups = shapes_of(content, content.models[0, mp])
    settings = _settings(ranks[0])
    for index, shapes in enumerate(groups):
        flats = [_flat(content, rank, index) for rank in ranks]
        for name, atom in _atoms(content, ranks, shapes, flats, "master weights").items():
            share.atoms[weight_key(name)] = atom
        _read_states(content, ranks, index, shapes, share)
        if index in settings:
            share.hyper |= dict.fromkeys(shapes, settings[index])
    read_frozen(content, mp, share)
    return share


def _require_plain(content: Content, ranks: Sequence[Optimizer]) -> None:
    for rank in ranks:
        if rank.tree.get("ds_zero_partition_groups"):
            raise content.fail(
                "cuts parameters differently by group",
                why=f"{rank.name} has groups of partitions, as automatic expert parallelism makes",
                fix="convert it with ds_to_universal of DeepSpeed",
            )
        count = rank.tree.get("partition_count")
        if count is not None and count != len(ranks):
            raise content.fail(
                f"cuts parameters into {count!r} parts among {len(ranks)} ranks",
                why="parts are shared by groups of ranks, as MiCS does",
            )


def _settings(rank: Optimizer) -> dict[int, Mapping[str, Any]]:
    """Settings of the group of the user that every sub-group belongs to."""
    inner = rank.tree.get("optimizer_state_dict")
    groups = inner.get("param_groups", []) if isinstance(inner, Mapping) else []
    return {int(index): group for group in groups for index in group.get("params", [])}


def _flat(content: Content, rank: Optimizer, index: int) -> Any:
    flats = rank.tree.get("fp32_flat_groups")
    if not isinstance(flats, list) or index >= len(flats):
        raise CheckpointError(
            f"{content.folder.path / rank.name} holds no master weights of sub-group {index}"
        )
    return flats[index]


def _states_of(rank: Optimizer, index: int) -> Mapping[str, Any]:
    inner = rank.tree.get("optimizer_state_dict")
    states = inner.get("state", {}) if isinstance(inner, Mapping) else {}
    found = {str(k): v for k, v in states.get(index, {}).items() if v is not None}
    group = _settings(rank).get(index, {})
    return {"step": group["step"], **found} if "step" in group else found


def _read_states(
    content: Content, ranks: Sequence[Optimizer], index: int, shapes: Shapes, share: Share
) -> None:
    found = [_states_of(rank, index) for rank in ranks]
    for state in found[0]:
        values = [states.get(state) for states in found]
        if isinstance(values[0], Located) and values[0].shape:
            for name, atom in _atoms(content, ranks, shapes, values, state).items():
                share.atoms[state_key(name, state)] = atom
            continue
        what = f"{state} of sub-group {index}"
        shared = Scalars(content).agreed(values, [rank.name for rank in ranks], what)
        share.atoms |= {state_key(name, state): shared for name in shapes}


def _atoms(
    content: Content,
    ranks: Sequence[Optimizer],
    shapes: Shapes,
    tensors: Sequence[Any],
    what: str,
) -> dict[str, Atom]:
    """The parameters of a sub-group, cut out of one flat tensor of every rank."""
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    spans = FlatParam(tuple(shapes)).spans(numels, len(ranks))
    for row, (rank, tensor) in enumerate(zip(ranks, tensors, strict=True)):
        if not isinstance(tensor, Located) or len(tensor.shape) != 1 or not tensor.contiguous:
            raise CheckpointError(f"{content.folder.path / rank.name} holds no flat {what}")
        if tensor.numel < spans.length[row]:
            raise CheckpointError(
                f"{content.folder.path / rank.name} is too short",
                why=f"{what} from {next(iter(shapes))} on have {tensor.numel:,} elements and need"
                f" {int(spans.length[row]):,}",
            )
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise content.fail(f"holds {what} from {next(iter(shapes))} on in several dtypes")
    file = np.array([tensor.file for tensor in tensors], np.int64)
    offset = np.array([tensor.offset for tensor in tensors], np.int64)
    dtype = tensors[0].dtype
    pieces = spans.pieces(shapes, file, offset, dtype.itemsize)
    return {name: Atom(shape, dtype, pieces[name]) for name, shape in shapes.items()}


def read_frozen(content: Content, mp: int, share: Share) -> None:
    """Weights that are not trained: every rank holds a part in half precision."""
    models = [content.models[dp, mp] for dp in range(content.dp)]
    shapes = models[0].tree.get("frozen_param_shapes") or {}
    for name, size in shapes.items():
        shape = tuple(size)
        numel = math.prod(shape)
        share_of = -(-numel // len(models))
        parts = [_fragment(content, model, name, share_of) for model in models]
        begin = np.minimum(np.arange(len(parts), dtype=np.int64) * share_of, numel)
        end = np.minimum(begin + share_of, numel)
        filled = end > begin
        file = np.array([part.file for part in parts], np.int64)
        offset = np.array([part.offset for part in parts], np.int64)
        dtype = parts[0].dtype
        _, pieces = Pieces.ranges(
            shape, begin[filled], end[filled], file[filled], offset[filled], dtype.itemsize
        )
        share.halves[name] = Atom(shape, dtype, pieces)


def _fragment(content: Content, model: Model, name: str, numel: int) -> Located:
    part = (model.tree.get("frozen_param_fragments") or {}).get(name)
    if not isinstance(part, Located) or part.numel < numel or not part.contiguous:
        raise CheckpointError(
            f"{content.folder.path / model.name} does not hold its part of {name}",
            why=f"it should have {numel:,} elements",
        )
    return part

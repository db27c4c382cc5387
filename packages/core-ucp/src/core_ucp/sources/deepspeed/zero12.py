"""ZeRO stages 1 and 2: groups of parameters as flat vectors, of which every rank holds a part.

The addresses that DeepSpeed writes beside them (``param_slice_mappings``) are those of the order of
the model, which round-robin gradients shuffle. ``param_shapes`` has the order that is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import CheckpointError
from core_ucp.files.pickles import Located
from core_ucp.layout.flat import FlatGroup, Spans
from core_ucp.sources.deepspeed.content import Content, Model, Optimizer
from core_ucp.sources.deepspeed.experts import renumber
from core_ucp.sources.deepspeed.scalars import Scalars
from core_ucp.sources.deepspeed.shares import Share
from core_ucp.view.keys import state_key, weight_key
from core_ucp.view.view import Atom

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Group:
    """One flat vector and the ranks that share it.

    Attributes:
        index: of the group in the optimizer.
        shapes: of its parameters, in the order of the vector.
        members: files of the ranks, in the order of their parts.
        padding: elements behind every parameter.
        first: data-parallel rank of the first member.
    """

    index: int
    shapes: Shapes
    members: Sequence[Optimizer]
    padding: Sequence[int]
    first: int = 0


def read_zero12(content: Content, mp: int) -> Share:
    """What a model-parallel rank holds under ZeRO-1 or 2.

    Raises:
        CheckpointError: when the files do not hold what they say.
    """
    model = content.models[0, mp]
    ranks = [content.optimizers[dp, mp] for dp in range(content.dp)]
    share = Share()
    for index, shapes in enumerate(shapes_of(content, model)):
        for group in _parts(content, index, shapes, ranks):
            _read_group(content, group, share)
    return share


def shapes_of(content: Content, model: Model) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the parameters of every group, in the order in which they are stored."""
    groups = model.tree.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise CheckpointError(
            f"{content.folder.path / model.name} does not say the shapes of parameters",
            why="it has no param_shapes",
        )
    found = [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]
    for name, shape in (pair for group in found for pair in group.items()):
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise content.fail(f"says that {name} is of {list(shape)}")
    return found


def _parts(
    content: Content, index: int, shapes: Shapes, ranks: Sequence[Optimizer]
) -> list[_Group]:
    """A group, or one for every set of experts: those share vectors among fewer ranks."""
    tree = ranks[0].tree
    counts = tree.get("partition_count")
    count = counts[index] if isinstance(counts, list) and index < len(counts) else len(ranks)
    paddings = tree.get("param_alignment_paddings") or {}
    padding = paddings[index] if index < len(paddings) else [0] * len(shapes)
    if count == len(ranks):
        return [_Group(index, shapes, ranks, padding)]
    if not isinstance(count, int) or count < 1 or len(ranks) % count:
        raise content.fail(f"cuts group {index} into {count!r} parts among {len(ranks)} ranks")
    sets = len(ranks) // count
    return [
        _Group(index, renumber(shapes, rank), ranks[rank::sets], padding, rank)
        for rank in range(sets)
    ]


def _read_group(content: Content, group: _Group, share: Share) -> None:
    flats = [_flat(content, group, rank) for rank in group.members]
    states = [_states(content, group.index, rank) for rank in group.members]
    spans = _spans(content, group, flats, states)
    for name, atom in _atoms(content, group, spans, flats, "master weights").items():
        share.atoms[weight_key(name)] = atom
    scalars = Scalars(content)
    for state in states[0]:
        values = [found.get(state) for found in states]
        if isinstance(values[0], Located) and values[0].shape:
            for name, atom in _atoms(content, group, spans, values, state).items():
                share.atoms[state_key(name, state)] = atom
            continue
        names = [member.name for member in group.members]
        shared = scalars.agreed(values, names, f"{state} of group {group.index}")
        share.atoms |= {state_key(name, state): shared for name in group.shapes}
    settings = groups_of(content, group.members[0])
    if group.index < len(settings):
        share.hyper |= dict.fromkeys(group.shapes, settings[group.index])


def _flat(content: Content, group: _Group, rank: Optimizer) -> Located:
    flats = rank.tree.get("single_partition_of_fp32_groups")
    found = flats[group.index] if isinstance(flats, list) and group.index < len(flats) else None
    if not isinstance(found, Located):
        raise CheckpointError(
            f"{content.folder.path / rank.name} holds no master weights of group {group.index}"
        )
    return found


def _states(content: Content, index: int, rank: Optimizer) -> Mapping[str, Any]:
    """States of a group: by number as torch has them, or a list of them ("elastic")."""
    base = rank.tree.get("base_optimizer_state")
    if isinstance(base, list):
        found = base[index] if index < len(base) else {}
        step = rank.tree.get("base_optimizer_state_step")
    else:
        states = base.get("state", {}) if isinstance(base, Mapping) else {}
        found = states.get(index, {})
        groups = groups_of(content, rank)
        step = groups[index].get("step") if index < len(groups) else None
    states = {str(key): value for key, value in found.items() if value is not None}
    return states if step is None or "step" in states else states | {"step": step}


def groups_of(content: Content, rank: Optimizer) -> list[Mapping[str, Any]]:
    """Settings of the groups of the optimizer in a file of ZeRO-1 or 2."""
    base = rank.tree.get("base_optimizer_state")
    groups = base.get("param_groups") if isinstance(base, Mapping) else None
    return list(groups) if isinstance(groups, list) else []


def _spans(
    content: Content,
    group: _Group,
    flats: Sequence[Located],
    states: Sequence[Mapping[str, Any]],
) -> Spans:
    """Which rank holds which elements; the length of parts is that of the files."""
    order, numels = tuple(group.shapes), {k: math.prod(v) for k, v in group.shapes.items()}
    lengths = [flat.numel for flat in flats]
    lengths += [v.numel for s in states for v in s.values() if isinstance(v, Located) and v.shape]
    # The last rank keeps its masters without the padding; its moments, and all others, have it.
    part = max(lengths)
    spans = FlatGroup(order, max(1, part), _alignment(content, group)).spans(numels, len(flats))
    if int(spans.length[0]) != part and part:
        raise content.fail(
            f"holds {part * len(flats):,} elements of group {group.index}",
            why=f"its parameters have {sum(numels.values()):,}",
        )
    return spans


def _alignment(content: Content, group: _Group) -> int:
    """Elements that every parameter is padded to a multiple of."""
    numels = [math.prod(shape) for shape in group.shapes.values()]
    if not any(group.padding):
        return 1
    for align in (2, 4, 8, 16, 32, 64):
        expected = [-numel % align for numel in numels[:-1]] + [0]
        if expected == list(group.padding):
            return align
    raise content.fail(
        f"pads the parameters of group {group.index} in an unknown way",
        why=f"by {list(group.padding)[:8]} elements",
    )


def _atoms(
    content: Content, group: _Group, spans: Spans, tensors: Sequence[Any], what: str
) -> dict[str, Atom]:
    """The parameters of a group, cut out of one tensor of every rank."""
    for member, tensor in zip(group.members, tensors, strict=True):
        if not isinstance(tensor, Located) or len(tensor.shape) != 1 or not tensor.contiguous:
            raise CheckpointError(
                f"{content.folder.path / member.name} holds no flat {what} of group {group.index}"
            )
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise content.fail(
            f"holds {what} of group {group.index} in several dtypes", why=str(dtypes)
        )
    reach = np.zeros(len(tensors), np.int64)
    np.maximum.at(reach, spans.rank, spans.place + spans.end - spans.begin)
    short = reach > np.array([tensor.numel for tensor in tensors], np.int64)
    if short.any():
        row = int(short.argmax())
        raise CheckpointError(
            f"{content.folder.path / group.members[row].name} is too short",
            why=f"{what} of group {group.index} have {tensors[row].numel:,} elements and need"
            f" {int(reach[row]):,}",
        )
    file = np.array([tensor.file for tensor in tensors], np.int64)
    offset = np.array([tensor.offset for tensor in tensors], np.int64)
    dtype = tensors[0].dtype
    pieces = spans.pieces(group.shapes, file, offset, dtype.itemsize)
    return {name: Atom(group.shapes[name], dtype, pieces[name]) for name in group.shapes}

"""Runs without ZeRO: the optimizer's state as torch has it, with numbers instead of names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.errors import CheckpointError
from core_ucp.files.pickles import Located
from core_ucp.sources.deepspeed.content import Content
from core_ucp.sources.deepspeed.experts import is_expert
from core_ucp.sources.deepspeed.naming import Queue, name_by_bits, part_of
from core_ucp.sources.deepspeed.shares import Share, scalar_atom
from core_ucp.sources.order import names_by_index
from core_ucp.view.keys import state_key, weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

Shape = tuple[int, ...]
Groups = Sequence[Mapping[str, Any]]


def read_stage0(content: Content, mp: int, share: Share) -> None:
    """Add masters and states of a model-parallel rank, whose weights are in ``share`` already.

    Raises:
        CheckpointError: when the parameters that the optimizer numbers cannot be named.
    """
    model = content.models[0, mp]
    names = {name: atom.shape for name, atom in share.halves.items()}
    for buffer in model.tree.get("buffer_names") or ():
        names.pop(buffer, None)
    experts = sorted(at for at in content.folder.expert_optimizers if at[1] == mp)
    if not experts:
        _read(content, model.name, model.tree.get("optimizer"), names, share)
        return
    wanted = list(range(len(experts)))
    if [rank for rank, _ in experts] != wanted:
        raise content.fail("is incomplete", why="optimizer files of some experts are missing")
    held = [name for name in names if is_expert(name)]
    for rank, at in enumerate(experts):
        name = content.folder.expert_optimizers[at]
        mine = set(_experts_of(held, rank, len(experts)))
        local = {n: s for n, s in names.items() if not is_expert(n) or n in mine}
        _read(content, name, content.read(name).get("optimizer"), local, share)


def _experts_of(names: Iterable[str], rank: int, ranks: int) -> list[str]:
    """Names of the experts that one of the ranks holds: an equal share, in order."""
    by_layer: dict[str, dict[int, list[str]]] = {}
    for name in names:
        layer, _, rest = name.rpartition(".deepspeed_experts.")
        by_layer.setdefault(layer, {}).setdefault(int(rest.partition(".")[0]), []).append(name)
    found: list[str] = []
    for experts in by_layer.values():
        count = len(experts) // ranks
        for expert in range(rank * count, (rank + 1) * count):
            found += experts[expert]
    return found


def _read(content: Content, file: str, tree: Any, names: Mapping[str, Shape], share: Share) -> None:
    if not isinstance(tree, Mapping):
        content.remarks.append(f"{file} holds no optimizer, only weights")
        return
    inner = tree.get("optimizer_state_dict", tree)
    groups, states = inner.get("param_groups", []), inner.get("state", {})
    halves = {name: share.halves[name] for name in names}
    if tree.get("fp32_groups_flat") is not None:
        _read_flat(content, file, tree["fp32_groups_flat"], groups, states, halves, share)
        return
    masters = _masters(groups, tree.get("fp32_groups"))
    order = _named(content, groups, states, masters, halves)
    for number, name in order.items():
        if number in masters:
            share.atoms[weight_key(name)] = masters[number].atom()
        for state, value in states.get(number, {}).items():
            if value is not None:
                key = state_key(name, str(state))
                share.atoms.setdefault(key, _state(content, key, value, names[name]))
    for group in groups:
        share.hyper |= {order[n]: group for n in group.get("params", []) if n in order}


def _read_flat(
    content: Content,
    file: str,
    flats: Sequence[Any],
    groups: Groups,
    states: Mapping[int, Mapping[str, Any]],
    halves: Mapping[str, Atom],
    share: Share,
) -> None:
    """The optimizer of fused fp16: masters and states of a group are one flat tensor each."""
    queues = [Queue([flat], flat=True, named={}) for flat in flats]
    if not name_by_bits(content.files, queues, halves):
        raise content.fail(
            "keeps its master weights in flat groups whose order cannot be told",
            why=f"those of {file} are not the weights of the model in its order",
            fix="save the run with ZeRO stage 1",
        )
    for index, (queue, group) in enumerate(zip(queues, groups, strict=True)):
        found = {str(k): v for k, v in states.get(index, {}).items() if v is not None}
        if "step" in group:
            found.setdefault("step", group["step"])
        shared: dict[str, Atom] = {}
        first = 0
        for name, master in queue.named.items():
            share.atoms[weight_key(name)] = master
            for state, value in found.items():
                key = state_key(name, state)
                if isinstance(value, Located) and value.shape == queue.tensors[0].shape:
                    share.atoms[key] = part_of(value, first, master.shape)
                    continue
                if state not in shared:
                    shared[state] = scalar_atom(content.files, value, key)
                share.atoms[key] = shared[state]
            first += master.numel
        share.hyper |= dict.fromkeys(queue.named, group)


def _named(
    content: Content,
    groups: Groups,
    states: Mapping[int, Mapping[str, Any]],
    masters: Mapping[int, Located],
    halves: Mapping[str, Atom],
) -> dict[int, str]:
    """Names by number; groups of experts number those only, and the others all the rest."""
    shapes = {number: tensor.shape for number, tensor in masters.items()}
    for number, found in states.items():
        for value in found.values():
            if isinstance(value, Located) and value.shape:
                shapes.setdefault(number, value.shape)
    named: dict[int, str] = {}
    for experts in (False, True):
        some = [group for group in groups if bool(group.get("moe")) is experts]
        model = {name: half for name, half in halves.items() if is_expert(name) is experts}
        if not any(group.get("moe") for group in groups):
            model = dict(halves)
        if some:
            named |= _named_alike(content, some, shapes, masters, model)
    return named


def _named_alike(
    content: Content,
    groups: Groups,
    shapes: Mapping[int, Shape],
    masters: Mapping[int, Located],
    halves: Mapping[str, Atom],
) -> dict[int, str]:
    """Names by number, by shapes where they suffice, else by bits."""
    numbers = [[int(number) for number in group.get("params", [])] for group in groups]
    try:
        return names_by_index(groups, shapes, {name: half.shape for name, half in halves.items()})
    except CheckpointError as error:
        if not all(number in masters for row in numbers for number in row):
            raise content.fail(f"cannot be read: {error.what}", error.why, error.fix) from error
        queues = [Queue([masters[n] for n in row], flat=False, named={}) for row in numbers]
        if not name_by_bits(content.files, queues, halves):
            raise content.fail(f"cannot be read: {error.what}", error.why, error.fix) from error
    rows = zip(numbers, queues, strict=True)
    return {n: name for row, queue in rows for n, name in zip(row, queue.named, strict=True)}


def _masters(groups: Groups, fp32: Any) -> dict[int, Located]:
    """Master weights by number; a run in full precision has none but the weights."""
    if not isinstance(fp32, list):
        return {}
    found: dict[int, Located] = {}
    for group, tensors in zip(groups, fp32, strict=True):
        numbered = zip(group.get("params", []), tensors, strict=True)
        found |= {number: tensor for number, tensor in numbered if isinstance(tensor, Located)}
    return found


def _state(content: Content, key: str, value: Any, shape: Shape) -> Atom:
    if not isinstance(value, Located) or not value.shape:
        return scalar_atom(content.files, value, key)
    if value.shape == shape:
        return value.atom()
    if value.numel == math.prod(shape) and value.contiguous:
        return Atom(
            shape, value.dtype, Pieces.dense(shape, value.file, value.offset, value.dtype.itemsize)
        )
    raise CheckpointError(
        f"{key} is of {list(value.shape)}", why=f"its parameter is of {list(shape)}"
    )

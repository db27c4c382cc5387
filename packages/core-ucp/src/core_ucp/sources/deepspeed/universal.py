"""What DeepSpeed's own converter makes: a folder per parameter with a file per state.

It speaks two dialects. From stages 1 and 2 come dictionaries with the tensor and notes on how it
was joined, from stage 3 flat tensors whose shapes only the copied files of model states know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from core.disk import disk_errors
from core.errors import CheckpointError
from core_ucp.files.archives import read_archive
from core_ucp.files.pickles import Located
from core_ucp.sources.deepspeed.content import ALLOWED, Content, Model, Optimizer, read
from core_ucp.sources.deepspeed.experts import read_experts
from core_ucp.sources.deepspeed.folder import Folder
from core_ucp.sources.deepspeed.modules import read_module
from core_ucp.sources.deepspeed.shares import Share, scalar_atom
from core_ucp.sources.deepspeed.zero3 import read_frozen
from core_ucp.view.files import Files
from core_ucp.view.keys import MODEL, state_key, weight_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

_ZERO = "zero"
_WEIGHT = "fp32"
COMMON = f"{_ZERO}/optimizer_state.pt"
"""The file of what belongs to no single parameter."""


def universal_content(folder: Folder) -> Content:
    """The files of model states that were copied into a universal folder.

    Raises:
        CheckpointError: when they are missing, or damaged.
    """
    files = Files(folder.path)
    grid: Mapping[tuple[int, int], str] = folder.zero_models or {
        (0, rank): name for rank, name in folder.models.items()
    }
    if not grid:
        raise CheckpointError(
            f"{folder.path} is incomplete",
            why="it has no files of model states, as mp_rank_00_model_states.pt",
        )
    models = {at: Model(name, read(files, name)) for at, name in grid.items()}
    ranks = 1 + max(dp for dp, _ in grid)
    stage = 3 if folder.zero_models else 1
    content = Content(folder, files, stage, ranks, 1, 1, models)
    content.optimizers[0, 0] = Optimizer(COMMON, read(files, COMMON))
    return content


def read_universal(content: Content) -> Share:
    """All parameters of a universal folder.

    Raises:
        CheckpointError: when a file is damaged, or a tensor of unknown shape.
    """
    share = Share()
    for model in content.models.values():
        shared = model.tree.get("shared_params") or {}
        share.aliases |= {str(name): str(owner) for name, owner in shared.items()}
    shapes, frozen = _shapes(content), _frozen(content)
    for name in _names(content):
        if name in frozen:
            continue
        if name in share.aliases:
            content.remarks.append(
                f"{name} is {share.aliases[name]} under another name; its copy is not read"
            )
            continue
        _read_parameter(content, name, shapes.get(name), share)
    if content.folder.zero_models:
        read_frozen(content, 0, share)
    if len({mp for _, mp in content.models}) == 1:
        # Ranks of tensor parallelism hold parts, of which the converter has made wholes already.
        read_module(content, 0, share)
        read_experts(content, 0, share)
    _read_groups(content, share)
    return share


def _names(content: Content) -> list[str]:
    """Names of parameters: folders with a file of weights, however deep."""
    root = content.folder.path / _ZERO
    with disk_errors(f"cannot read {root}"):
        found = [path.parent for path in root.rglob(f"{_WEIGHT}.pt")]
    return sorted(folder.relative_to(root).as_posix() for folder in found)


def _shapes(content: Content) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, where the files of model states say them for whole tensors."""
    if len({mp for _, mp in content.models}) > 1:
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for model in content.models.values():
        for group in model.tree.get("param_shapes") or ():
            found |= {str(name): tuple(shape) for name, shape in group.items()}
    return found


def _frozen(content: Content) -> set[str]:
    """Weights that are not trained: they are whole, in half precision, in files beside."""
    if len({mp for _, mp in content.models}) > 1:
        return set()
    model = content.models[min(content.models)]
    return {str(name) for name in model.tree.get("frozen_param_fragments") or ()}


def _read_parameter(
    content: Content, name: str, shape: tuple[int, ...] | None, share: Share
) -> None:
    folder = content.folder.path / _ZERO / name
    with disk_errors(f"cannot read {folder}"):
        states = sorted(path.stem for path in folder.glob("*.pt"))
    for state in sorted(states, key=lambda state: state != _WEIGHT):
        file = f"{_ZERO}/{name}/{state}.pt"
        tree = read_archive(content.files, file, ALLOWED)
        value = tree.get("param") if isinstance(tree, Mapping) else tree
        key = weight_key(name) if state == _WEIGHT else state_key(name, state)
        if isinstance(value, int | float) or (isinstance(value, Located) and not value.shape):
            if state == _WEIGHT and shape:
                raise CheckpointError(f"{content.folder.path / file} holds one number")
            share.atoms[key] = scalar_atom(content.files, value, key)
            continue
        atom = _tensor(content, file, value, isinstance(tree, Mapping), shape)
        have = share.atoms.get(weight_key(name))
        if have is not None and have.shape != atom.shape:
            raise CheckpointError(
                f"{content.folder.path / file} is of {list(atom.shape)}",
                why=f"the weights of {name} are of {list(have.shape)}",
            )
        share.atoms[key] = atom


def _tensor(
    content: Content, file: str, value: Any, shaped: bool, shape: tuple[int, ...] | None
) -> Atom:
    path = content.folder.path / file
    if not isinstance(value, Located) or not value.contiguous:
        raise CheckpointError(f"{path} holds no tensor")
    if shaped:
        return value.atom()
    if shape is None:
        raise CheckpointError(
            f"{path} is a flat tensor of {value.numel:,} elements, and its shape is not known",
            why="no file of model states beside it names the parameter",
        )
    if math.prod(shape) != value.numel:
        raise CheckpointError(
            f"{path} has {value.numel:,} elements", why=f"the parameter is of {list(shape)}"
        )
    dense = Pieces.dense(shape, value.file, value.offset, value.dtype.itemsize)
    return Atom(shape, value.dtype, dense)


def _read_groups(content: Content, share: Share) -> None:
    """Settings of the optimizer by the groups in which the files of model states list names.

    From stage 3, the converter leaves the step of every group in the common file only.
    """
    tree = content.optimizers[0, 0].tree
    groups = _param_groups(tree)
    inner = tree.get("optimizer_state_dict")
    states = inner.get("state", {}) if isinstance(inner, Mapping) else {}
    listed = content.models[min(content.models)].tree.get("param_shapes") or []
    order = dict(enumerate(groups))
    if content.stage == 3:
        order = {int(index): group for group in groups for index in group.get("params", [])}
    known = {key.removeprefix(MODEL) for key in share.atoms if key.startswith(MODEL)}
    for index, shapes in enumerate(listed):
        names = [str(name) for name in shapes if str(name) in known]
        if index in order:
            share.hyper |= dict.fromkeys(names, order[index])
        step = states.get(index, {}).get("step")
        if step is not None:
            atom = scalar_atom(content.files, step, f"the step of group {index}")
            for name in names:
                share.atoms.setdefault(state_key(name, "step"), atom)


def _param_groups(tree: Any) -> list[Mapping[str, Any]]:
    """``param_groups``, however deep the converter has left them."""
    if not isinstance(tree, Mapping):
        return []
    if isinstance(tree.get("param_groups"), list):
        return [group for group in tree["param_groups"] if isinstance(group, Mapping)]
    inner = tree.get("optimizer_state_dict") or tree.get("base_optimizer_state")
    return _param_groups(inner)

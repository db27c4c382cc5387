"""What one model-parallel rank holds of a model, and putting several of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from core.errors import CheckpointError
from core_ucp.files import trees
from core_ucp.files.pickles import Located
from core_ucp.view.files import Files
from core_ucp.view.pieces import Pieces, join
from core_ucp.view.view import Atom


@dataclass
class Share:
    """Tensors by their names in the whole model, in the shapes that this rank has.

    Attributes:
        atoms: master weights and states of the optimizer, by key.
        halves: what computes, by parameter name: rounded weights, frozen ones, and buffers.
        aliases: names that stand for the tensor of another name.
        hyper: settings of the optimizer by parameter name.
    """

    atoms: dict[str, Atom] = field(default_factory=dict)
    halves: dict[str, Atom] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    hyper: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def merge(shares: Sequence[Share], where: str) -> Share:
    """Put stages of a pipeline together; what several of them hold must be equal.

    Args:
        shares: of the stages.
        where: names the checkpoint, for messages.

    Raises:
        CheckpointError: when two stages hold one name in different shapes.
    """
    whole = Share()
    for share in shares:
        _add(whole.atoms, share.atoms, where)
        _add(whole.halves, share.halves, where)
        whole.aliases |= share.aliases
        for name, settings in share.hyper.items():
            whole.hyper.setdefault(name, settings)  # in the order of the stages
    return whole


def _add(whole: dict[str, Atom], more: Mapping[str, Atom], where: str) -> None:
    for key, atom in more.items():
        have = whole.get(key)
        whole[key] = atom if have is None else with_replica(key, have, atom, where)


def with_replica(key: str, atom: Atom, copy: Atom, where: str) -> Atom:
    """An atom with one more copy of it.

    Raises:
        CheckpointError: when the copy is of another shape or dtype.
    """
    if (atom.shape, atom.dtype) != (copy.shape, copy.dtype):
        raise CheckpointError(
            f"{where} holds {key} twice, as {atom.dtype} of {list(atom.shape)} and as"
            f" {copy.dtype} of {list(copy.shape)}",
            why="files of several runs are mixed",
        )
    parts = [part for part in (atom.replicas, copy.pieces, copy.replicas) if part is not None]
    return Atom(atom.shape, atom.dtype, atom.pieces, atom.relation, join(parts))


def number(files: Files, value: Any, where: str) -> int | float:
    """A number, or the one element of a tensor in a file.

    Raises:
        CheckpointError: when it is anything else.
    """
    if isinstance(value, int | float):
        return value
    if not isinstance(value, Located) or value.numel != 1 or value.dtype.is_complex:
        raise CheckpointError(f"{where} is no number")
    return trees.number(files, value.atom())


def scalar_atom(files: Files, value: Any, name: str) -> Atom:
    """A number as an atom without dimensions, as optimizers of torch keep their steps.

    Args:
        files: gain a file in memory where the number is no tensor.
        value: a number, or a tensor of one element.
        name: of the file in memory.
    """
    if isinstance(value, Located) and not value.shape:
        return value.atom("scalar")
    found = number(files, value, name)
    single = np.float32(found)
    exact = single if single == found else np.float64(found)
    dtype = torch.float32 if exact is single else torch.float64
    index = files.add_bytes(name, exact.tobytes())
    return Atom((), dtype, Pieces.dense((), index, 0, dtype.itemsize), "scalar")

"""Steps that an optimizer has counted: one number per parameter here, one per group in DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from core.errors import CheckpointError
from core_ucp.files.trees import number
from core_ucp.view.view import Atom, View


def require_equal(view: View, state: str, names: Sequence[str], atoms: Sequence[Atom]) -> None:
    """Make sure that a number is the same for all parameters of a group.

    Parameters that refer to the same bytes of a file are compared without reading.

    Args:
        view: that holds the numbers.
        state: name of the number.
        names: of the parameters.
        atoms: their numbers.

    Raises:
        CheckpointError: naming two parameters whose numbers differ.
    """
    seen: dict[tuple[int, int], Any] = {}
    first: tuple[str, Any] | None = None
    for name, atom in zip(names, atoms, strict=True):
        place = (int(atom.pieces.file[0]), int(atom.pieces.offset[0])) if len(atom.pieces) else None
        if place is None or place not in seen:
            found = number(view.files, atom)
            if place is not None:
                seen[place] = found
            first = first or (name, found)
            if found != first[1]:
                raise CheckpointError(
                    f"{first[0]} and {name} cannot be in one flat buffer of DeepSpeed",
                    why=f"{state} is {first[1]} for one and {found} for the other",
                    fix="choose stage 0, or groups in which it is equal",
                )


def known_step(view: View, hyper: Any) -> torch.Tensor:
    """The step of an optimizer that keeps none as a tensor, as torch writes it.

    Raises:
        CheckpointError: when the source does not know it.
    """
    step = hyper.get("step") or view.resume.step
    if step is None:
        raise CheckpointError(
            f"{view.path} has the moments of an optimizer and not its step",
            why="corrections of the bias depend on it",
        )
    return torch.tensor(float(step))

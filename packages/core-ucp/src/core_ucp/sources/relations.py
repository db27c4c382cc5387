"""What tensors have to do with each other: states and their weights, and weights that are tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from core_ucp.view.keys import MODEL, parse_key, weight_key
from core_ucp.view.view import Atom, Relation


def relation(state: Atom, weight: Atom | None) -> Relation:
    """How a state belongs to its weight, as far as shape and dtype tell."""
    if state.numel == 1 and (weight is None or weight.shape != state.shape):
        return "scalar"
    if weight is None or state.shape == weight.shape:
        return "opaque" if state.dtype == torch.uint8 else "elementwise"
    remaining = iter(weight.shape)
    inside = all(size in remaining for size in state.shape)
    return "reduced" if inside and state.dtype.is_floating_point else "opaque"


def tied(atoms: Mapping[str, Atom]) -> tuple[dict[str, Atom], dict[str, str]]:
    """Weights that share their bytes, as one atom and aliases.

    The owner is the one that an optimizer knows, or the first.

    Returns:
        the atoms without the aliases, and the owners by alias.
    """
    stepped = {part.parameter for key in atoms if (part := parse_key(key)) and part.state}
    sharing: dict[tuple[Any, ...], list[str]] = {}
    for key, atom in atoms.items():
        if key.startswith(MODEL) and atom.numel:
            sharing.setdefault(_place(atom), []).append(key)
    aliases: dict[str, str] = {}
    for keys in sharing.values():
        names = [key.removeprefix(MODEL) for key in keys]
        owner = next((name for name in names if name in stepped), names[0])
        aliases |= {name: owner for name in names if name != owner}
    gone = {weight_key(name) for name in aliases}
    kept = {key: atom for key, atom in atoms.items() if key not in gone}
    return kept, aliases


def distinct(model: Mapping[str, Atom]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, of tied ones only the first."""
    first: dict[Any, str] = {}
    for name, atom in model.items():
        first.setdefault(_place(atom) if atom.numel else name, name)
    return {name: model[name].shape for name in first.values()}


def _place(atom: Atom) -> tuple[Any, ...]:
    """What tensors have in common that share their bytes."""
    table = atom.pieces
    places = (table.boxes.start, table.file, table.offset, table.stride)
    return (atom.shape, atom.dtype, *(column.tobytes() for column in places))

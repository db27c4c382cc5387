"""What every lens works on: parameters, each with its weight, its states and its settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.errors import CheckpointError
from core_ucp.layout import moves
from core_ucp.view.keys import parse_key, state_key, weight_key
from core_ucp.view.view import Atom, View

TWIN = "<twin>"
"""Role of the half-precision copy of a weight."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """Everything that a checkpoint holds of one parameter.

    Attributes:
        name: of the parameter.
        atoms: by role: the empty string for the weight, the name of a state, or :data:`TWIN`.
        hyper: its hyper-parameters, where there are any.
    """

    name: str
    atoms: Mapping[str, Atom]
    hyper: Mapping[str, Any] | None = None


Parameters = dict[str, Parameter]
"""All parameters of a checkpoint by name."""

AtomChange = Callable[[Sequence[Atom], str], Sequence[Atom]]
"""Makes the atoms of one role of the new parameters from those of the old ones."""


class Lens(ABC):
    """A change of how tensors are named, cut and arranged that loses nothing.

    Lenses work on tables: no tensor is read. They change a weight and the optimizer's states of
    it alike. Subclasses are frozen data classes.
    """

    @abstractmethod
    def change(self, parameters: Parameters) -> Parameters:
        """The parameters seen through the lens.

        Raises:
            CheckpointError: when it finds nothing to change, or cannot change what it finds.
        """

    @abstractmethod
    def inverse(self) -> Lens:
        """The lens that undoes this one.

        Raises:
            CheckpointError: when its patterns do not tell the old names.
        """

    def rename(self, name: str) -> str:
        """Name that an alias has after the change; only renaming lenses change it."""
        return name


def parameters_of(view: View) -> Parameters:
    """The parameters of a checkpoint, in its order."""
    found: dict[str, dict[str, Atom]] = {}
    for key, atom in view.atoms.items():
        part = parse_key(key)
        if part is not None:
            found.setdefault(part.parameter, {})[part.state] = atom
    for key, atom in view.twins.items():
        part = parse_key(key)
        if part is not None:
            found.setdefault(part.parameter, {})[TWIN] = atom
    hyper = view.resume.hyper
    return {name: Parameter(name, atoms, hyper.get(name)) for name, atoms in found.items()}


def with_parameters(view: View, parameters: Parameters, aliases: Mapping[str, str]) -> View:
    """A checkpoint with other parameters; what belongs to none stays."""
    atoms: dict[str, Atom] = {}
    twins = {key: twin for key, twin in view.twins.items() if parse_key(key) is None}
    for parameter in parameters.values():
        for role, atom in parameter.atoms.items():
            if role == TWIN:
                twins[weight_key(parameter.name)] = atom
            elif role:
                atoms[state_key(parameter.name, role)] = atom
            else:
                atoms[weight_key(parameter.name)] = atom
    atoms |= {key: atom for key, atom in view.atoms.items() if parse_key(key) is None}
    named = {p.name: p.hyper for p in parameters.values() if p.hyper is not None}
    known = parameters_of(view)
    others = {name: value for name, value in view.resume.hyper.items() if name not in known}
    resume = replace(view.resume, hyper={**named, **others})
    return replace(view, atoms=atoms, twins=twins, aliases=aliases, resume=resume)


def changed(old: Sequence[Parameter], names: Sequence[str], change: AtomChange) -> Parameters:
    """New parameters in place of old ones.

    Args:
        old: the parameters that are replaced.
        names: of the new ones.
        change: makes the new atoms of one role.

    Raises:
        CheckpointError: when the old ones do not have the same states and hyper-parameters, or
            have states that nobody may cut.
    """
    first = old[0]
    for other in old[1:]:
        _require_alike(first, other)
    made: list[dict[str, Atom]] = [{} for _ in names]
    for role in first.atoms:
        atoms = [parameter.atoms[role] for parameter in old]
        if first.atoms[role].relation == "scalar":
            # Equal numbers: each new parameter has one, and the copies are compared when read.
            results: Sequence[Atom] = [moves.copies(atoms)] * len(names)
        else:
            for parameter in old:
                _require_elementwise(parameter, role)
            results = change(atoms, role)
        for atoms_of, atom in zip(made, results, strict=True):
            atoms_of[role] = atom
    return {
        name: Parameter(name, atoms, first.hyper) for name, atoms in zip(names, made, strict=True)
    }


def replaced(
    parameters: Parameters, old: Sequence[Sequence[str]], new: Sequence[Parameters]
) -> Parameters:
    """All parameters, with new ones where the first of the old ones was.

    Raises:
        CheckpointError: when a new one has the name of one that stays.
    """
    place = {names[0]: made for names, made in zip(old, new, strict=True)}
    gone = {name for names in old for name in names}
    result: Parameters = {}
    for name, parameter in parameters.items():
        arrivals = place.get(name, {}) if name in gone else {name: parameter}
        for arrival, made in arrivals.items():
            if arrival in result:
                raise CheckpointError(f"two parameters would be called {arrival}")
            result[arrival] = made
    return result


def _require_alike(first: Parameter, other: Parameter) -> None:
    if set(first.atoms) != set(other.atoms):
        odd = min(set(first.atoms) ^ set(other.atoms))
        raise CheckpointError(
            f"{first.name} and {other.name} cannot become one tensor",
            why=f"one of them has {odd or 'a weight'!r}, and the other has not",
        )
    for role, atom in first.atoms.items():
        twin = other.atoms[role]
        same = (atom.dtype, atom.relation, atom.exponent)
        if same != (twin.dtype, twin.relation, twin.exponent):
            raise CheckpointError(
                f"{first.name} and {other.name} cannot become one tensor",
                why=f"{role or 'weight'}: {same} and {(twin.dtype, twin.relation, twin.exponent)}",
            )
    if not equal_settings(first.hyper, other.hyper):
        raise CheckpointError(
            f"{first.name} and {other.name} cannot become one tensor",
            why=f"their hyper-parameters differ: {first.hyper} and {other.hyper}",
            fix="train them with equal ones, or convert without this lens",
        )


def equal_settings(left: Any, right: Any) -> bool:
    """Whether hyper-parameters are equal, also where they are arrays."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal_settings(left[k], right[k]) for k in left)
    return type(left) is type(right) and bool(np.all(np.asarray(left == right)))


def _require_elementwise(parameter: Parameter, role: str) -> None:
    relation = parameter.atoms[role].relation
    if relation != "elementwise":
        raise CheckpointError(
            f"{parameter.name} cannot be rearranged",
            why=f"its state {role!r} is {relation}, not one number per element",
            fix="convert without this lens",
        )

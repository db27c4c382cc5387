"""A checkpoint as rules want it seen: dtypes, means of copies, and lenses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from core.checkpoints.boxes import memory
from core.errors import CheckpointError
from core_ucp.layout.averaging import mean
from core_ucp.layout.lenses import apply
from core_ucp.layout.rules import Rule, Rules
from core_ucp.view.keys import parse_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

_BY_NAME = ("order", "groups", "buffers")
"""Details that name parameters."""


def seen(view: View, rules: Rules) -> View:
    """A checkpoint as rules want it seen, without reading more than what is averaged.

    Args:
        view: what the files hold; layouts have been heeded where they count.
        rules: one for every parameter, unless there are only lenses.

    Raises:
        CheckpointError: for a parameter without a rule, a rule or a lens without a parameter, and
            a change that a tensor cannot take.
    """
    found = view
    if rules.rules:
        buffers = set(view.details.get("buffers", ()))
        parts = [part for key in view.atoms if (part := parse_key(key)) is not None]
        names = dict.fromkeys([part.parameter for part in parts if not part.state])
        assigned = rules.assign([*(name for name in names if name not in buffers), *view.aliases])
        found = _averaged(_typed(found, assigned), assigned)
    if rules.view_lenses:
        found = apply(found, rules.view_lenses)
        known = {part.parameter for key in found.atoms if (part := parse_key(key)) is not None}
        details = {
            name: value
            for name, value in found.details.items()
            if name not in _BY_NAME or _names(value) <= known
        }
        found = replace(found, details=details)
    same = {key: d for key, d in view.digests.items() if view.atoms[key] is found.atoms.get(key)}
    return replace(found, digests=same)


def _names(value: object) -> set[str]:
    """Names in lists, and in lists of lists."""
    if isinstance(value, str):
        return {value}
    return (
        {name for item in value for name in _names(item)}
        if isinstance(value, list | tuple)
        else set()
    )


def _typed(view: View, assigned: Mapping[str, Rule]) -> View:
    """Weights in the dtypes that their rules give."""
    atoms = dict(view.atoms)
    for key, atom in view.atoms.items():
        part = parse_key(key)
        rule = None if part is None or part.state else assigned.get(part.parameter)
        if rule is None or rule.dtype is None or rule.dtype == atom.dtype:
            continue
        if not (rule.dtype.is_floating_point and atom.dtype.is_floating_point):
            raise CheckpointError(
                f"the rule {rule.match!r} wants {key} as {rule.dtype}", why=f"it is {atom.dtype}"
            )
        atoms[key] = replace(atom, dtype=rule.dtype, stored_as=atom.stored)
    lossy = [key for key, atom in atoms.items() if atom is not view.atoms[key]]
    said = [f"{key} is rounded to {atoms[key].dtype}" for key in lossy]
    return replace(view, atoms=atoms, lossy=[*view.lossy, *said])


def _averaged(view: View, assigned: Mapping[str, Rule]) -> View:
    """The mean of copies in place of the first of them, where a rule says so."""
    atoms, said = dict(view.atoms), list(view.lossy)
    twins = dict(view.twins)
    for key, atom in view.atoms.items():
        part = parse_key(key)
        rule = None if part is None else assigned.get(part.parameter)
        if rule is None or not rule.lossy or atom.replicas is None or not atom.numel:
            continue
        value = mean(key, atom, view.files)
        file = view.files.add_bytes(f"the mean of {key}", bytes(memory(value)))
        pieces = Pieces.dense(atom.shape, file, 0, value.dtype.itemsize)
        atoms[key] = Atom(atom.shape, value.dtype, pieces, atom.relation)
        twins.pop(key, None)
        said.append(f"{key} is the mean of its copies")
    return replace(view, atoms=atoms, twins=twins, lossy=said)

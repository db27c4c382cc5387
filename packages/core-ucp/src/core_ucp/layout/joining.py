"""Lenses that join parameters into one tensor, and take it apart again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from core.errors import CheckpointError
from core_ucp.layout import moves
from core_ucp.layout.lens import Lens, Parameters, changed, replaced
from core_ucp.layout.names import Pattern, filled
from core_ucp.view.view import Atom


@dataclass(frozen=True)
class Split(Lens):
    """One parameter becomes several ones along a dimension, such as qkv becomes q, k and v.

    Args:
        match: pattern of the joined parameter's name.
        to: names of the parts in their order, with the pattern's groups.
        dim: along which it is cut.
        parts: relative widths of the parts, such as the numbers of query, key and value heads;
            equal unless given.
        regex: whether ``match`` is a regular expression.
    """

    match: str
    to: tuple[str, ...]
    dim: int = 0
    parts: tuple[int, ...] = ()
    regex: bool = False

    def change(self, parameters: Parameters) -> Parameters:
        pattern = Pattern(self.match, self.regex)
        old: list[list[str]] = []
        new: list[Parameters] = []
        for name, parameter in parameters.items():
            groups = pattern.groups(name)
            if groups is not None:
                targets = [filled(to, groups) for to in self.to]
                old.append([name])
                new.append(changed([parameter], targets, partial(self._cut, name)))
        return replaced(parameters, old, new)

    def inverse(self) -> Merge:
        pattern = Pattern(self.match, self.regex)
        back = [pattern.inverse(to) for to in self.to]
        return Merge(
            tuple(p.text for p in back), pattern.template(), self.dim, self.parts, self.regex
        )

    def _cut(self, name: str, atoms: Sequence[Atom], role: str) -> list[Atom]:
        atom = atoms[0]
        widths = _widths(atom, name, self.dim, self.parts or (1,) * len(self.to), len(self.to))
        begins = [sum(widths[:index]) for index in range(len(widths))]
        return [
            moves.taken(atom, self.dim, begin, width)
            for begin, width in zip(begins, widths, strict=True)
        ]


@dataclass(frozen=True)
class Merge(Lens):
    """Several parameters become one along a dimension, such as gate and up become one.

    They need equal hyper-parameters.

    Args:
        match: patterns of the parts' names in their order, all with the same groups.
        to: name of the joined parameter, with the groups.
        dim: along which they are joined.
        parts: relative widths of the parts; equal unless given.
        regex: whether ``match`` are regular expressions.
    """

    match: tuple[str, ...]
    to: str
    dim: int = 0
    parts: tuple[int, ...] = ()
    regex: bool = False

    def change(self, parameters: Parameters) -> Parameters:
        patterns = [Pattern(text, self.regex) for text in self.match]
        found: dict[str, dict[int, str]] = {}
        for name in parameters:
            for index, pattern in enumerate(patterns):
                groups = pattern.groups(name)
                if groups is not None:
                    found.setdefault(filled(self.to, groups), {})[index] = name
        for target, names in found.items():
            lacking = sorted(set(range(len(patterns))) - set(names))
            if lacking:
                raise CheckpointError(
                    f"{target} cannot be joined",
                    why=f"{next(iter(names.values()))} is there, and nothing matches"
                    f" {self.match[lacking[0]]!r}",
                )
        return _united(parameters, found, self._join)

    def inverse(self) -> Split:
        patterns = [Pattern(text, self.regex) for text in self.match]
        back = patterns[0].inverse(self.to)
        names = tuple(pattern.template() for pattern in patterns)
        return Split(back.text, names, self.dim, self.parts, self.regex)

    def _join(self, target: str, atoms: Sequence[Atom], role: str) -> list[Atom]:
        shapes = [atom.shape for atom in atoms]
        outside = {(*s[: self.dim], -1, *s[self.dim + 1 :]) for s in shapes if len(s) > self.dim}
        if len(outside) != 1 or any(len(shape) <= self.dim for shape in shapes):
            raise CheckpointError(
                f"{target} cannot be joined along dimension {self.dim}",
                why=f"the parts are of {[list(shape) for shape in shapes]}",
            )
        atom = moves.joined(atoms, self.dim)
        parts = self.parts or (1,) * len(atoms)
        if _widths(atom, target, self.dim, parts, len(atoms)) != [s[self.dim] for s in shapes]:
            raise CheckpointError(
                f"{target} cannot be joined along dimension {self.dim}",
                why=f"the parts are of {[list(s) for s in shapes]}, which is not {list(parts)}",
                fix="correct `parts`",
            )
        return [atom]


@dataclass(frozen=True)
class Stack(Lens):
    """Parameters that are numbered become one along a new dimension: experts, layers.

    They need equal hyper-parameters.

    Args:
        match: pattern of the names, such as ``"mlp.experts.{e}.w1"``.
        to: name of the stacked parameter, with the pattern's other groups.
        group: that counts from zero.
        dim: position of the new dimension.
        regex: whether ``match`` is a regular expression.
    """

    match: str
    to: str
    group: str
    dim: int = 0
    regex: bool = False

    def change(self, parameters: Parameters) -> Parameters:
        pattern = Pattern(self.match, self.regex)
        found: dict[str, dict[int, str]] = {}
        for name in parameters:
            groups = pattern.groups(name)
            if groups is not None:
                number = groups.get(self.group, "")
                if not number.isdecimal() or number != str(int(number)):
                    raise CheckpointError(
                        f"{name} cannot be stacked", why=f"{self.group!r} counts nothing in it"
                    )
                found.setdefault(filled(self.to, groups), {})[int(number)] = name
        for target, names in found.items():
            if set(names) != set(range(len(names))):
                lacking = min(set(range(len(names))) - set(names))
                raise CheckpointError(
                    f"{target} cannot be stacked", why=f"number {lacking} of it is missing"
                )
        return _united(parameters, found, self._join)

    def inverse(self) -> Unstack:
        pattern = Pattern(self.match, self.regex)
        back = pattern.inverse(self.to, {self.group: ""})
        return Unstack(back.text, pattern.template(), self.group, self.dim, self.regex)

    def _join(self, target: str, atoms: Sequence[Atom], role: str) -> list[Atom]:
        shapes = {atom.shape for atom in atoms}
        if len(shapes) > 1 or self.dim > len(atoms[0].shape):
            raise CheckpointError(
                f"{target} cannot be stacked along dimension {self.dim}",
                why=f"the parts are of {[list(shape) for shape in sorted(shapes)]}",
            )
        return [moves.stacked(atoms, self.dim)]


@dataclass(frozen=True)
class Unstack(Lens):
    """One parameter becomes as many as a dimension is long, which they do not have.

    Args:
        match: pattern of the stacked parameter's name.
        to: names, with the pattern's groups and the one that counts.
        group: that counts from zero.
        dim: that is taken away.
        regex: whether ``match`` is a regular expression.
    """

    match: str
    to: str
    group: str
    dim: int = 0
    regex: bool = False

    def change(self, parameters: Parameters) -> Parameters:
        pattern = Pattern(self.match, self.regex)
        old: list[list[str]] = []
        new: list[Parameters] = []
        for name, parameter in parameters.items():
            groups = pattern.groups(name)
            if groups is None:
                continue
            atom = next(iter(parameter.atoms.values()))
            if len(atom.shape) <= self.dim or atom.shape[self.dim] == 0:
                raise CheckpointError(
                    f"{name} cannot be unstacked along dimension {self.dim}",
                    why=f"it is of {list(atom.shape)}",
                )
            count = atom.shape[self.dim]
            targets = [filled(self.to, {**groups, self.group: str(i)}) for i in range(count)]
            old.append([name])
            new.append(
                changed([parameter], targets, lambda atoms, _: moves.unstacked(atoms[0], self.dim))
            )
        return replaced(parameters, old, new)

    def inverse(self) -> Stack:
        pattern = Pattern(self.match, self.regex)
        back = pattern.inverse(self.to, {self.group: r"\d+"})
        return Stack(back.text, pattern.template(), self.group, self.dim, self.regex)


def _united(
    parameters: Parameters,
    found: Mapping[str, Mapping[int, str]],
    join: Callable[[str, Sequence[Atom], str], Sequence[Atom]],
) -> Parameters:
    """All parameters, with those that become one joined.

    Args:
        parameters: before the change.
        found: names of the parts by their numbers from zero on, by the name of the joined one.
        join: makes an atom of those of one role, for the name of the joined one.
    """
    place = {name: index for index, name in enumerate(parameters)}
    old: list[list[str]] = []
    new: list[Parameters] = []
    for target, names in found.items():
        parts = [parameters[names[index]] for index in range(len(names))]
        old.append(sorted(names.values(), key=place.__getitem__))
        new.append(changed(parts, [target], partial(join, target)))
    return replaced(parameters, old, new)


def _widths(atom: Atom, name: str, dim: int, parts: tuple[int, ...], count: int) -> list[int]:
    if len(atom.shape) <= dim or len(parts) != count:
        raise CheckpointError(
            f"{name} cannot be cut along dimension {dim} into {count}",
            why=f"it is of {list(atom.shape)}, and {len(parts)} widths are given",
        )
    total, extent = sum(parts), atom.shape[dim]
    if total < 1 or any(extent * part % total for part in parts):
        raise CheckpointError(
            f"{name} cannot be cut along dimension {dim}",
            why=f"its length {extent} is not made of {list(parts)}",
        )
    return [extent * part // total for part in parts]

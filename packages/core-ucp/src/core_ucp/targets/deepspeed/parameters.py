"""Which parameters the optimizer of the target holds, in which groups, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import CheckpointError, closest
from core_ucp.sources.deepspeed.experts import is_expert
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.view.keys import parse_key
from core_ucp.view.view import Atom, View

Shape = tuple[int, ...]
_LAYER = re.compile(r"(?:\d+|tied_modules)\.")


@dataclass(frozen=True)
class Group:
    """A parameter group.

    Attributes:
        names: of its parameters in the order of the optimizer.
        hyper: hyper-parameters.
    """

    names: tuple[str, ...]
    hyper: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Parameters:
    """All tensors of the model by what they are to DeepSpeed.

    Attributes:
        atoms: all weights and buffers by name.
        states: states of the optimizer by parameter name and name of the state.
        groups: of the trained parameters.
        frozen: weights that are not trained, and empty ones, which DeepSpeed counts among them.
        buffers: tensors of the model that are no weights.
        unclear: frozen weights or buffers, the source does not tell.
        remarks: what a user should know.
    """

    atoms: Mapping[str, Atom]
    states: Mapping[str, Mapping[str, Atom]]
    groups: tuple[Group, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    unclear: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all weights and buffers."""
        return {name: atom.shape for name, atom in self.atoms.items()}

    @property
    def has_optimizer(self) -> bool:
        """Whether there is anything of an optimizer."""
        return bool(self.states) or any(group.hyper for group in self.groups)


def parameters(view: View, options: DeepSpeedOptions) -> Parameters:
    """Sort the tensors of a view.

    Raises:
        CheckpointError: for names that the source lacks, groups that cannot be, and missing
            hyper-parameters.
    """
    atoms: dict[str, Atom] = {}
    states: dict[str, dict[str, Atom]] = {}
    for key, atom in view.atoms.items():
        part = parse_key(key)
        if part is not None and part.state:
            states.setdefault(part.parameter, {})[part.state] = atom
        elif part is not None:
            atoms[part.parameter] = atom
    atoms = _in_order(view, atoms)
    _require_whole_model(view, atoms)
    _require_known(view, atoms, [*states, *options.frozen, *options.buffers, *_named_in(options)])
    frozen = {*view.details.get("frozen", ()), *options.frozen} & set(atoms)
    buffers = {*view.details.get("buffers", ()), *options.buffers} & set(atoms)
    buffers |= {name for name, atom in atoms.items() if not atom.dtype.is_floating_point}
    named = _named_in(options)
    empty = {name for name, atom in atoms.items() if not atom.numel}
    held = {*view.resume.hyper, *named} if options.whole else set[str]()
    untrained = frozen | buffers | (empty - held)
    trained = [name for name in _trained(view, atoms, states, named) if name not in untrained]
    rest = [name for name in atoms if name not in {*trained, *buffers}]
    if "buffers" in view.details:
        frozen |= set(rest)
    return Parameters(
        atoms=atoms,
        states={name: states[name] for name in trained if name in states},
        groups=_groups(view, options, trained, empty=empty, stepped=bool(states)),
        frozen=tuple(name for name in rest if name in frozen),
        buffers=tuple(name for name in atoms if name in buffers),
        unclear=tuple(name for name in rest if name not in frozen),
        remarks=_remarks(view, options, trained),
    )


def _require_whole_model(view: View, names: Iterable[str]) -> None:
    """Refuse models whose weights DeepSpeed looks for in files by expert or by layer."""
    for name in names:
        kind = "an expert of DeepSpeed" if is_expert(name) else ""
        if view.details.get("pipeline") and _LAYER.match(name):
            kind = "a layer of a pipeline"
        if kind:
            raise CheckpointError(
                f"{name} of {view.path} is {kind}",
                why="DeepSpeed loads those from files of their own, and only files of data-parallel"
                " runs are made",
                fix="rename the weights by rules to those of a model that is loaded as a whole",
            )


def _in_order(view: View, atoms: dict[str, Atom]) -> dict[str, Atom]:
    """Tensors in the order of the model, where the source knows it: stage 0 is read by it."""
    order = [name for name in view.details.get("order", ()) if name in atoms]
    return {name: atoms[name] for name in order} if len(order) == len(atoms) else atoms


def _require_known(view: View, atoms: Mapping[str, Atom], names: Iterable[str]) -> None:
    for name in names:
        if name not in atoms:
            raise CheckpointError(f"{view.path} has no weight {name!r}{closest(name, list(atoms))}")


def _named_in(options: DeepSpeedOptions) -> list[str]:
    """Trained parameters that the options name."""
    groups = options.groups if isinstance(options.groups, tuple) else ()
    return [*options.order, *(name for names in groups for name in names)]


def _trained(
    view: View,
    atoms: Mapping[str, Atom],
    states: Mapping[str, Mapping[str, Atom]],
    named: Sequence[str],
) -> list[str]:
    """Parameters of the optimizer; all weights where the source has no optimizer."""
    known = [name for name in view.resume.hyper if name not in view.aliases]
    _require_known(view, atoms, known)
    if known:
        return [*known, *(name for name in named if name not in known and not atoms[name].numel)]
    return [name for name in atoms if name in states] if states else list(atoms)


def _groups(
    view: View, options: DeepSpeedOptions, trained: Sequence[str], empty: set[str], stepped: bool
) -> tuple[Group, ...]:
    given = {name: {**view.resume.hyper.get(name, {}), **options.hyper} for name in trained}
    # An empty parameter that no source mentions goes along with the others of its group.
    hyper = {name: values for name, values in given.items() if values or name not in empty}
    without = next((name for name, values in hyper.items() if not values), None)
    if stepped and without is not None:
        raise CheckpointError(
            f"{view.path} has no hyper-parameters for {without}",
            why="DeepSpeed takes learning rate, weight decay and the like from its files",
            fix="give them in the options (hyper)",
        )
    found = tuple(Group(names, _shared(names, hyper)) for names in _named(view, options, trained))
    if not found:
        raise CheckpointError(f"{view.path} has no parameter that is trained")
    return found


def _named(view: View, options: DeepSpeedOptions, trained: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of the parameters of every group, in order."""
    if isinstance(options.groups, tuple):
        if not all(options.groups):
            raise CheckpointError("a parameter group of the options is empty")
        _require_all(trained, [name for names in options.groups for name in names], "groups")
        return list(options.groups)
    if options.order:
        _require_all(trained, options.order, "order")
        trained = options.order
    if options.groups == "one":
        held = set(trained)
        return [tuple(trained if options.order else _model_order(view, held))]
    return source_groups(view, trained, ordered=bool(options.order))


def source_groups(
    view: View, trained: Sequence[str], *, ordered: bool = False
) -> list[tuple[str, ...]]:
    """Names of the parameters of every group of the source.

    Where it does not tell its groups, parameters with equal hyper-parameters are in one.

    Args:
        view: the source.
        trained: names of all parameters.
        ordered: whether groups follow the order of those names, and not their own.
    """
    known: Sequence[Sequence[str]] = view.details.get("groups", ())
    if sorted(name for names in known for name in names) == sorted(trained):
        place = {name: index if ordered else 0 for index, name in enumerate(trained)}
        return [tuple(sorted(names, key=place.__getitem__)) for names in known]
    equal: dict[str, list[str]] = {}
    for name in trained:
        equal.setdefault(_text(view.resume.hyper.get(name, {})), []).append(name)
    return [tuple(names) for names in equal.values()]


def _model_order(view: View, held: set[str]) -> list[str]:
    """Names in the order of the model, where the source knows it, else in that of its files."""
    known = [name for name in view.details.get("order", ()) if name in held]
    if set(known) == held:
        return known
    parts = (parse_key(key) for key in view.atoms)
    names = (part.parameter for part in parts if part is not None and not part.state)
    return [name for name in names if name in held]


def _require_all(trained: Sequence[str], named: Sequence[str], option: str) -> None:
    missing = sorted(set(trained) - set(named))
    odd = sorted(set(named) - set(trained)) or sorted(n for n in named if named.count(n) > 1)
    if missing or odd:
        raise CheckpointError(
            f"{option} must name every trained parameter once",
            why=f"it lacks {missing[0]}" if missing else f"it does not fit {odd[0]}",
        )


def _shared(names: Sequence[str], hyper: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The hyper-parameters of a group.

    Raises:
        CheckpointError: when its parameters have different ones.
    """
    names = [name for name in names if name in hyper]
    first = next(iter(names), "")
    for name in names:
        for key in {*hyper[first], *hyper[name]}:
            one, other = hyper[first].get(key), hyper[name].get(key)
            if _text(one) != _text(other):
                raise CheckpointError(
                    f"{first} and {name} cannot be in one parameter group",
                    why=f"{key} is {one!r} for one and {other!r} for the other",
                    fix="keep the groups of the source, or give the value in the options (hyper)",
                )
    return dict(hyper.get(first, {}))


def _text(value: Any) -> str:
    """A value in a form in which lists equal tuples and the order of keys is nothing."""
    if isinstance(value, Mapping):
        return str(sorted((str(key), _text(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return str([_text(item) for item in value])
    return repr(value)


def _remarks(view: View, options: DeepSpeedOptions, trained: Sequence[str]) -> tuple[str, ...]:
    """What to say about the order of parameters, which nothing in DeepSpeed's files names.

    Raises:
        CheckpointError: when the source has them sorted by name, as no model has.
    """
    if options.order or isinstance(options.groups, tuple):
        return ()
    told = (view.details.get("order", ()), *view.details.get("groups", ()))
    if set(trained) <= {name for names in told for name in names}:
        return ()
    if len(trained) > 2 and list(trained) == sorted(trained):
        raise CheckpointError(
            f"{view.path} does not tell the order of its parameters, only their names",
            why="DeepSpeed knows parameters by their order alone",
            fix="give it in the options (ucp.order): the names of model.named_parameters()",
        )
    return (
        f"DeepSpeed knows parameters by their order: the {len(trained):,} trained ones are in that"
        " of the source, and the run must hand them to its optimizer in the same one",
    )

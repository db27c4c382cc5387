"""Lenses in one place: one checkpoint seen as another one, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from core.errors import CheckpointError
from core_ucp.layout.joining import (
    Merge as Merge,
    Split as Split,
    Stack as Stack,
    Unstack as Unstack,
)
from core_ucp.layout.lens import Lens as Lens, Parameters, parameters_of, with_parameters
from core_ucp.layout.renaming import Rename as Rename
from core_ucp.layout.reordering import (
    Permute as Permute,
    QueryGroups as QueryGroups,
    Rotary as Rotary,
    Scale as Scale,
    Transpose as Transpose,
)
from core_ucp.view.view import View


def apply(view: View, lenses: Iterable[Lens]) -> View:
    """A checkpoint seen through lenses, the first one first.

    Args:
        view: of the checkpoint.
        lenses: that are looked through.

    Raises:
        CheckpointError: when a lens finds nothing to change, or cannot change what it finds.
    """
    parameters, aliases = parameters_of(view), dict(view.aliases)
    for lens in lenses:
        after = lens.change(parameters)
        named = {lens.rename(alias): lens.rename(owner) for alias, owner in aliases.items()}
        same = len(after) == len(parameters) and all(
            after.get(name) is parameter for name, parameter in parameters.items()
        )
        if same and named == aliases:
            raise CheckpointError(
                f"{lens} changes nothing in {view.path}",
                why="no parameter has such a name",
                fix="correct its pattern; `core ucp inspect` lists the names",
            )
        _require_untied(lens, parameters, after, aliases)
        parameters, aliases = after, named
    return with_parameters(view, parameters, aliases)


def inverse(lens: Lens) -> Lens:
    """The lens that undoes another one.

    Raises:
        CheckpointError: when its patterns do not tell the old names.
    """
    return lens.inverse()


def inverses(lenses: Iterable[Lens]) -> list[Lens]:
    """The lenses that undo others, in the order they are looked through."""
    return [lens.inverse() for lens in reversed(list(lenses))]


def _require_untied(
    lens: Lens, before: Parameters, after: Parameters, aliases: Mapping[str, str]
) -> None:
    if isinstance(lens, Rename):
        return
    for alias, owner in aliases.items():
        if owner in before and after.get(owner) is not before[owner]:
            raise CheckpointError(
                f"{owner} cannot be rearranged",
                why=f"it is tied to {alias}, and {lens} would change both",
                fix="rename it only, or untie them first",
            )

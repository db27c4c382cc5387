"""Numbers that every rank of a run keeps, such as the step of its optimizer: equal, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core_ucp.sources.deepspeed.content import Content
from core_ucp.sources.deepspeed.shares import number, scalar_atom
from core_ucp.view.view import Atom


class Scalars:
    """Reads numbers of a checkpoint."""

    def __init__(self, content: Content) -> None:
        self._content = content

    def agreed(self, values: Sequence[Any], names: Sequence[str], what: str) -> Atom:
        """The number that all ranks have, as an atom.

        Args:
            values: of the ranks.
            names: of their files.
            what: the number is.

        Raises:
            CheckpointError: when ranks differ, naming the files.
        """
        files = self._content.files
        found = [
            number(files, value, f"{what} in {name}")
            for value, name in zip(values, names, strict=True)
        ]
        odd = next((row for row, value in enumerate(found) if value != found[0]), None)
        if odd is not None:
            raise self._content.fail(
                "mixes files of several steps",
                why=f"{what} is {found[0]:g} in {names[0]} and {found[odd]:g} in {names[odd]}",
                fix="take the files of one checkpoint only",
            )
        return scalar_atom(files, values[0], what)

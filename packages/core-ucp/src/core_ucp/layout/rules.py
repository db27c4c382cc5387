"""Which layout every parameter of a checkpoint has, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import cached_property

import torch

from core.errors import CheckpointError
from core_ucp.layout.holders import Alias, Average, Replicate, steps
from core_ucp.layout.layout import Layout
from core_ucp.layout.lens import Lens
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.names import Pattern, filled


@dataclass(frozen=True)
class Rule:
    """How the parameters that a pattern matches lie over the ranks.

    Args:
        match: pattern of names, see :class:`~core_ucp.layout.names.Pattern`.
        layout: of the parameters.
        regex: whether ``match`` is a regular expression.
        dtype: that they are converted to; as they are stored unless given.
        lenses: that its parameters are seen through when they have been put together.
        paper: what the Universal Checkpointing paper calls this pattern.
        optional: whether it may match nothing.
        precedence: of several rules that match, the one with the smallest number counts; two of
            the same number are an error.
    """

    match: str
    layout: Layout = field(default_factory=Replicate)
    regex: bool = False
    dtype: torch.dtype | None = None
    lenses: tuple[Lens, ...] = ()
    paper: str = ""
    optional: bool = False
    precedence: int = 0

    def __post_init__(self) -> None:
        _ = self.pattern

    @cached_property
    def pattern(self) -> Pattern:
        """The pattern of names."""
        return Pattern(self.match, self.regex)

    @property
    def lossy(self) -> bool:
        """Whether something is lost when the parameter is put together."""
        return any(isinstance(step, Average) for step in steps(self.layout))

    def of(self, name: str) -> Rule | None:
        """The rule as it is for one name, or ``None`` when it does not match."""
        groups = self.pattern.groups(name)
        if groups is not None and isinstance(self.layout, Alias):
            return replace(self, layout=Alias(filled(self.layout.of, groups)))
        return None if groups is None else self


@dataclass(frozen=True)
class Rules:
    """The layouts of all parameters of a checkpoint.

    Args:
        rules: of which exactly one counts for every parameter.
        lenses: that the checkpoint is seen through after those of the rules.
        mesh: of the ranks that wrote it, where the rules know it.
        lossy: whether parameters may be averaged, which loses what their copies differ in.
        origin: file that the rules are from, for messages.
    """

    rules: tuple[Rule, ...]
    lenses: tuple[Lens, ...] = ()
    mesh: Mesh | None = None
    lossy: bool = False
    origin: str = field(default="the rules", compare=False)

    @property
    def view_lenses(self) -> tuple[Lens, ...]:
        """All lenses, in the order they are looked through."""
        return (*(lens for rule in self.rules for lens in rule.lenses), *self.lenses)

    def find(self, name: str) -> Rule:
        """The rule that counts for a parameter.

        Raises:
            CheckpointError: when there is none, naming the closest; when two count, naming both;
                and when it would average without permission.
        """
        exact = self._exact.get(name, [])
        found = [made for rule in (*exact, *self._others) if (made := rule.of(name)) is not None]
        if not found:
            raise CheckpointError(
                f"no rule of {self.origin} is for {name}", why=self._closest(name), fix=_ADD
            )
        least = min(rule.precedence for rule in found)
        best = [rule for rule in found if rule.precedence == least]
        if len(best) > 1:
            raise CheckpointError(
                f"two rules of {self.origin} are for {name}",
                why=f"{best[0].match!r} and {best[1].match!r} both match",
                fix="make one of them narrower",
            )
        if best[0].lossy and not self.lossy:
            raise CheckpointError(
                f"{name} would be averaged",
                why=f"the rule {best[0].match!r} loses what the copies differ in",
                fix="set `lossy = true` in the rules if that is what you want",
            )
        return best[0]

    def assign(self, names: Iterable[str]) -> dict[str, Rule]:
        """The rules of parameters, by name.

        Args:
            names: of all parameters.

        Raises:
            CheckpointError: as :meth:`find`, and when a rule counts for no parameter.
        """
        found = {name: self.find(name) for name in names}
        used = {rule.match for rule in found.values()}
        unused = [rule for rule in self.rules if not rule.optional and rule.match not in used]
        if unused:
            raise CheckpointError(
                f"the rule {unused[0].match!r} of {self.origin} counts for no parameter",
                why=_nearest(unused[0].match, list(found), "the closest name is"),
                fix="correct its pattern, remove it, or set `optional = true`",
            )
        return found

    @cached_property
    def _exact(self) -> dict[str, list[Rule]]:
        table: dict[str, list[Rule]] = {}
        for rule in self.rules:
            if rule.pattern.exact:
                table.setdefault(rule.match, []).append(rule)
        return table

    @cached_property
    def _others(self) -> list[Rule]:
        return [rule for rule in self.rules if not rule.pattern.exact]

    def _closest(self, name: str) -> str:
        return _nearest(name, [rule.match for rule in self.rules], "the closest rule is")


_ADD = "add a rule for it; `core ucp inspect` lists the names"


def _nearest(word: str, known: list[str], words: str) -> str:
    if not known:
        return "there is none at all"
    best = max(known, key=lambda other: SequenceMatcher(None, word, other).ratio())
    return f"{words} {best!r}"

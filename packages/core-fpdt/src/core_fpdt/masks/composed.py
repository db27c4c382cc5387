"""Rules made of rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from core_fpdt.masks.rules import (
    EVERYBODY,
    EVERYTHING,
    FOREVER,
    INDICES,
    NOBODY,
    NOTHING,
    Constant,
    Grid,
    Range,
    Rule,
    Sight,
)

RuleT = TypeVar("RuleT", bound="Composed")


@dataclass(frozen=True)
class Composed(Rule):
    """Several rules, the cheapest first; made by :func:`both` and :func:`either`."""

    parts: tuple[Rule, ...]

    @property
    def price(self) -> int:
        return max((part.price for part in self.parts), default=INDICES)


class And(Composed):
    """What all rules show."""

    def sight(self, queries: Range, keys: Range) -> Sight:
        hidden, shown = EVERYBODY
        for part in self.parts:
            more, less = part.sight(queries, keys)
            hidden, shown = hidden | more, shown & less
        return Sight(hidden, shown)

    def visible(self, at: Grid) -> Tensor:
        seen = self.parts[0].visible(at)
        for part in self.parts[1:]:
            seen = seen & part.visible(at)
        return seen

    def narrow(self, queries: Range, keys: Range) -> Rule:
        left = [p for p in self.parts if p.sight(queries, keys) != EVERYBODY]
        return both(*(part.narrow(queries, keys) for part in left))

    def horizon(self, edge: int) -> int:
        nearest = FOREVER
        for part in self.parts:
            if nearest <= edge:
                break  # nothing nearer is of use, and the rest may have to be evaluated
            nearest = min(nearest, part.horizon(edge))
        return nearest


class Or(Composed):
    """What one rule shows."""

    def sight(self, queries: Range, keys: Range) -> Sight:
        hidden, shown = NOBODY
        for part in self.parts:
            less, more = part.sight(queries, keys)
            hidden, shown = hidden & less, shown | more
        return Sight(hidden, shown)

    def visible(self, at: Grid) -> Tensor:
        seen = self.parts[0].visible(at)
        for part in self.parts[1:]:
            seen = seen | part.visible(at)
        return seen

    def narrow(self, queries: Range, keys: Range) -> Rule:
        left = [p for p in self.parts if p.sight(queries, keys) != NOBODY]
        return either(*(part.narrow(queries, keys) for part in left))

    def horizon(self, edge: int) -> int:
        return max(part.horizon(edge) for part in self.parts)


def both(*rules: Rule) -> Rule:
    """Make the rule that shows what all of ``rules`` show."""
    parts = _flat(And, rules)
    if NOTHING in parts:
        return NOTHING
    return _joined(And, [part for part in parts if part != EVERYTHING], EVERYTHING)


def either(*rules: Rule) -> Rule:
    """Make the rule that shows what one of ``rules`` shows."""
    parts = _flat(Or, rules)
    if EVERYTHING in parts:
        return EVERYTHING
    return _joined(Or, [part for part in parts if part != NOTHING], NOTHING)


def _flat(kind: type[RuleT], rules: tuple[Rule, ...]) -> list[Rule]:
    parts: list[Rule] = []
    for rule in rules:
        parts.extend(rule.parts if isinstance(rule, kind) else (rule,))
    return parts


def _joined(kind: type[RuleT], parts: list[Rule], empty: Constant) -> Rule:
    if len(parts) < 2:
        return parts[0] if parts else empty
    return kind(tuple(sorted(parts, key=lambda part: part.price)))

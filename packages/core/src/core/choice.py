"""Choosing one contribution by name, or the best that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from core.errors import PluginError, closest
from core.plugins import Contributed


class Choosable(Protocol):
    """A contribution that has a name and may be preferred."""

    @property
    def name(self) -> str: ...

    @property
    def preference(self) -> int | None: ...


C = TypeVar("C", bound=Choosable)


@dataclass(frozen=True)
class Choice(Generic[C]):
    """What was chosen, and the reason in words."""

    value: C
    plugin: str
    why: str


def choose(
    what: str, name: str, candidates: Sequence[Contributed[C]], objection: Callable[[C], str]
) -> Choice[C]:
    """Choose by ``name``, or for ``"auto"`` the highest preference without an objection.

    Args:
        what: what is chosen, for messages.
        name: a contribution's name or ``"auto"``.
        candidates: the contributions of all plugins.
        objection: the reason against a candidate, or an empty string.

    Raises:
        PluginError: for an unknown or ambiguous name, an objection to the named one, or when
            nothing works.
    """
    if name != "auto":
        return _named(what, name, candidates, objection)
    against: list[str] = []
    ranked = [c for c in candidates if c.value.preference is not None]
    for found in sorted(ranked, key=lambda c: (-(c.value.preference or 0), c.id)):
        reason = objection(found.value)
        if not reason:
            why = "the preferred one" + (f" that works ({'; '.join(against)})" if against else "")
            return Choice(found.value, found.plugin, why)
        against.append(f"{found.id}: {reason}")
    raise PluginError(f"no {what} works here", why="; ".join(against) or "none is installed")


def _named(
    what: str, name: str, candidates: Sequence[Contributed[C]], objection: Callable[[C], str]
) -> Choice[C]:
    same = [c for c in candidates if name in (c.value.name, c.id)]
    if not same:
        names = sorted(c.value.name for c in candidates)
        known = f"known: {', '.join(names)}" + closest(name, names)
        raise PluginError(f"no {what} {name!r}", why=known, fix="see `core plugins`")
    if len(same) > 1:
        ids = " and ".join(c.id for c in same)
        raise PluginError(f"the {what} {name!r} is offered by {ids}", fix="use the full id")
    reason = objection(same[0].value)
    if reason:
        raise PluginError(f"{what} {name!r} cannot be used", why=reason)
    return Choice(same[0].value, same[0].plugin, "named in the settings")

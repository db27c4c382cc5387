"""Patterns of parameter names, with groups that other names are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from core.errors import CheckpointError

_GLOB = re.compile(r"\{(?P<name>[A-Za-z_]\w*)(?P<deep>\*\*)?\}|(?P<any>\*\*)|(?P<one>\*)")
_GROUP = re.compile(r"\(\?P<(?P<name>[A-Za-z_]\w*)>(?P<inner>[^()]+)\)|\\(?P<plain>[^\w\s])")
_TEMPLATE = re.compile(r"\{([A-Za-z_]\w*)\}")
_SPECIAL = re.compile(r"[.^$*+?{}\[\]\\|()]")


@dataclass(frozen=True)
class Pattern:
    r"""Which names are meant.

    A glob matches whole names: ``*`` is one part between dots, ``**`` is anything, ``{n}`` is one
    part that is called ``n``, and ``{n**}`` is anything that is called ``n``. A regular expression
    matches whole names as well, and names its groups with ``(?P<n>...)``.

    Args:
        text: glob or regular expression.
        regex: whether it is a regular expression.

    Raises:
        CheckpointError: when it is no valid expression.

    Example:
        >>> Pattern("layers.{n}.*.weight").groups("layers.3.mlp.weight")
        {'n': '3'}
    """

    text: str
    regex: bool = False

    def __post_init__(self) -> None:
        if not self.text:
            raise CheckpointError("a pattern of names is empty")
        try:
            _ = self._compiled
        except re.error as error:
            raise CheckpointError(
                f"{self.text!r} is no pattern of names", why=str(error), fix="correct it"
            ) from error

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.text if self.regex else _glob(self.text))

    def groups(self, name: str) -> dict[str, str] | None:
        """What the named groups stand for in a name, or ``None`` when it does not match."""
        found = self._compiled.fullmatch(name)
        return None if found is None else found.groupdict()

    @property
    def exact(self) -> bool:
        """Whether it matches its own text, and nothing else."""
        return not self.regex and _GLOB.search(self.text) is None

    @property
    def names(self) -> frozenset[str]:
        """The named groups."""
        return frozenset(self._compiled.groupindex)

    def template(self) -> str:
        """The names it matches, with ``{n}`` for its groups.

        Raises:
            CheckpointError: when the groups alone do not tell a name.
        """
        if not self.regex:
            text = _GLOB.sub(lambda m: f"{{{m['name']}}}" if m["name"] else m[0], self.text)
            leftover = text if "*" not in text else None
        else:
            leftover = self._literal()
        if leftover is None:
            raise CheckpointError(
                f"{self.text!r} does not say which names it stands for",
                why="parts of a name match that are in no named group",
                fix="name them, as in {n}, or (?P<n>...) with dots written as \\.",
            )
        return leftover

    def inverse(self, to: str, changes: Mapping[str, str] | None = None) -> Pattern:
        """The pattern of the names that ``to`` makes of those that this one matches.

        Args:
            to: template with ``{n}`` for groups.
            changes: groups that ``to`` has instead of this pattern's (name and expression), or
                that it leaves out on purpose (name and an empty string).

        Raises:
            CheckpointError: when it leaves a group out, and nothing says so.
        """
        inner = {**self._inner(), **(changes or {})}
        lost = {name for name, text in inner.items() if text} - template_groups(to)
        if lost:
            raise CheckpointError(
                f"{to!r} cannot be undone", why=f"it leaves out {{{min(lost)}}} of {self.text!r}"
            )
        self.template()
        if not self.regex:
            return Pattern(
                _TEMPLATE.sub(lambda m: f"{{{m[1]}**}}" if inner[m[1]] == ".+" else m[0], to)
            )
        parts = _TEMPLATE.split(to)
        seen: set[str] = set()
        text = ""
        for index, part in enumerate(parts):
            if index % 2 == 0:
                text += re.escape(part)
            else:
                text += f"(?P={part})" if part in seen else f"(?P<{part}>{inner[part]})"
                seen.add(part)
        return Pattern(text, regex=True)

    def _inner(self) -> dict[str, str]:
        if self.regex:
            return {m["name"]: m["inner"] for m in _GROUP.finditer(self.text) if m["name"]}
        found = [m for m in _GLOB.finditer(self.text) if m["name"]]
        return {m["name"]: ".+" if m["deep"] else "[^.]+" for m in found}

    def _literal(self) -> str | None:
        text, place = "", 0
        for m in _GROUP.finditer(self.text):
            between = self.text[place : m.start()]
            if _SPECIAL.search(between):
                return None
            text += between + (f"{{{m['name']}}}" if m["name"] else m["plain"])
            place = m.end()
        return None if _SPECIAL.search(self.text[place:]) else text + self.text[place:]


def filled(template: str, groups: Mapping[str, str]) -> str:
    """A template with groups filled in.

    Raises:
        CheckpointError: when it names a group that the pattern has not.
    """
    lacking = template_groups(template) - set(groups)
    if lacking:
        raise CheckpointError(
            f"{template!r} names the group {min(lacking)!r}",
            why=f"the pattern has {sorted(groups) or 'none'}",
        )
    return _TEMPLATE.sub(lambda m: groups[m[1]], template)


def template_groups(template: str) -> frozenset[str]:
    """The groups that a template names."""
    return frozenset(_TEMPLATE.findall(template))


def _glob(text: str) -> str:
    parts: list[str] = []
    place = 0
    for m in _GLOB.finditer(text):
        parts.append(re.escape(text[place : m.start()]))
        if m["name"]:
            inner = ".+" if m["deep"] else "[^.]+"
            again = any(part.startswith(f"(?P<{m['name']}>") for part in parts)
            parts.append(f"(?P={m['name']})" if again else f"(?P<{m['name']}>{inner})")
        else:
            parts.append(".*" if m["any"] else "[^.]*")
        place = m.end()
    return "".join(parts) + re.escape(text[place:])

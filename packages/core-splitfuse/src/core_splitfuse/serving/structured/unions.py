"""``oneOf`` where no value can be two of its parts: it says the same as ``anyOf`` then.

A grammar cannot tell that a value is exactly one of several things; llguidance refuses ``oneOf``
unless the parts are told apart in place. Tagged unions, as pydantic writes them, refer to their
parts and are told apart by a constant property.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

MOST_PARTS = 32
"""Parts of a union that are compared with each other."""

_DATA = {"const", "enum", "default", "examples"}
_NUMBERS = {"integer", "number"}


def plain_unions(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema in which ``oneOf`` is ``anyOf`` wherever that changes nothing.

    Args:
        schema: a whole JSON schema, which its references start at.
    """
    made: dict[str, Any] = _Unions(schema).plain(schema)
    return made


class _Facts(NamedTuple):
    """What is known of the values that fit a part of a union; empty where nothing is."""

    types: set[str]
    values: set[str]
    tags: dict[str, set[str]]

    def apart(self, other: _Facts) -> bool:
        """Whether no value can fit both."""
        if self.types and other.types and not self.types & other.types:
            return True
        if self.values and other.values and not self.values & other.values:
            return True
        if not self.types == other.types == {"object"}:
            return False
        return any(
            not self.tags[name] & other.tags[name] for name in self.tags.keys() & other.tags.keys()
        )


class _Unions:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, _Facts] = {}

    def plain(self, part: Any) -> Any:
        if isinstance(part, list):
            return [self.plain(inner) for inner in part]
        if not isinstance(part, Mapping):
            return part
        made = {k: v if k in _DATA else self.plain(v) for k, v in part.items()}
        if "anyOf" not in made and self._distinct(part.get("oneOf")):
            made["anyOf"] = made.pop("oneOf")
            made.pop("discriminator", None)
        return made

    def _distinct(self, parts: object) -> bool:
        if not isinstance(parts, list) or len(parts) > MOST_PARTS:
            return False
        return all(one.apart(other) for one, other in combinations(map(self._facts, parts), 2))

    def _facts(self, part: Any) -> _Facts:
        reference = part.get("$ref") if isinstance(part, Mapping) else None
        if not isinstance(reference, str):
            return _facts(part)
        if reference not in self._known:
            self._known[reference] = _facts(self._resolved(reference))
        return self._known[reference]

    def _resolved(self, reference: str) -> Any:
        found: Any = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def _facts(part: Any) -> _Facts:
    if not isinstance(part, Mapping):
        return _Facts(set(), set(), {})
    properties = part.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    required = [name for name in _list(part.get("required")) if isinstance(name, str)]
    tags = {name: _values(known[name]) for name in required if name in known}
    return _Facts(_types(part), _values(part), {name: v for name, v in tags.items() if v})


def _types(part: Mapping[str, Any]) -> set[str]:
    named = part.get("type")
    types = {name for name in (_list(named) or [named]) if isinstance(name, str)}
    return types | _NUMBERS if types & _NUMBERS else types


def _values(part: Any) -> set[str]:
    """The only values that fit, as JSON; none where they are not listed, or not plain."""
    if not isinstance(part, Mapping):
        return set()
    values = [part["const"]] if "const" in part else _list(part.get("enum"))
    if not all(value is None or isinstance(value, str | int) for value in values):
        return set()  # 1.0 is 1, and objects have many spellings.
    return {json.dumps(value) for value in values}


def _list(given: object) -> list[Any]:
    return given if isinstance(given, list) else []

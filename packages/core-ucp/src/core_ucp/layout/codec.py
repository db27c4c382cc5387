"""Data classes as tables of plain values and back, with errors that say what is allowed."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from core.errors import CheckpointError, closest

Kinds = Mapping[str, type[Any]]
"""Classes by the word that ``kind`` names them with."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def table_of(value: Any, kinds: Kinds) -> dict[str, Any]:
    """A data class as a table, without what has its default.

    Args:
        value: the data class.
        kinds: of which it is one, for ``kind``; empty when its place says what it is.
    """
    words = [word for word, kind in kinds.items() if kind is type(value)]
    table: dict[str, Any] = {"kind": words[0]} if words else {}
    for item in fields(value):
        content = getattr(value, item.name)
        default = item.default if item.default is not MISSING else None
        if content is not None and content != default:
            table[item.name] = _plain(content)
    return table


def from_table(table: Any, kinds: Kinds, where: str) -> Any:
    """A data class from a table.

    Args:
        table: with ``kind`` and the fields of its class.
        kinds: that are allowed.
        where: file and key, for messages.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    content = as_table(table, where)
    word = content.pop("kind", None)
    if not isinstance(word, str) or word not in kinds:
        near = closest(word, list(kinds)) if isinstance(word, str) else ""
        raise wrong(f"{where}.kind", word, f"one of {', '.join(kinds)}{near}")
    return read_class(content, kinds[word], where)


def read_class(content: Mapping[str, Any], kind: type[Any], where: str) -> Any:
    """A data class of a known kind from its fields.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    # Some classes normalise what they are given, so that their fields do not say it all.
    hints = {k: v for k, v in get_type_hints(kind).items() if k in {f.name for f in fields(kind)}}
    require_keys(content, list(hints), where)
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    given = {key: read(value, hints[key], f"{where}.{key}") for key, value in content.items()}
    lacking = [name for name in needed if name not in given]
    if lacking:
        raise CheckpointError(
            f"{where} lacks {lacking[0]!r}", why=f"{kind.__name__} needs {', '.join(needed)}"
        )
    try:
        return kind(**given)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.what}", why=error.why, fix=error.fix) from error


def read(value: Any, hint: Any, where: str) -> Any:
    """A value of an annotated type from a plain one.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in choices:
            if _fits(value, choice):
                return read(value, choice, where)
        raise wrong(where, value, words_of(hint))
    if not _fits(value, hint):
        raise wrong(where, value, words_of(hint))
    if origin is tuple:
        return tuple(read(item, choices[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        return {key: read(item, choices[1], f"{where}.{key}") for key, item in value.items()}
    if hint is torch.dtype:
        return DTYPES[value]
    if isinstance(hint, type) and is_dataclass(hint):
        return read_class(value, hint, where)
    return value


def words_of(hint: Any) -> str:
    """What a type allows, in words."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in choices)
    if origin in (Union, types.UnionType):
        return " or ".join(words_of(choice) for choice in choices if choice is not type(None))
    if origin is tuple:
        return f"a list, each {words_of(choices[0])}"
    if origin is Mapping:
        return f"a table, each value {words_of(choices[1])}"
    if hint is torch.dtype:
        return "a dtype such as 'float32' or 'bfloat16'"
    plain = {int: "a whole number", str: "a text", bool: "true or false"}
    return plain.get(hint) or f"a table with {', '.join(f.name for f in fields(hint))}"


def as_table(value: Any, where: str) -> dict[str, Any]:
    """A copy of a table.

    Raises:
        CheckpointError: when it is none.
    """
    if not isinstance(value, Mapping):
        raise wrong(where, value, "a table")
    return dict(value)


def require_keys(table: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Make sure that a table has no other keys.

    Raises:
        CheckpointError: naming the key and what is allowed.
    """
    for key in table:
        if key not in allowed:
            raise CheckpointError(
                f"{where} has the key {key!r}{closest(key, allowed)}",
                why=f"allowed are {', '.join(allowed)}",
            )


def wrong(where: str, value: Any, allowed: str) -> CheckpointError:
    """The error of a value that is not allowed."""
    return CheckpointError(f"{where} is {value!r}", why=f"allowed is {allowed}")


def _fits(value: Any, hint: Any) -> bool:
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in choices
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is tuple:
        # A list of the wrong things is told by its item, not as a whole.
        return isinstance(value, list)
    if origin is Mapping or is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint is torch.dtype:
        return isinstance(value, str) and value in DTYPES
    return type(value) is hint


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return table_of(value, {}) if is_dataclass(value) else value

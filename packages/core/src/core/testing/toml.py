"""Writing TOML, which the standard library only reads."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def dumps(tree: Mapping[str, Any]) -> str:
    """Write nested mappings as TOML, one table for each top-level mapping.

    Args:
        tree: values that TOML knows, paths and enumerations.

    Raises:
        TypeError: for a value that TOML cannot hold, such as ``None``.

    Example:
        >>> print(dumps({"enable": ["hello"], "hello": {"bits": 6, "skip": ["head"]}}), end="")
        "enable" = ["hello"]
        ["hello"]
        "bits" = 6
        "skip" = ["head"]
    """
    plain = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    lines = [_pair(key, value) for key, value in plain.items()]
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += [f"[{_text(key)}]", *(_pair(k, v) for k, v in value.items())]
    return "".join(f"{line}\n" for line in lines)


def _pair(key: str, value: Any) -> str:
    return f"{_text(str(key))} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, Enum):
        return _value(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PurePath):
        return _text(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(_pair(k, v) for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"TOML cannot hold a {type(value).__name__}")


def _text(text: str) -> str:
    return '"' + "".join(_character(c) for c in text) + '"'


def _character(c: str) -> str:
    if c in _ESCAPES:
        return _ESCAPES[c]
    return f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else c

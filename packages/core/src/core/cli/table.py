"""Plain tables for commands that must start fast, and JSON for scripts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click


def echo_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns; the last one wraps to the width of the terminal."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    indent = sum(widths) + 2 * len(widths)
    width = max(72, shutil.get_terminal_size().columns)
    for line in lines:
        left = "".join(f"{cell:<{w}}  " for cell, w in zip(line, widths, strict=False))
        text = click.wrap_text(line[-1], max(24, width - indent))
        first, *rest = text.splitlines() or [""]
        click.echo(f"{left}{first}".rstrip())
        for more in rest:
            click.echo(" " * indent + more)


def as_text(value: Any) -> str:
    """A plain value in one line; what is empty is a dash."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return "; ".join(map(as_text, value)) or "-"
    if value is None or value == "":
        return "-"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else str(value)


def echo_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

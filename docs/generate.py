"""Writes what the documentation says of hooks and settings, from the code that defines them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from core import contributions
from core.contributions import Settings
from core.discovery import discover
from core.hooks import Hooks
from core.sections import settings_sections
from core.settings import schema


def write_pages(folder: Path) -> None:
    """Write one file for every generated part of a page."""
    folder.mkdir(exist_ok=True)
    (folder / "hooks.md").write_text(hooks_table(), encoding="utf-8")
    (folder / "settings.md").write_text(settings_tables(), encoding="utf-8")


def hooks_table() -> str:
    """Hook, what it yields, and which installed plugins implement it."""
    active = discover().active
    rows = [
        (
            f"{{py:meth}}`~core.hooks.Hooks.{name}`",
            ", ".join(_yielded(method)),
            ", ".join(f"`{p.name}`" for p in active if name in p.implementations),
        )
        for name, method in vars(Hooks).items()
        if name.startswith("core_")
    ]
    return table(("Hook", "Yields", "Implemented by"), rows)


def _yielded(method: Any) -> list[str]:
    inside = re.fullmatch(r"Iterable\[(.+)\]", inspect.get_annotations(method)["return"])
    if inside is None:
        return []
    name = re.sub(r"\[Any\]$", "", inside[1]).removeprefix("type[").removesuffix("]")
    kinds = get_args(getattr(contributions, name, None))
    names = [kind.__name__ for kind in kinds] or [name]
    return [_reference(name) for name in names]


def _reference(name: str) -> str:
    known = hasattr(contributions, name)
    return f"{{py:class}}`~core.contributions.{name}`" if known else f"`{name}`"


def settings_tables() -> str:
    """One table for every section of the settings file."""
    sections = settings_sections(discover())
    return "\n".join(_section(name, kind) for name, kind in sorted(sections.items()))


def _section(name: str, kind: type[Settings]) -> str:
    described = schema(kind)
    rows = [
        (
            f"`{key}`",
            _allowed(field),
            f"`{field.get('default', {} if field.get('type') == 'object' else '')!r}`",
            field["description"].replace("\n", " "),
        )
        for key, field in described["properties"].items()
    ]
    head = f"## `[{name}]`\n\n{inspect.getdoc(kind)}\n\n"
    return head + table(("Key", "Allowed", "Default", "Meaning"), rows)


_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {}",
}


def _allowed(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value!r}`" for value in field["enum"])
    bounds = [text.format(field[key]) for key, text in _BOUNDS.items() if key in field]
    inner = f" of {field['items']['type']}" if "type" in field.get("items", {}) else ""
    return ", ".join([field.get("type", "any") + inner, *bounds])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)

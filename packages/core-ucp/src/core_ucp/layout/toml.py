"""Rules as TOML and JSON: read with errors that name the place, and written back the same."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from core.disk import disk_errors
from core.errors import CheckpointError
from core_ucp.layout import layouts, lenses
from core_ucp.layout.codec import (
    Kinds,
    as_table,
    from_table,
    read,
    read_class,
    require_keys,
    table_of,
    wrong,
)
from core_ucp.layout.layouts import Chain, Layout, Replicate
from core_ucp.layout.lens import Lens
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.rules import Rule, Rules

VERSION = 1
"""Of the form of rules files; newer ones are refused."""

LARGEST = 16 * 2**20
"""Bytes of a rules file."""

LAYOUTS: Kinds = {
    "replicate": layouts.Replicate,
    "shard": layouts.Shard,
    "strided-shard": layouts.StridedShard,
    "fused": layouts.Fused,
    "gather": layouts.Gather,
    "owner": layouts.Owner,
    "expert": layouts.Expert,
    "pad": layouts.Pad,
    "alias": layouts.Alias,
    "average": layouts.Average,
    "refused": layouts.Refused,
}
"""Layouts by ``kind``."""

LENSES: Kinds = {
    "rename": lenses.Rename,
    "split": lenses.Split,
    "merge": lenses.Merge,
    "stack": lenses.Stack,
    "unstack": lenses.Unstack,
    "permute": lenses.Permute,
    "query-groups": lenses.QueryGroups,
    "rotary": lenses.Rotary,
    "transpose": lenses.Transpose,
    "scale": lenses.Scale,
}
"""Lenses by ``kind``."""

_TOP = ["version", "mesh", "lossy", "rule", "lens"]
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_RULE = [item.name for item in fields(Rule)]


def load(path: Path) -> Rules:
    """The rules of a TOML file, or of a JSON file by its name.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    with disk_errors(f"cannot read {path}"):
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} is no rules file", why=f"it is larger than {LARGEST:,}")
        content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no rules file", why="it is not UTF-8") from error
    return loads(text, str(path), json_form=path.suffix == ".json")


def loads(text: str, origin: str = "the rules", *, json_form: bool = False) -> Rules:
    """Rules from TOML or JSON.

    Args:
        text: that is read.
        origin: name of the file, for messages.
        json_form: whether it is JSON.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    try:
        table = json.loads(text) if json_form else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        form = "JSON" if json_form else "TOML"
        raise CheckpointError(f"{origin} is no valid {form}", why=str(error)) from error
    return rules_from(table, origin)


def rules_from(table: Any, origin: str = "the rules") -> Rules:
    """Rules from a table of plain values.

    Raises:
        CheckpointError: naming file, key, value, and what is allowed.
    """
    content = as_table(table, origin)
    require_keys(content, _TOP, origin)
    version = read(content.get("version", VERSION), int, f"{origin}: version")
    if version != VERSION:
        raise wrong(f"{origin}: version", version, str(VERSION))
    mesh = _mesh(content["mesh"], f"{origin}: mesh") if "mesh" in content else None
    lossy = read(content.get("lossy", False), bool, f"{origin}: lossy")
    rules = _items(content, "rule", origin)
    made = tuple(_rule(rule, f"{origin}: rule[{i}]") for i, rule in enumerate(rules))
    seen = _items(content, "lens", origin)
    looked = tuple(lens_from(lens, f"{origin}: lens[{i}]") for i, lens in enumerate(seen))
    return Rules(made, looked, mesh, lossy, origin)


def table_of_rules(rules: Rules) -> dict[str, Any]:
    """Rules as a table of plain values."""
    table: dict[str, Any] = {"version": VERSION}
    if rules.lossy:
        table["lossy"] = True
    if rules.mesh is not None:
        table["mesh"] = {"axes": dict(rules.mesh.axes), "order": list(rules.mesh.order)}
    if rules.rules:
        table["rule"] = [_table_of_rule(rule) for rule in rules.rules]
    if rules.lenses:
        table["lens"] = [table_of(lens, LENSES) for lens in rules.lenses]
    return table


def dumps(rules: Rules) -> str:
    """Rules as TOML."""
    lines: list[str] = []
    for key, value in table_of_rules(rules).items():
        if key in ("rule", "lens"):
            for item in value:
                lines += ["", f"[[{key}]]", *(f"{k} = {_inline(v)}" for k, v in item.items())]
        else:
            lines.append(f"{key} = {_inline(value)}")
    return "\n".join(lines) + "\n"


def layout_from(table: Any, where: str = "layout") -> Layout:
    """A layout from a table, or a composition from a list of tables.

    Raises:
        CheckpointError: naming the key, its value, and what is allowed.
    """
    if isinstance(table, list):
        parts = [from_table(item, LAYOUTS, f"{where}[{i}]") for i, item in enumerate(table)]
        return Chain(tuple(parts))
    made: Layout = from_table(table, LAYOUTS, where)
    return made


def table_of_layout(layout: Layout) -> dict[str, Any] | list[dict[str, Any]]:
    """A layout as a table of plain values, a composition as a list of them."""
    if isinstance(layout, Chain):
        return [table_of(step, LAYOUTS) for step in layout.layouts]
    return table_of(layout, LAYOUTS)


def lens_from(table: Any, where: str = "lens") -> Lens:
    """A lens from a table.

    Raises:
        CheckpointError: naming the key, its value, and what is allowed.
    """
    made: Lens = from_table(table, LENSES, where)
    return made


def _rule(table: Any, where: str) -> Rule:
    content = as_table(table, where)
    require_keys(content, _RULE, where)
    layout = layout_from(content.pop("layout", {"kind": "replicate"}), f"{where}.layout")
    tables = _items({"lenses": content.pop("lenses", [])}, "lenses", where)
    rule: Rule = read_class(content, Rule, where)
    # A lens of a rule is for the names that the rule is for, unless it says otherwise.
    names = {"match": rule.match, "regex": rule.regex}
    made: list[Lens] = []
    for index, lens in enumerate(tables):
        there = f"{where}.lenses[{index}]"
        given = as_table(lens, there)
        made.append(lens_from(given if "match" in given else {**names, **given}, there))
    return replace(rule, layout=layout, lenses=tuple(made))


def _table_of_rule(rule: Rule) -> dict[str, Any]:
    table = table_of(replace(rule, layout=Replicate(), lenses=()), {})
    table["layout"] = table_of_layout(rule.layout)
    if rule.lenses:
        table["lenses"] = [table_of(lens, LENSES) for lens in rule.lenses]
    return table


def _mesh(value: Any, where: str) -> Mesh:
    content = as_table(value, where)
    require_keys(content, ["axes", "order"], where)
    axes = read(content.get("axes", {}), Mapping[str, int], f"{where}.axes")
    order = read(content.get("order", []), tuple[str, ...], f"{where}.order")
    try:
        return Mesh(axes, order)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.what}", why=error.why, fix=error.fix) from error


def _items(content: Mapping[str, Any], key: str, origin: str) -> list[Any]:
    value = content.get(key, [])
    if not isinstance(value, list):
        raise wrong(f"{origin}: {key}", value, f"tables that begin with [[{key}]]")
    return value


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(k)} = {_inline(v)}' for k, v in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    if isinstance(value, str):
        return _text(value)
    return json.dumps(value)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _text(value: str) -> str:
    # JSON writes texts as TOML reads them, but for one character that only TOML escapes.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

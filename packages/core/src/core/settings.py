"""Settings: from file, environment, command line and code into validated dataclasses.

Precedence, lowest first: default, TOML file, environment ``CORE_<SECTION>__<KEY>``, ``--set
section.key=value``, keyword in code. All problems of all sections are reported at once.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

from core.contributions import Settings
from core.errors import SettingsError, closest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

S = TypeVar("S", bound=Settings)
Keys = tuple[str, ...]
TOP_LEVEL = ("enable", "disable")
"""Keys outside of any section: lists of plugin names."""


@dataclass
class Values:
    """Raw values by section, and where each of them came from."""

    tree: dict[str, Any] = field(default_factory=dict)
    origin: dict[Keys, str] = field(default_factory=dict)

    def put(self, path: Keys, value: Any, origin: str) -> None:
        """Set one value; tables merge key by key, everything else replaces."""
        if isinstance(value, Mapping):
            self._table(path)
            for key, inner in value.items():
                self.put((*path, str(key)), inner, origin)
            return
        self._table(path[:-1])[path[-1]] = value
        # A value replaces the table that stood in its place, and a table the value.
        for known in list(self.origin):
            if known[: len(path)] == path or path[: len(known)] == known:
                del self.origin[known]
        self.origin[path] = origin

    def _table(self, path: Keys) -> dict[str, Any]:
        table = self.tree
        for key in path:
            inner = table.get(key)
            if not isinstance(inner, dict):
                inner = table[key] = {}
            table = inner
        return table

    def source(self, path: Keys) -> str:
        """Where the value at ``path``, or the nearest table around it, came from."""
        for known, origin in self.origin.items():
            if known[: len(path)] == path:
                return origin
        return self.source(path[:-1]) if path else "settings"


def gather(
    file: str | os.PathLike[str] | None = None,
    *,
    assignments: Sequence[str] = (),
    keywords: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Values:
    """Merge all sources without judging their values.

    Args:
        file: a TOML file, or the ``settings.json`` of an earlier run.
        assignments: ``section.key=value`` texts from the command line.
        keywords: ``{"section": {"key": value}}`` from code; a settings object counts as its fields.
        environment: the process environment unless given.

    Raises:
        SettingsError: when the file or an assignment cannot be read at all.
    """
    values = Values()
    if file is not None:
        for key, value in read_file(Path(file)).items():
            values.put((key,), value, str(file))
    for name, text in sorted((os.environ if environment is None else environment).items()):
        path = _environment_path(name)
        if path:
            values.put(path, parse(text), f"environment {name}")
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        path = tuple(part.strip() for part in dotted.split("."))
        if not equals or not all(path):
            raise SettingsError(f"--set {assignment}", why="not of the form section.key=value")
        values.put(path, parse(text.strip()), f"--set {dotted.strip()}")
    for section, content in (keywords or {}).items():
        values.put((section,), _plain(content), "keyword argument")
    return values


def read_file(path: Path) -> dict[str, Any]:
    """Read a TOML file, or the ``settings.json`` that a run left in its folder.

    Raises:
        SettingsError: naming the file and, for a syntax error, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"cannot read settings file {path}", why=reason) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be parsed", why=str(error)) from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} cannot be used", why="it is not a table of sections")
    return content


def parse(text: str) -> Any:
    """Read a value in TOML's grammar; what is not TOML is a plain string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def validate(
    values: Values, sections: Mapping[str, type[Settings]], why_unknown: Mapping[str, str]
) -> dict[type[Settings], Settings]:
    """Make a settings object of every section, from defaults where nothing is given.

    Args:
        values: what :func:`gather` found.
        sections: settings class by section name.
        why_unknown: for section names that are known but unusable, the sentence that says why.

    Raises:
        SettingsError: with one line for each problem, in all sections.
    """
    problems = [*_top_level_problems(values, sections, why_unknown)]
    made: dict[type[Settings], Settings] = {}
    for section, kind in sections.items():
        content = values.tree.get(section, {})
        if not isinstance(content, dict):
            problems.append(_line(values, (section,), content, "must be a table of keys"))
            continue
        result = _validate_section(values, section, kind, content)
        if isinstance(result, list):
            problems += result
        else:
            made[kind] = result
    if problems:
        count = f"{len(problems)} setting{'s' if len(problems) > 1 else ''} cannot be used"
        raise SettingsError("\n  ".join([count, *problems]))
    return made


def _validate_section(
    values: Values, section: str, kind: type[S], content: Mapping[str, Any]
) -> S | list[str]:
    from pydantic import ValidationError
    from pydantic.errors import PydanticUserError

    try:
        return cast(S, _adapter(kind).validate_python(content))
    except (PydanticUserError, NameError) as error:
        reason = str(error).splitlines()[0]
        return [f"[{section}]: its settings class {kind.__name__} cannot be used: {reason}"]
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            inner = tuple(str(part) for part in problem["loc"])
            text = _allowed(kind, inner, problem["type"], problem["msg"])
            lines.append(_line(values, (section, *inner), problem["input"], text))
        return lines


def _allowed(kind: type[Any], path: Keys, problem: str, message: str) -> str:
    if problem != "unexpected_keyword_argument":
        return message
    owner = kind
    for part in path[:-1]:
        owner = get_type_hints(owner).get(part, kind)
        if not is_dataclass(owner):
            return "unknown key"
    known = [f.name for f in fields(owner)]
    return f"unknown key{closest(path[-1], known)}; known keys: {', '.join(known)}"


def _line(values: Values, path: Keys, value: Any, text: str) -> str:
    return f"{values.source(path)}: {'.'.join(path)} = {value!r}: {text}"


def _top_level_problems(
    values: Values, sections: Mapping[str, type[Settings]], why_unknown: Mapping[str, str]
) -> Iterable[str]:
    known = [*sections, *TOP_LEVEL]
    for name, value in values.tree.items():
        if name in TOP_LEVEL:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                yield _line(values, (name,), value, "must be a list of plugin names")
        elif name not in sections:
            nothing = f"unknown section; no plugin {name!r} is installed{closest(name, known)}"
            yield f"{values.source((name,))}: [{name}]: {why_unknown.get(name, nothing)}"


def names(values: Values, key: str) -> list[str]:
    """The list of plugin names under a top-level key; :func:`validate` judges its form."""
    found = values.tree.get(key, [])
    return [str(name) for name in found] if isinstance(found, list) else []


def _environment_path(name: str) -> Keys:
    if not name.startswith("CORE_") or "__" not in name:
        return ()
    section, *keys = name.removeprefix("CORE_").lower().split("__")
    return (section.replace("_", "-"), *keys) if section and all(keys) else ()


def _plain(content: Any) -> Any:
    if is_dataclass(content) and not isinstance(content, type):
        return {f.name: _plain(getattr(content, f.name)) for f in fields(content)}
    return content


def dump(settings: Settings) -> dict[str, Any]:
    """The fields as JSON values that validate to an equal object."""
    return cast(dict[str, Any], _adapter(type(settings)).dump_python(settings, mode="json"))


def schema(kind: type[Settings]) -> dict[str, Any]:
    """JSON schema of a section, for the documentation."""
    return _adapter(kind).json_schema()


_adapters: dict[type[Settings], TypeAdapter[Any]] = {}


def _adapter(kind: type[Settings]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        from pydantic import TypeAdapter

        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def check(kind: type[S], **fields: Any) -> S:
    """Make one settings object from values of a user and validate it.

    Raises:
        SettingsError: listing every wrong field.
    """
    result = _validate_section(Values(), kind.__name__, kind, fields)
    if isinstance(result, list):
        raise SettingsError("\n  ".join(["these values cannot be used", *result]))
    return result

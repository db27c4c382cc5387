"""Settings: defaults, documentation, and the way through files and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from core.contributions import Settings
from core.errors import SettingsError
from core.settings import gather, schema, validate
from core.testing import toml
from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_EXAMPLES = 40
_SECTION = "section"


def defaults(subject: Subject) -> None:
    """Settings can be made without an argument, and their defaults are valid."""
    for kind in _kinds(subject):
        try:
            made = kind()
        except TypeError as error:
            raise AssertionError(
                f"{kind.__name__}() fails: {error}; give every field a default"
            ) from None
        try:
            again = _read({_SECTION: asdict(made)}, kind)
        except SettingsError as error:
            raise AssertionError(
                f"the defaults of {kind.__name__} are not valid: {error}"
            ) from None
        require(again == made, f"the defaults of {kind.__name__} change when they are validated")


def frozen(subject: Subject) -> None:
    """Settings are frozen, keyword-only dataclasses, nested ones too."""
    for kind in _kinds(subject):
        for each in [kind, *_nested(kind)]:
            parameters: Any = getattr(each, "__dataclass_params__", None)
            good = (
                parameters is not None
                and parameters.frozen
                and all(field.kw_only for field in fields(each))
            )
            require(good, f"{each.__name__} is no @dataclass(frozen=True, kw_only=True)")


def documented(subject: Subject) -> None:
    """Every field has a docstring below it."""
    for kind in _kinds(subject):
        described = schema(kind)
        tables = [described, *described.get("$defs", {}).values()]
        wanted = {f.name for each in [kind, *_nested(kind)] for f in fields(each)}
        known = {
            name
            for table in tables
            for name, entry in table.get("properties", {}).items()
            if entry.get("description")
        }
        missing = sorted(wanted - known)
        require(not missing, f"{kind.__name__}: no docstring below {', '.join(missing)}")


def unknown_key(subject: Subject) -> None:
    """An unknown key is refused by name."""
    key = "no_such_key_of_anybody"
    for kind in _kinds(subject):
        try:
            _read({_SECTION: {key: 1}}, kind)
        except SettingsError as error:
            require(key in str(error), f"{kind.__name__} refuses an unknown key without naming it")
        else:
            raise AssertionError(
                f"{kind.__name__} accepts unknown keys; keep __pydantic_config__ of core.Settings"
            )


def round_trip(subject: Subject) -> None:
    """Any valid settings survive a TOML file, and the settings.json of a run."""
    if find_spec("hypothesis") is None:
        raise Skip("hypothesis is not installed")
    writers = {".toml": toml.dumps, ".json": lambda tree: json.dumps(tree, default=str)}
    for kind in _kinds(subject):
        for suffix, write in writers.items():
            _try_examples(subject, kind, suffix, write)


def _try_examples(
    subject: Subject, kind: type[Any], suffix: str, write: Callable[[Any], str]
) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import InvalidArgument, ResolutionFailed

    file = subject.folder() / f"settings{suffix}"

    def survives(made: Any) -> None:
        file.write_text(write({_SECTION: _without_none(asdict(made))}), encoding="utf-8")
        try:
            values = gather(file, environment={})
            again = validate(values, {_SECTION: kind}, {})[kind]
        except SettingsError as error:
            raise AssertionError(f"{made!r} cannot be read back from {suffix}: {error}") from None
        require(again == made, f"{made!r} became {again!r} in {suffix}")

    try:
        strategy = _build(kind)
        run = given(strategy)(survives)
        settings(
            max_examples=_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )(run)()
    except (InvalidArgument, ResolutionFailed) as error:
        raise Skip(f"hypothesis cannot make {kind.__name__}: {error}") from None


def _build(kind: type[Any]) -> SearchStrategy[Any]:
    from hypothesis import strategies as st

    hints = get_type_hints(kind, include_extras=True)
    parts = {field.name: _of(hints[field.name]) for field in fields(kind)}
    return st.builds(kind, **parts).filter(_is_valid)


def _of(hint: Any) -> SearchStrategy[Any]:
    """Strategy of a type; ``Any`` stands for what TOML and JSON can both hold."""
    from hypothesis import strategies as st

    origin: Any = get_origin(hint)
    args = get_args(hint)
    if hint is Any:
        return st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
    if is_dataclass(hint) and isinstance(hint, type):
        return _build(hint)
    if origin in (dict, Mapping) and Any in args:
        return st.dictionaries(_of(args[0]), _of(args[1]), max_size=4)
    if origin in (list, tuple) and Any in args:
        items = st.lists(_of(Any), max_size=4)
        return items if origin is list else items.map(tuple)
    known: Any = st.from_type
    if hint is float or (origin is Annotated and args[0] is float):
        finite: SearchStrategy[Any] = known(hint).filter(math.isfinite)
        return finite
    found: SearchStrategy[Any] = known(hint)
    return found


def _is_valid(made: Any) -> bool:
    """Leave out what breaks constraints hypothesis does not know, and what TOML cannot say."""
    try:
        _read({_SECTION: asdict(made)}, type(made))
    except SettingsError:
        return False
    # TOML has no null, and a key that is absent means the default. And nan equals nothing.
    absent = [f for f in fields(made) if getattr(made, f.name) is None and f.default is not None]
    return not absent and "nan" not in repr(made)


def _without_none(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return tree


def _read(tree: Mapping[str, Any], kind: type[Any]) -> Settings:
    values = gather(keywords=tree, environment={})
    return validate(values, {_SECTION: kind}, {})[kind]


def _kinds(subject: Subject) -> list[type[Any]]:
    if not subject.settings:
        raise Skip("the plugin has no settings")
    return subject.settings


def _nested(kind: type[Any]) -> tuple[type[Any], ...]:
    """Dataclasses inside of a settings class."""
    found: dict[type[Any], None] = {}
    waiting = list(get_type_hints(kind).values())
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, type) and is_dataclass(hint) and hint not in found:
            found[hint] = None
            waiting += get_type_hints(hint).values()
        waiting += get_args(hint)
    return tuple(found)


CHECKS = checks_of("settings", defaults, frozen, documented, unknown_key, round_trip)

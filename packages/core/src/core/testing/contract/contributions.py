"""What the hooks yield: the right objects, named and described, that survive pickling."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from core.contributions import Settings
from core.testing.contract.check import checks_of, remark, require
from core.testing.contract.subject import Subject

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_KINDS = ("transforms", "formats", "storages", "engines", "models", "recipes", "probes")


def kinds(subject: Subject) -> None:
    """Every hook yields what it should, and nothing raises."""
    import click

    kinds: list[Any] = list(subject.settings)
    for kind in kinds:
        good = isinstance(kind, type) and issubclass(kind, Settings) and is_dataclass(kind)
        require(good, f"core_settings yields {kind!r}, which is no dataclass of core.Settings")
    require(
        subject.is_core or len(subject.settings) < 2,
        f"core_settings yields {len(subject.settings)} classes; a plugin has one section",
    )
    commands: list[Any] = list(subject.commands)
    for command in commands:
        found = type(command).__name__
        require(isinstance(command, click.Command), f"core_commands yields a {found}")
    if not list(_everything(subject)) and not subject.settings and not subject.commands:
        remark("the plugin contributes nothing but observers and set-up")


def names(subject: Subject) -> None:
    """Names are lower-case words with dashes: [a-z][a-z0-9-]*."""
    found = [(kind, value.name) for kind, value in _everything(subject)]
    found += [("commands", command.name or "") for command in subject.commands]
    found += [("plugin", subject.name)]
    wrong = [f"{name!r} ({kind})" for kind, name in found if not _NAME.fullmatch(name)]
    require(not wrong, f"not of the form [a-z][a-z0-9-]*: {', '.join(wrong)}")


def unique(subject: Subject) -> None:
    """No two contributions of a kind have the same name."""
    count = Counter(_key(kind, value) for kind, value in _everything(subject))
    count.update(("commands", command.name or "") for command in subject.commands)
    twice = [f"{name!r} ({kind})" for (kind, name), times in count.items() if times > 1]
    require(not twice, f"yielded twice: {', '.join(twice)}")


def summaries(subject: Subject) -> None:
    """Summaries are one sentence and end with a full stop."""
    texts = [(v.name, v.summary) for _, v in _everything(subject) if hasattr(v, "summary")]
    texts += [(c.name, (c.help or "").strip().partition("\n\n")[0]) for c in subject.commands]
    wrong = [f"{name!r}: {text!r}" for name, text in texts if not _is_sentence(text)]
    require(not wrong, f"no sentence with a full stop: {'; '.join(wrong)}")


def picklable(subject: Subject) -> None:
    """Contributions and settings pickle, so that spawned workers can have them."""
    for kind, value in _everything(subject):
        try:
            copy = pickle.loads(pickle.dumps(value))
        except Exception as error:
            what = f"{value.name!r} ({kind}) does not pickle: {error}"
            raise AssertionError(f"{what}; use module-level functions, no lambdas") from None
        require(copy == value, f"{value.name!r} ({kind}) is not equal to its pickled copy")
    for settings in subject.settings:
        require(_copies(settings), f"{settings.__name__} does not pickle; define it in a module")


def _everything(subject: Subject) -> Iterator[tuple[str, Any]]:
    for kind in _KINDS:
        for value in getattr(subject, kind):
            yield kind, value


def _key(kind: str, value: Any) -> tuple[str, str]:
    # A step belongs to a recipe, a transform to a stage.
    owner = getattr(value, "recipe", "") or getattr(getattr(value, "stage", None), "name", "")
    return f"{kind} of {owner}" if owner else kind, value.name


def _is_sentence(text: str) -> bool:
    return bool(text) and text.endswith(".") and text[0] == text[0].upper() and "\n\n" not in text


def _copies(settings: type[Settings]) -> bool:
    try:
        return bool(pickle.loads(pickle.dumps(settings())) == settings())
    except Exception:
        return False


CHECKS = checks_of("contributions", kinds, names, unique, summaries, picklable)

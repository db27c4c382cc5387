"""Commands: help that works, shows an example, and loads nothing heavy."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.fresh import ask
from core.testing.contract.subject import Subject

_reports: WeakKeyDictionary[Subject, dict[str, Any]] = WeakKeyDictionary()


def shows_help(subject: Subject) -> None:
    """--help of every command prints something and exits with 0."""
    for command in _report(subject)["commands"]:
        require(
            command["exit"] == 0 and command["text"].strip(),
            f"`core {command['name']} --help` exits with {command['exit']}",
        )


def has_example(subject: Subject) -> None:
    """The help of every command shows an example."""
    without = [c["name"] for c in _report(subject)["commands"] if "Example" not in c["text"]]
    require(
        not without,
        f"no 'Example:' in the help of {', '.join(without)}; add one to the docstring, after \\b",
    )


def light(subject: Subject) -> None:
    """--help loads none of torch, transformers, numpy and pydantic."""
    heavy = _report(subject)["heavy"]
    require(
        not heavy, f"--help loads {', '.join(heavy)}; import them inside the command's function"
    )


def _report(subject: Subject) -> dict[str, Any]:
    if not subject.commands:
        raise Skip("the plugin has no commands")
    if subject not in _reports:
        _reports[subject] = ask(subject, "commands", subject.name).report
    return _reports[subject]


CHECKS = checks_of("commands", shows_help, has_example, light)

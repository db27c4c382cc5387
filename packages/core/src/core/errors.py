"""Errors that a user can act on.

Every error says *what* happened, *why*, and *how to fix it*. The command line prints them without a
traceback and exits with code 2; library code lets them propagate.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class CoreError(Exception):
    """Base of all errors raised by core.

    Args:
        what: what went wrong and where, in one sentence without a full stop.
        why: the reason, as far as it is known.
        fix: what the user can do about it.

    Example:
        >>> print(CoreError("cannot read run.toml", why="it is a folder", fix="name a file"))
        cannot read run.toml: it is a folder
          fix: name a file
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.why, self.fix)

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class PluginError(CoreError):
    """A plugin is missing, not active, or broke one of the rules of its hooks."""


class PlanError(CoreError):
    """The enabled transforms cannot be put into one order, or one of them misbehaved."""


class SettingsError(CoreError):
    """One or more settings are wrong; all of them are listed."""


class CheckpointError(CoreError):
    """A checkpoint cannot be written, found, read or converted."""


class EngineError(CoreError):
    """An inference engine refused a request or failed while serving it."""


class ModelError(CoreError):
    """A model was refused, because a change to it would alter what it computes."""


class DataError(CoreError):
    """Training or evaluation data is missing, unreadable or too small."""


def closest(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or nothing."""
    match = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def _rebuild(kind: type[CoreError], what: str, why: str, fix: str) -> CoreError:
    return kind(what, why=why, fix=fix)

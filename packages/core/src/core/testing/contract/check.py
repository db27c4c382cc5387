"""A check of the contract, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.errors import CoreError

if TYPE_CHECKING:
    from core.testing.contract.subject import Subject


class Skip(Exception):  # noqa: N818 - it is no error
    """A check does not apply, for the reason given."""


class ContractWarning(UserWarning):
    """Something a plugin may do, and its author should know of."""


@dataclass(frozen=True)
class Check:
    """One named point of the contract.

    Args:
        name: ``area.point``.
        run: raises ``AssertionError`` when the plugin breaks it, :class:`Skip` when it does not
            apply.
    """

    name: str
    run: Callable[[Subject], None]

    @property
    def summary(self) -> str:
        """What it demands, in one sentence."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """What came of a check: ``ok``, ``warn``, ``fail`` or ``skip``, and why; and what it took."""

    check: Check
    status: Literal["ok", "warn", "fail", "skip"]
    text: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Flat JSON object."""
        name, summary = self.check.name, self.check.summary
        return {
            "check": name,
            "status": self.status,
            "remark": self.text,
            "demands": summary,
            "seconds": round(self.seconds, 3),
        }


def checks_of(area: str, *functions: Callable[[Subject], None]) -> tuple[Check, ...]:
    """Name the checks of an area after their functions."""
    return tuple(Check(f"{area}.{f.__name__.replace('_', '-')}", f) for f in functions)


def require(condition: object, message: str) -> None:
    """Fail the check with ``message`` unless ``condition`` holds; also under ``python -O``.

    Raises:
        AssertionError: with the message.
    """
    if not condition:
        raise AssertionError(message)


def require_refused(action: Callable[[], object], what: str) -> None:
    """Fail the check unless ``action`` raises a :class:`CoreError`.

    Raises:
        AssertionError: that says ``what`` was not refused, or with which other exception.
    """
    try:
        action()
    except CoreError:
        return
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{what} with {kind} ({error}), not with a CoreError") from None
    raise AssertionError(what)


def remark(message: str) -> None:
    """Say something about the plugin without failing the check."""
    warnings.warn(message, ContractWarning, stacklevel=2)

"""The contract suite: what every plugin must do right, each point a named check.

There is one implementation, run by ``core check NAME`` and by pytest::

    from core.testing import contract

    test_contract = contract.suite("hello")

A check that does not apply to a plugin is skipped with its reason, never silently.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from core.discovery import discover
from core.errors import CoreError
from core.plugins import Plugins, one_line
from core.testing.contract.check import (
    Check,
    ContractWarning,
    Outcome,
    Skip,
    checks_of,
    remark,
    require,
)
from core.testing.contract.subject import Subject

__all__ = [
    "AREAS",
    "Check",
    "ContractWarning",
    "Outcome",
    "Skip",
    "Subject",
    "checks",
    "checks_of",
    "remark",
    "require",
    "run_checks",
    "suite",
]

AREAS: Mapping[str, bool] = {
    "metadata": False,
    "imports": False,
    "static": False,
    "contributions": False,
    "settings": False,
    "commands": False,
    "probes": False,
    "models": True,
    "transforms": True,
    "attention": True,
    "formats": True,
    "storages": False,
    "saves": True,
    "engines": True,
    "numerics": True,
}
"""Areas in the order they run, and whether they need torch and transformers."""


def checks(areas: Iterable[str] = ()) -> list[Check]:
    """Return the checks of the named areas, or all of them.

    Raises:
        CoreError: for an unknown area.

    Example:
        >>> [check.name for check in checks(["metadata"])][0]
        'metadata.entry-point'
    """
    wanted = list(areas) or list(AREAS)
    unknown = [area for area in wanted if area not in AREAS]
    if unknown:
        known = f"known: {', '.join(AREAS)}"
        raise CoreError(f"the contract has no area {unknown[0]!r}", fix=known)
    return [check for area in wanted for check in _area(area)]


def run_checks(subject: Subject, chosen: Iterable[Check]) -> Iterator[Outcome]:
    """Run checks on a plugin one by one; whatever one of them raises is its outcome."""
    for check in chosen:
        started = time.perf_counter()
        outcome = _outcome(subject, check)
        yield replace(outcome, seconds=time.perf_counter() - started)


def _outcome(subject: Subject, check: Check) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ContractWarning)
        try:
            with _one_thread():
                check.run(subject)
        except Skip as skip:
            return Outcome(check, "skip", str(skip))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            text = str(error) if type(error) is AssertionError else one_line(error)
            return Outcome(check, "fail", text)
    remarks = [str(w.message) for w in caught if issubclass(w.category, ContractWarning)]
    return Outcome(check, "warn" if remarks else "ok", "; ".join(remarks))


def suite(
    name: str,
    *,
    areas: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
    plugins: Plugins | None = None,
) -> Callable[..., None]:
    """Make a pytest test with one case for each check.

    Args:
        name: name of an installed plugin.
        areas: only these areas.
        skip: reasons to skip single checks, by name: ``{"engines.greedy": "needs a GPU"}``.
        plugins: where to look the plugin up instead of discovering it.

    Raises:
        CoreError: for an unknown area, or a check to skip that does not exist.

    Example::

        test_contract = contract.suite("hello")
    """
    import pytest

    reasons = dict(skip or {})
    chosen = checks(areas)
    unknown = sorted(set(reasons) - {check.name for check in chosen})
    if unknown:
        raise CoreError(f"the contract has no check {unknown[0]!r}", fix="see `core check --list`")

    @cache
    def subject() -> Subject:
        return Subject(name, discover() if plugins is None else plugins)

    @pytest.mark.parametrize("check", chosen, ids=str)
    def test_contract(check: Check) -> None:
        if check.name in reasons:
            pytest.skip(reasons[check.name])
        try:
            with _one_thread():
                check.run(subject())
        except Skip as reason:
            pytest.skip(str(reason))

    return test_contract


@contextmanager
def _one_thread() -> Generator[None]:
    """Compute in one thread: for tiny models, several ones mostly wait for each other."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _area(area: str) -> tuple[Check, ...]:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if AREAS[area] and missing:
        return (Check(f"{area}.all", _needs_torch),)
    found: tuple[Check, ...] = import_module(f"{__name__}.{area}").CHECKS
    return found


def _needs_torch(subject: Subject) -> None:
    """Torch and transformers are installed."""
    raise Skip('torch or transformers is not installed: `pip install "core[torch]"`')

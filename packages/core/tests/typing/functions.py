"""Five mistakes with ``implements``; a line that a checker must refuse ends with ``# error``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from core.contributions import EngineType, Probe, Transform
from core.events import Event
from core.hooks import Hooks, implements
from core.run import Run


@implements(Hooks.core_engines)  # error
def wrong_return() -> Iterable[Probe]:
    return ()


@implements(Hooks.core_transforms)  # error
def wrong_argument(run: int) -> Iterable[Transform[Any]]:
    return ()


@implements(Hooks.core_transforms)  # error
def missing_argument() -> Iterable[Transform[Any]]:
    return ()


@implements(Hooks.core_engine)  # error
def misspelled() -> Iterable[EngineType]:
    return ()


@implements(Hooks.core_event)  # error
def more_arguments(run: Run, event: Event, why: str) -> None:
    return None

"""Events: every observer hears every event, and none of them can stop the training."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

import core
from core.discovery import plugins_from
from core.events import Event, StepEnded
from core.hooks import Hooks, hookimpl
from core.plugins import Plugins
from core.run import Run


class Hears(Hooks):
    def __init__(self) -> None:
        self.heard: list[Event] = []

    @hookimpl
    def core_event(self, run: Run, event: Event) -> None:
        self.heard.append(event)


class Fails(Hooks):
    @hookimpl
    def core_event(self, run: Run, event: Event) -> None:
        if isinstance(event, StepEnded):
            raise RuntimeError(f"cannot take step {event.step}")


class Slow(Hooks):
    @hookimpl
    def core_event(self, run: Run, event: Event) -> None:
        time.sleep(0.6)


def tell(plugins: Plugins, steps: int) -> None:
    run: Any = None
    for step in range(1, steps + 1):
        plugins.notify(run, StepEnded(step=step))


def test_all_observers_hear_all_events_in_order() -> None:
    first, second = Hears(), Hears()
    tell(plugins_from({"first": first, "second": second}), 3)
    assert first.heard == second.heard == [StepEnded(step=step) for step in (1, 2, 3)]


def test_a_failing_observer_is_logged_once_counted_and_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hears = Hears()
    plugins = plugins_from({"bad": Fails(), "hears": hears})
    with caplog.at_level(logging.WARNING, "core"):
        tell(plugins, 3)
    assert len(hears.heard) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "plugin 'bad' failed to observe StepEnded(step=1, metrics={})"
    ]
    assert caplog.records[0].exc_info
    assert plugins.event_errors == {"bad": 3}
    (line,) = plugins.observations()
    assert line.startswith("observer 'bad'")
    assert line.endswith("3 failures")


def test_the_time_of_observers_adds_up_and_slow_ones_are_told() -> None:
    plugins = plugins_from({"slow": Slow(), "hears": Hears()})
    tell(plugins, 1)
    once = plugins.event_seconds["slow"]
    assert plugins.observations() == []
    tell(plugins, 1)
    assert plugins.event_seconds["slow"] >= once + 0.6
    (line,) = plugins.observations()
    assert line.startswith("observer 'slow': 1.")


def test_a_run_starts_and_ends_once(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hears = Hears()
    plugins = plugins_from({"hears": hears, "bad": Fails()})
    with core.start(plugins=plugins, folder=tmp_path) as run:
        run.emit(StepEnded(step=1))
    run.close()
    assert hears.heard == [core.RunStarted(), StepEnded(step=1), core.RunEnded()]
    assert "observer 'bad'" in capsys.readouterr().err


def test_a_run_that_fails_says_so_to_its_observers(tmp_path: Any) -> None:
    hears = Hears()
    plugins = plugins_from({"hears": hears})
    with pytest.raises(ZeroDivisionError), core.start(plugins=plugins, folder=tmp_path):
        _ = 1 / 0
    assert hears.heard[-1] == core.RunEnded(error="ZeroDivisionError: division by zero")

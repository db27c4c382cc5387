"""Probes: chosen by name, run one by one, and a probe that fails is a finding like others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import core
from core.contributions import Probe, Reading
from core.discovery import plugins_from
from core.errors import PluginError
from core.hooks import Hooks, hookimpl
from core.probes import measure, select
from core.run import Run


def fine(run: Run) -> Iterable[Reading]:
    yield Reading(name="first", status="ok", value=2.0, unit="x")
    yield Reading(name="second", status="warn", advice="look")


def falls(run: Run) -> Iterable[Reading]:
    yield from fine(run)
    raise OSError("disk is gone")


def wrong(run: Run) -> Iterable[Any]:
    yield "text"


class Plugin(Hooks):
    def __init__(self, work: Callable[[Run], Iterable[Reading]]) -> None:
        self.work = work

    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(name="fast", summary="Fast.", measure=self.work)
        yield Probe(name="slow", summary="Slow.", measure=self.work, slow=True)


class Fails(Hooks):
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        raise RuntimeError("no probes today")


def run_with(tmp_path: Path, **plugins: Hooks) -> Run:
    return core.start(plugins=plugins_from(plugins), folder=tmp_path)


def test_fast_and_slow_probes_are_chosen_by_plugin_or_id(tmp_path: Path) -> None:
    with run_with(tmp_path, a=Plugin(fine), b=Plugin(fine), c=Fails()) as run:
        ids = lambda *names, slow=False: [c.id for c in select(run, names, slow=slow)]  # noqa: E731
        assert ids("a") == ["a.fast"]
        assert ids("b.fast", "a") == ["a.fast", "b.fast"]
        assert ids("a", slow=True) == ["a.slow"]
        assert {"a.fast", "b.fast", "core.machine"} <= set(ids())
        with pytest.raises(PluginError, match=r"no probe 'a\.fats'; did you mean 'a\.fast'"):
            ids("a.fats")
        assert run.plugins.explain("c") == (
            "plugin 'c' is broken: core_probes: RuntimeError: no probes today"
        )


def test_a_failing_probe_keeps_what_it_found_and_fails(tmp_path: Path) -> None:
    with run_with(tmp_path, a=Plugin(falls), b=Plugin(fine)) as run:
        found = list(measure(run, select(run, ["a", "b"], slow=False)))
    assert [(f.plugin, f.reading.name, f.reading.status) for f in found] == [
        ("a", "first", "ok"),
        ("a", "second", "warn"),
        ("a", "fast", "fail"),
        ("b", "first", "ok"),
        ("b", "second", "warn"),
    ]
    assert found[2].reading.value == "OSError: disk is gone"


def test_what_is_no_reading_is_a_failure(tmp_path: Path) -> None:
    with run_with(tmp_path, a=Plugin(wrong)) as run:
        (found,) = measure(run, select(run, ["a"], slow=False))
    assert (found.reading.status, found.reading.value) == ("fail", "yielded a str, not a Reading")


def test_a_finding_is_one_flat_object(tmp_path: Path) -> None:
    with run_with(tmp_path, a=Plugin(fine)) as run:
        found = next(iter(measure(run, select(run, ["a"], slow=True))))
    assert found.as_json() == {
        "plugin": "a", "probe": "slow", "name": "first", "status": "ok", "value": 2.0,
        "unit": "x", "limit": "", "advice": "",
    }  # fmt: skip

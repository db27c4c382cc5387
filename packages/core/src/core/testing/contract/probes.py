"""Probes: fast unless they say otherwise, and they never raise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

from core.contributions import Probe, Reading, Status
from core.plugins import one_line
from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject

LIMIT = 5.0
"""Seconds that a fast probe may take."""


@dataclass(frozen=True)
class _Measured:
    probe: Probe
    readings: list[Reading]
    error: str
    seconds: float


_results: WeakKeyDictionary[Subject, list[_Measured]] = WeakKeyDictionary()


def never_raise(subject: Subject) -> None:
    """A fast probe gives readings and never raises."""
    for measured in _measure(subject):
        name, error = measured.probe.name, measured.error
        require(not error, f"probe {name!r} raises {error}; give a reading with status 'fail'")
        require(measured.readings, f"probe {name!r} gives no reading")


def readings(subject: Subject) -> None:
    """Readings have a name and one of the statuses ok, warn, fail, skip."""
    for measured in _measure(subject):
        found: list[Any] = list(measured.readings)
        for reading in found:
            what = f"probe {measured.probe.name!r}"
            require(isinstance(reading, Reading), f"{what} yields a {type(reading).__name__}")
            known = get_args(Status)
            require(
                reading.status in known and reading.name,
                f"{what} has a reading {reading.name!r} of status {reading.status!r}; "
                f"known: {', '.join(known)}",
            )


def advice(subject: Subject) -> None:
    """A reading that warns or fails says what to do about it."""
    for measured in _measure(subject):
        mute = [r for r in measured.readings if r.status in ("warn", "fail") and not r.advice]
        what = f"probe {measured.probe.name!r}"
        require(not mute, f"{what} gives no advice with {mute[0].name!r}" if mute else "")


def fast(subject: Subject) -> None:
    """A probe takes less than five seconds, or says that it is slow."""
    for measured in _measure(subject):
        require(
            measured.seconds < LIMIT,
            f"probe {measured.probe.name!r} takes {measured.seconds:.1f} s, limit {LIMIT:g} s; "
            "make it faster, or say slow=True",
        )


def _measure(subject: Subject) -> list[_Measured]:
    probes = [probe for probe in subject.probes if not probe.slow]
    if not probes:
        slow = ", ".join(probe.name for probe in subject.probes)
        raise Skip(f"all probes are slow: {slow}" if slow else "the plugin has no probes")
    if subject not in _results:
        with subject.run() as run:
            _results[subject] = [_timed(probe, run) for probe in probes]
    return _results[subject]


def _timed(probe: Probe, run: object) -> _Measured:
    found: list[Reading] = []
    error = ""
    started = time.perf_counter()
    try:
        found += probe.measure(run)  # type: ignore[arg-type]
    except Exception as raised:
        error = one_line(raised)
    return _Measured(probe, found, error, time.perf_counter() - started)


CHECKS = checks_of("probes", never_raise, readings, advice, fast)

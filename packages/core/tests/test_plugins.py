"""Calls of hooks: who contributed what, whose failure it is, and what a name means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from core.contributions import EngineType, Probe, Reading
from core.discovery import plugins_from
from core.errors import PluginError
from core.hooks import Hooks, hookimpl
from core.plugins import Contributed, Plugin, Plugins, State, one_line


def fine(run: Any) -> Iterable[Reading]:
    yield Reading(name="fine", status="ok")


def probe(name: str) -> Probe:
    return Probe(name=name, summary="Always.", measure=fine)


class One(Hooks):
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield probe("a")
        yield probe("b")


class Late(Hooks):
    """Fails after its first contribution."""

    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield probe("first")
        raise RuntimeError("no second")


class Leaves(Hooks):
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        raise SystemExit(4)


class Returns(Hooks):
    def __init__(self, value: Any) -> None:
        self.value = value

    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        return self.value  # type: ignore[no-any-return]


def ids(found: Iterable[Contributed[Any]]) -> list[str]:
    return [c.id for c in found if c.plugin != "core"]


def test_contributions_carry_their_plugin_in_plugin_order() -> None:
    plugins = plugins_from({"one": One(), "two": One()})
    assert ids(plugins.collect(Hooks.core_probes)) == ["one.a", "one.b", "two.a", "two.b"]


def test_only_the_named_plugins_are_asked() -> None:
    plugins = plugins_from({"one": One(), "two": Late()})
    assert ids(plugins.collect_from(["one"], Hooks.core_probes)) == ["one.a", "one.b"]
    assert ids(plugins.collect_from((n for n in ["one"]), Hooks.core_probes)) == ["one.a", "one.b"]
    with pytest.raises(PluginError, match="no plugin 'oone' is installed; did you mean 'one'"):
        plugins.collect_from(["oone"], Hooks.core_probes)


def test_a_failure_carries_plugin_and_hook() -> None:
    with pytest.raises(RuntimeError, match="no second") as failed:
        plugins_from({"one": One(), "late": Late()}).collect(Hooks.core_probes)
    assert failed.value.__notes__ == ["in plugin 'late', hook core_probes"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Late, "core_probes: RuntimeError: no second"),
        (Leaves, "core_probes: SystemExit: 4"),
    ],
)
def test_one_failure_is_one_plugins_failure(kind: type[Hooks], reason: str) -> None:
    plugins = plugins_from({"bad": kind(), "one": One()})
    assert ids(plugins.collect_safely(Hooks.core_probes)) == ["one.a", "one.b"]
    assert plugins["bad"].state is State.BROKEN
    assert plugins["bad"].reason == reason
    assert ids(plugins.collect(Hooks.core_probes)) == ["one.a", "one.b"]
    assert plugins.explain("bad") == f"plugin 'bad' is broken: {reason}"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "core_probes returned NoneType"),
        ("text", "core_probes returned str"),
        ({"a": probe("a")}, "core_probes returned dict"),
        (probe("a"), "core_probes returned Probe"),
        ([3], "core_probes yielded a int, not a Probe"),
        ([EngineType(name="e", summary="E.", build=fine)], "yielded a EngineType, not a Probe"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_contribution_is_refused(value: Any, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        plugins_from({"demo": Returns(value)}).collect(Hooks.core_probes)


def test_a_run_is_told_of_all_plugins_it_cannot_have() -> None:
    known = [
        Plugin(name="fp", state=State.DISABLED, reason="switched off by name"),
        Plugin(name="on", state=State.ACTIVE),
        Plugin(name="old", state=State.INCOMPATIBLE, reason="made for hook API 0"),
    ]
    plugins = Plugins(known)
    with pytest.raises(PluginError) as refused:
        plugins.require(["on", "fp", "old", "off"])
    assert refused.value.what.split("; ") == [
        "plugin 'fp' is disabled: switched off by name",
        "plugin 'old' is incompatible: made for hook API 0",
        "no plugin 'off' is installed",
    ]
    assert plugins.require(iter(["on"])) == [known[1]]


class Setup(Hooks):
    calls = 0

    @hookimpl
    def core_setup(self) -> None:
        Setup.calls += 1


class BadSetup(Hooks):
    @hookimpl
    def core_setup(self) -> None:
        raise RuntimeError("registry is closed")


def test_setup_fails_the_run_only_for_an_enabled_plugin(caplog: pytest.LogCaptureFixture) -> None:
    plugins = plugins_from({"bad": BadSetup(), "setup": Setup()})
    with pytest.raises(RuntimeError, match="registry is closed") as failed:
        plugins.setup(["bad.linear"])
    assert failed.value.__notes__ == ["in plugin 'bad', hook core_setup"]
    before = Setup.calls
    plugins.setup([])
    assert Setup.calls == before + 1
    assert plugins["bad"].reason == "core_setup: RuntimeError: registry is closed"
    assert "registry is closed" in caplog.text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (KeyError(), "KeyError"),
        (PluginError("what", fix="do"), "what"),
        (PluginError("what", why="because"), "what: because"),
    ],
)
def test_errors_shorten_to_one_line(error: BaseException, line: str) -> None:
    assert one_line(error) == line

"""The hooks are typed, documented, do nothing by default, and are refused when written wrongly."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest

from core.contributions import Probe, Reading
from core.discovery import plugins_from
from core.errors import PluginError
from core.hooks import API, GROUP, Hooks, hookimpl, implements, override
from core.plugins import YIELDED_BY

HOOKS = [name for name in vars(Hooks) if name.startswith("core_")]


def test_the_group_carries_the_major_number() -> None:
    assert f"core.v{API}" == GROUP


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_and_typed(name: str) -> None:
    hook = getattr(Hooks, name)
    assert inspect.getdoc(hook)
    assert all(
        parameter.annotation is not inspect.Parameter.empty
        for parameter in list(inspect.signature(hook).parameters.values())[1:]
    )
    assert inspect.signature(hook).return_annotation is not inspect.Signature.empty


def test_every_hook_but_the_two_calls_says_what_may_be_yielded() -> None:
    assert set(HOOKS) - set(YIELDED_BY) == {"core_setup", "core_event"}


@pytest.mark.parametrize("name", HOOKS)
def test_the_base_class_contributes_nothing(name: str) -> None:
    hook = getattr(Hooks(), name)
    arguments = [None] * len(inspect.signature(hook).parameters)
    assert hook(*arguments) in ((), None)


def test_override_changes_nothing_at_run_time() -> None:
    def method() -> int:
        return 3

    assert override(method) is method


def fine(run: Any) -> Iterable[Reading]:
    yield Reading(name="fine", status="ok")


PROBE = Probe(name="fine", summary="Always.", measure=fine)


def test_a_module_of_functions_is_a_plugin() -> None:
    @implements(Hooks.core_probes)
    def any_name_at_all() -> Iterable[Probe]:
        return [PROBE]

    module = ModuleType("functions")
    vars(module)["any_name_at_all"] = any_name_at_all
    plugins = plugins_from({"functions": module})
    assert PROBE in [c.value for c in plugins.collect(Hooks.core_probes) if c.plugin != "core"]


def test_an_implementation_may_take_fewer_arguments() -> None:
    seen: list[Any] = []

    class Fewer:
        @hookimpl
        def core_event(self, event: Any) -> None:
            seen.append(event)

    plugins_from({"fewer": Fewer()}).notify(None, "event")  # type: ignore[arg-type]
    assert seen == ["event"]


def test_a_parameter_with_a_default_gets_the_callers_value() -> None:
    seen: list[Any] = []

    class Default(Hooks):
        @hookimpl
        def core_event(self, run: Any, event: Any = "nothing", more: Any = "default") -> None:
            seen.append((run, event, more))

    plugins_from({"default": Default()}).notify("run", "event")  # type: ignore[arg-type]
    assert seen == [("run", "event", "default")]


class Misspelled(Hooks):
    @hookimpl
    def core_prob(self) -> Iterable[Probe]:
        return ()


class MisspelledAlone:
    @hookimpl
    def core_prob(self) -> Iterable[Probe]:
        return ()


class MisspelledUnmarked(Hooks):
    def core_prob(self) -> Iterable[Probe]:
        return ()


class Unmarked(Hooks):
    def core_probes(self) -> Iterable[Probe]:
        return ()


class UnmarkedAlone:
    def core_probes(self) -> Iterable[Probe]:
        return ()


class WrongArgument(Hooks):
    @hookimpl
    def core_event(self, run: Any, events: Any) -> None:  # type: ignore[override]
        pass


class Wrapper(Hooks):
    @hookimpl(wrapper=True)
    def core_probes(self) -> Any:
        return (yield)


class OldWrapper(Hooks):
    @hookimpl(hookwrapper=True)
    def core_probes(self) -> Any:
        yield


class NoWrapperAtAll(Hooks):
    @hookimpl(wrapper=True)
    def core_probes(self) -> Iterable[Probe]:
        return ()


class Nothing(Hooks):
    pass


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Misspelled, "unknown hook 'core_prob'; did you mean 'core_probes'?"),
        (MisspelledAlone, "unknown hook 'core_prob'; did you mean 'core_probes'?"),
        (MisspelledUnmarked, "unknown hook 'core_prob'; did you mean 'core_probes'?"),
        (Unmarked, "core_probes is not marked"),
        (UnmarkedAlone, "core_probes is not marked"),
        (WrongArgument, "core_event has no argument 'events'; did you mean 'event'?"),
        (Wrapper, "core_probes is a wrapper"),
        (OldWrapper, "core_probes is a wrapper"),
        (NoWrapperAtAll, "core_probes: Declared as wrapper=True"),
        (Nothing, "implements no hook"),
        (object, "implements no hook"),
    ],
)
def test_a_hook_written_wrongly_is_refused(kind: type[Any], said: str) -> None:
    with pytest.raises(PluginError) as refused:
        plugins_from({"demo": kind()})
    assert refused.value.what.startswith(said)


class Newer(Hooks):
    @hookimpl(optionalhook=True)
    def core_from_the_future(self) -> Iterable[Probe]:
        return ()

    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        return [PROBE]


class NewerAlone:
    @hookimpl(optionalhook=True)
    def core_from_the_future(self) -> Iterable[Probe]:
        return ()

    core_probes = Newer.core_probes


@pytest.mark.parametrize("kind", [Newer, NewerAlone])
def test_a_hook_of_a_newer_core_may_be_implemented_as_optional(kind: type[Any]) -> None:
    plugins = plugins_from({"newer": kind(), "again": kind()})
    assert list(plugins["newer"].implementations) == ["core_probes"]


def test_names_that_only_begin_like_hooks_are_free_in_a_module() -> None:
    module = ModuleType("functions")
    vars(module)["core_demo"] = ModuleType("core_demo")
    vars(module)["probes"] = implements(Hooks.core_probes)(lambda: ())
    assert plugins_from({"functions": module}).is_active("functions")

"""Nine mistakes of plugin authors; a line that a checker must refuse ends with ``# error``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from core.contributions import MODEL, EngineType, Probe, Transform
from core.hooks import Hooks, hookimpl, override
from core.plugins import Plugins
from core.run import Run


def on_tensor(subject: Tensor, run: Run) -> Tensor:
    return subject


def returns_none(subject: nn.Module, run: Run) -> None:
    subject.train()


wrong_subject = Transform(stage=MODEL, name="a", apply=on_tensor)  # error
nothing_returned = Transform(stage=MODEL, name="b", apply=returns_none)  # error


class WrongArgument(Hooks):
    @override
    @hookimpl
    def core_transforms(self, run: int) -> Iterable[Transform[Any]]:  # error
        return ()


class WrongReturn(Hooks):
    @override
    @hookimpl
    def core_engines(self) -> Iterable[Probe]:  # error
        return ()


class Misspelled(Hooks):
    @override
    @hookimpl
    def core_engine(self) -> Iterable[EngineType]:  # error
        return ()


class MissingArgument(Hooks):
    @override
    @hookimpl
    def core_transforms(self) -> Iterable[Transform[Any]]:  # error
        return ()


def calls(plugins: Plugins) -> None:
    plugins.collect(Hooks.core_transforms, "run")  # error
    plugins.collect(Hooks.core_transforms)  # error
    for engine in plugins.collect(Hooks.core_engines):
        engine.value.measure()  # error

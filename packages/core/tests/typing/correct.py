"""A plugin without mistakes, in both forms; no checker may object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

import core
from core.contributions import MODEL, Probe, Reading, Settings, Transform
from core.events import Event
from core.hooks import Hooks, hookimpl, implements, override
from core.run import Run


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    bits: int = 6


class Plugin(Hooks):
    """Adds nothing to a model."""

    @override
    @hookimpl
    def core_settings(self) -> Iterable[type[Settings]]:
        yield Demo

    @override
    @hookimpl
    def core_transforms(self, run: Run) -> Iterable[Transform[Any]]:
        yield Transform(stage=MODEL, name="same", apply=same, claims=frozenset({"linear"}))

    @core.override
    @core.hookimpl
    def core_event(self, run: Run, event: Event) -> None:
        if isinstance(event, core.StepEnded):
            run.tell(f"step {event.step}")


def same(model: nn.Module, run: Run) -> nn.Module:
    model.train(run.settings(Demo).bits > 4)
    return model


@implements(Hooks.core_probes)
def probes() -> Iterable[Probe]:
    yield Probe(name="fine", summary="Always.", measure=fine)


@implements(Hooks.core_transforms)
def transforms(run: Run) -> Iterable[Transform[nn.Module]]:
    return [Transform(stage=MODEL, name="same", apply=same)]


def fine(run: Run) -> Iterable[Reading]:
    yield Reading(name="fine", status="ok", value=float(run.rank))


def use(run: Run, model: nn.Module) -> nn.Module:
    for engine in run.plugins.collect(Hooks.core_engines):
        run.tell(engine.value.name)
    for found in run.plugins.collect(Hooks.core_transforms, run):
        run.tell(found.id)
    return run.apply(MODEL, model)

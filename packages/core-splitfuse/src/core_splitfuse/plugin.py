"""What this package contributes to core: thin, with the work imported where it is done."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from core import EngineType, Hooks, Probe, Reading, Step, hookimpl, override

if TYPE_CHECKING:
    from torch import nn

    from core import Engine, Row, Run, Settings
    from core.contributions import RecipeContribution


class Plugin(Hooks):
    """Serving with Dynamic SplitFuse."""

    @override
    @hookimpl
    def core_settings(self) -> Iterable[type[Settings]]:
        from core_splitfuse.settings import SplitFuseSettings

        yield SplitFuseSettings

    @override
    @hookimpl
    def core_engines(self) -> Iterable[EngineType]:
        yield EngineType(
            name="splitfuse",
            summary="Packs prompts and decodes of all requests into passes of one size.",
            build=build_engine,
            preference=10,
        )

    @override
    @hookimpl
    def core_commands(self) -> Iterable[click.Command]:
        from core_splitfuse.commands import serve

        yield serve

    @override
    @hookimpl
    def core_recipes(self) -> Iterable[RecipeContribution]:
        yield Step(
            recipe="quickstart",
            name="serve",
            summary="Serves the trained model to several clients at once, and measures their wait.",
            main=serve_clients,
            order=60,
        )

    @override
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(
            name="attention",
            summary="What attends over stored keys and values on this machine, and why.",
            measure=attention,
        )
        yield Probe(
            name="serving",
            summary="Tails and throughput of serving, against prompts first and transformers' own.",
            measure=serving,
            slow=True,
        )


def build_engine(model: nn.Module, run: Run) -> Engine:
    """Build the engine on a live module, as the settings say."""
    from core_splitfuse.engine.engine import Engine
    from core_splitfuse.settings import SplitFuseSettings

    return Engine(model, run.settings(SplitFuseSettings))


def serve_clients(run: Run, tour: Any) -> Iterable[Row]:
    """Serve the quickstart's model and measure what clients see."""
    from core_splitfuse.quickstart import serve_clients

    return serve_clients(run, tour)


def attention(run: Run) -> Iterable[Reading]:
    """Look at the kernels of attention, where there is torch."""
    if find_spec("torch") is None:
        advice = "pip install torch"
        return [Reading(name="attention", status="skip", value="needs torch", advice=advice)]
    from core_splitfuse.attention.cpu.probes import attention

    return attention(run)


def serving(run: Run) -> Iterable[Reading]:
    """Measure serving."""
    from core_splitfuse.benchmarking.probe import serving

    return serving(run)

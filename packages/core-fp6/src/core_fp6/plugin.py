"""What this package contributes to core: thin, with the work imported where it is done."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from core import MODEL, PIPELINE, Hooks, Phase, Probe, Reading, Step, Transform, hookimpl, override

if TYPE_CHECKING:
    from torch import nn

    from core import Row, Run, Settings
    from core.contributions import RecipeContribution


class Plugin(Hooks):
    """Six-bit floating-point weights."""

    @override
    @hookimpl
    def core_settings(self) -> Iterable[type[Settings]]:
        from core_fp6.settings import FP6Settings

        yield FP6Settings

    @override
    @hookimpl
    def core_setup(self) -> None:
        from core_fp6.registering import register

        register()

    @override
    @hookimpl
    def core_transforms(self, run: Run) -> Iterable[Transform[Any]]:
        yield Transform(
            stage=MODEL,
            name="quantize",
            apply=quantize_model,
            phase=Phase.PRECISION,
            claims=frozenset({"linear"}),
        )
        yield Transform(
            stage=PIPELINE,
            name="quantize-pipeline",
            apply=quantize_pipeline,
            phase=Phase.PRECISION,
            claims=frozenset({"linear"}),
        )

    @override
    @hookimpl
    def core_commands(self) -> Iterable[click.Command]:
        from core_fp6.commands import fp6

        yield fp6

    @override
    @hookimpl
    def core_recipes(self) -> Iterable[RecipeContribution]:
        yield Step(
            recipe="quickstart",
            name="six-bits",
            summary="Quantizes the trained model to six-bit weights, and measures what that costs.",
            main=six_bits,
            order=40,
        )

    @override
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(
            name="kernels",
            summary="What multiplies six-bit weights on this machine, and why.",
            measure=kernels,
        )
        yield Probe(
            name="cpu-linear",
            summary="Linear layers with six-bit weights on the CPU, against those of torch.",
            measure=cpu_linear,
            slow=True,
        )


def quantize_model(model: nn.Module, run: Run) -> nn.Module:
    """Give a model six-bit weights, as the settings say."""
    from core_fp6.transforming import quantize_model

    return quantize_model(model, run)


def quantize_pipeline(pipeline: Any, run: Run) -> Any:
    """Give the denoiser of a diffusers pipeline six-bit weights, as the settings say."""
    from core_fp6.transforming import quantize_pipeline

    return quantize_pipeline(pipeline, run)


def six_bits(run: Run, tour: Any) -> Iterable[Row]:
    """Quantize the quickstart's model and measure it."""
    from core_fp6.quickstart import six_bits

    return six_bits(run, tour)


def kernels(run: Run) -> Iterable[Reading]:
    """Look at the kernels, where there is torch."""
    if find_spec("torch") is None:
        advice = "pip install torch"
        return [Reading(name="kernels", status="skip", value="needs torch", advice=advice)]
    from core_fp6.probes import kernels

    return kernels(run)


def cpu_linear(run: Run) -> Iterable[Reading]:
    """Measure linear layers on the CPU."""
    from core_fp6.probes import cpu_linear

    return cpu_linear(run)

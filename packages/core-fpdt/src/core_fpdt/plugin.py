"""What this package contributes to core: thin, with the work imported where it is done."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from core import (
    BATCH,
    MODEL,
    Hooks,
    Phase,
    Probe,
    Reading,
    Step,
    Transform,
    hookimpl,
    override,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core import Row, Run, Settings
    from core.contributions import RecipeContribution


class Plugin(Hooks):
    """Training on very long sequences, chunk by chunk."""

    @override
    @hookimpl
    def core_settings(self) -> Iterable[type[Settings]]:
        from core_fpdt.settings import FPDTSettings

        yield FPDTSettings

    @override
    @hookimpl
    def core_transforms(self, run: Run) -> Iterable[Transform[Any]]:
        yield Transform(
            stage=MODEL,
            name="chunks",
            apply=run_in_chunks,
            phase=Phase.KERNEL,
            claims=frozenset({"attention", "mlp", "loss"}),
        )
        yield Transform(stage=BATCH, name="share", apply=share)

    @override
    @hookimpl
    def core_commands(self) -> Iterable[click.Command]:
        from core_fpdt.commands import fpdt

        yield fpdt

    @override
    @hookimpl
    def core_recipes(self) -> Iterable[RecipeContribution]:
        yield Step(
            recipe="quickstart",
            name="longer-sequences",
            summary="Trains at a longer sequence in the memory of the plain run, and measures both.",
            main=longer_sequences,
            order=30,
        )

    @override
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(
            name="chunks",
            summary="What attends to chunks on this machine, and where they can wait.",
            measure=chunks,
        )
        yield Probe(
            name="training",
            summary="Memory and time of a training step in chunks, against gradient checkpointing.",
            measure=training,
            slow=True,
        )


def run_in_chunks(model: nn.Module, run: Run) -> nn.Module:
    """Let a model run in chunks, as the settings say."""
    from core_fpdt.transforming import run_in_chunks

    return run_in_chunks(model, run)


def share(batch: MutableMapping[str, Tensor], run: Run) -> MutableMapping[str, Tensor]:
    """Cut a batch for this rank, where ranks share sequences."""
    from core_fpdt.transforming import share

    return share(batch, run)


def longer_sequences(run: Run, tour: Any) -> Iterable[Row]:
    """Train the quickstart's model at a longer sequence, and measure it."""
    from core_fpdt.quickstart import longer_sequences

    return longer_sequences(run, tour)


def chunks(run: Run) -> Iterable[Reading]:
    """Look at kernels and at memory for chunks, where there is torch."""
    if find_spec("torch") is None:
        advice = "pip install torch"
        return [Reading(name="chunks", status="skip", value="needs torch", advice=advice)]
    from core_fpdt.probes import chunks

    return chunks(run)


def training(run: Run) -> Iterable[Reading]:
    """Measure a training step."""
    from core_fpdt.probes import training

    return training(run)

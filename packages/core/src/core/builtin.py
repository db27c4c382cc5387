"""What core itself contributes, through the same hooks as everybody else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contributions import (
    CheckpointFormat,
    EngineType,
    ModelFamily,
    Probe,
    Recipe,
    Settings,
)
from core.hooks import Hooks, hookimpl, override

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

    from core.contributions import CheckpointContribution, Reading, RecipeContribution
    from core.engines import Engine
    from core.run import Run


@cache
def core_sections() -> Mapping[str, type[Settings]]:
    """Core's own settings sections; a plugin has just one, named after itself."""
    from core.checkpoints.settings import CheckpointSettings
    from core.engines import EngineSettings
    from core.recipes.settings import TrainSettings

    return {
        "checkpoint": CheckpointSettings,
        "engine": EngineSettings,
        "train": TrainSettings,
    }


class Builtin(Hooks):
    """DCP and safetensors, the plain engine, a small decoder, two recipes, and health checks."""

    @override
    @hookimpl
    def core_checkpoints(self) -> Iterable[CheckpointContribution]:
        from core.storage import FILES

        yield FILES
        yield CheckpointFormat(
            name="dcp",
            summary="Sharded files of torch.distributed.checkpoint, for any number of ranks.",
            detect=_is_dcp,
            reader=_dcp_reader,
            writer=_dcp_writer,
            preference=0,
        )
        yield CheckpointFormat(
            name="safetensors",
            summary="One file of whole tensors that every other tool reads.",
            detect=_is_safetensors,
            reader=_safetensors_reader,
            writer=_safetensors_writer,
        )

    @override
    @hookimpl
    def core_engines(self) -> Iterable[EngineType]:
        yield EngineType(
            name="plain",
            summary="The transformers model itself, one cache for each request.",
            build=_plain_engine,
            preference=0,
        )

    @override
    @hookimpl
    def core_models(self) -> Iterable[ModelFamily]:
        yield ModelFamily(
            name="small",
            summary="Small decoders in the style of Phi-3, for trying things out on a CPU.",
            presets=("tiny", "quickstart"),
            build=_small_model,
        )

    @override
    @hookimpl
    def core_recipes(self) -> Iterable[RecipeContribution]:
        yield Recipe(
            name="train", summary="Trains a causal language model on local text.", main=_train
        )
        yield Recipe(
            name="quickstart",
            summary="Trains a small decoder on Python's own library, and shows every plugin on it.",
            main=_quickstart,
        )

    @override
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(
            name="installation",
            summary="Whether the plugins, core itself and its extras are installed as they should.",
            measure=_installation,
        )
        yield Probe(
            name="machine", summary="What there is to compute and to store with.", measure=_machine
        )
        yield Probe(
            name="checkpoint",
            summary="A checkpoint through core against torch.save with fsync.",
            measure=_checkpoint_speed,
            slow=True,
        )
        yield Probe(
            name="hooks",
            summary="What one hook call and one plan cost.",
            measure=_hook_cost,
            slow=True,
        )


def _is_dcp(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _dcp_reader(path: Path, run: Run) -> StorageReader:
    from core.checkpoints.dcp import reader

    return reader(path, run)


def _dcp_writer(path: Path, run: Run) -> StorageWriter:
    from core.checkpoints.dcp import writer

    return writer(path, run)


def _is_safetensors(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and any(path.glob("*.safetensors")) and not _is_dcp(path)


def _safetensors_reader(path: Path, run: Run) -> StorageReader:
    from core.checkpoints.safetensors import reader

    return reader(path, run)


def _safetensors_writer(path: Path, run: Run) -> StorageWriter:
    from core.checkpoints.safetensors import writer

    return writer(path, run)


def _plain_engine(model: nn.Module, run: Run) -> Engine:
    from core.engines.plain import build

    return build(model, run)


def _small_model(preset: str, overrides: Mapping[str, Any]) -> nn.Module:
    from core.recipes.models import build_small

    return build_small(preset, overrides)


def _train(run: Run) -> Mapping[str, Any]:
    from core.recipes.train import train

    return train(run)


def _quickstart(run: Run) -> Mapping[str, Any]:
    from core.recipes.quickstart import quickstart

    return quickstart(run)


def _installation(run: Run) -> Iterable[Reading]:
    from core.health import installation

    return installation(run)


def _machine(run: Run) -> Iterable[Reading]:
    from core.health import machine

    return machine(run)


def _checkpoint_speed(run: Run) -> Iterable[Reading]:
    from core.speed import checkpoints

    return checkpoints(run)


def _hook_cost(run: Run) -> Iterable[Reading]:
    from core.speed import hooks

    return hooks(run)

"""What this package contributes to core: thin, with the work imported where it is done."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core import CheckpointFormat, Hooks, Step, hookimpl, override

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader

    from core import Converter, Description, Row, Run, Settings
    from core.contributions import CheckpointContribution, RecipeContribution


class Plugin(Hooks):
    """Checkpoints of any framework, on any parallel layout."""

    @override
    @hookimpl
    def core_settings(self) -> Iterable[type[Settings]]:
        from core_ucp.settings import UcpSettings

        yield UcpSettings

    @override
    @hookimpl
    def core_checkpoints(self) -> Iterable[CheckpointContribution]:
        from core_ucp.formats import FORMATS

        for name, summary, extends, readable, made in FORMATS:
            yield CheckpointFormat(
                name=name,
                summary=summary,
                detect=partial(detect, name) if readable else nobody,
                reader=partial(reader, name) if readable else None,
                describe=partial(describe, name) if readable else None,
                convert=partial(convert, name) if made else None,
                extends=extends,
            )

    @override
    @hookimpl
    def core_commands(self) -> Iterable[click.Command]:
        from core_ucp.commands import ucp

        yield ucp

    @override
    @hookimpl
    def core_recipes(self) -> Iterable[RecipeContribution]:
        yield Step(
            recipe="quickstart",
            name="elsewhere",
            summary="Resumes the run on two ranks under FSDP2, and comes back to one process.",
            main=resume_elsewhere,
            order=20,
        )


def detect(name: str, path: Path) -> bool:
    """Whether a path holds a kind of checkpoint."""
    from core_ucp.sources.registry import named

    source = named(name)
    return source is not None and source.detect(path)


def nobody(path: Path) -> bool:
    """Recognise nothing: what is only made is read by a format of core."""
    return False


def reader(name: str, path: Path, run: Run) -> StorageReader:
    """Read a checkpoint without converting it."""
    from core_ucp.conversion import opened
    from core_ucp.reader import UniversalReader

    return UniversalReader(opened(path, name, run))


def describe(name: str, path: Path, run: Run) -> Description:
    """Step and plain values of a checkpoint."""
    from core_ucp.conversion import opened
    from core_ucp.resuming import description

    return description(opened(path, name, run))


def convert(name: str, source: Path, fmt: CheckpointFormat, run: Run) -> Converter:
    """Plan a conversion."""
    from core_ucp.conversion import planned

    return planned(source, fmt, run, to=name)


def resume_elsewhere(run: Run, tour: Any) -> Iterable[Row]:
    """Go on from the quickstart's checkpoint on other ranks."""
    from core_ucp.quickstart.step import resume_elsewhere

    return resume_elsewhere(run, tour)

"""What this package contributes to core: thin, with the work imported where it is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core import CheckpointFormat, Hooks, Probe, Reading, Step, hookimpl, override

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
                detect=Detect(name) if readable else nobody,
                reader=Read(name) if readable else None,
                describe=Describe(name) if readable else None,
                convert=Convert(name) if made else None,
                extends=extends,
                heeds_rules=True,
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

    @override
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(
            name="digests",
            summary="How fast tensors are held against their digests.",
            measure=digests,
        )
        yield Probe(
            name="conversion",
            summary="A conversion against cp and torch's own converter.",
            measure=conversion,
            slow=True,
        )


@dataclass(frozen=True)
class Detect:
    """Whether a path holds the kind of checkpoint ``name``."""

    name: str

    def __call__(self, path: Path) -> bool:
        from core_ucp.sources.registry import named

        source = named(self.name)
        return source is not None and source.detect(path)


@dataclass(frozen=True)
class Read:
    """Reads the kind of checkpoint ``name`` without converting it."""

    name: str

    def __call__(self, path: Path, run: Run) -> StorageReader:
        from core_ucp.conversion import opened
        from core_ucp.reader import UniversalReader

        return UniversalReader(opened(path, self.name, run))


@dataclass(frozen=True)
class Describe:
    """Tells step and plain values of the kind of checkpoint ``name``."""

    name: str

    def __call__(self, path: Path, run: Run) -> Description:
        from core_ucp.conversion import opened
        from core_ucp.resuming import description

        return description(opened(path, self.name, run))


@dataclass(frozen=True)
class Convert:
    """Plans a conversion to the kind of checkpoint ``name``."""

    name: str

    def __call__(self, source: Path, fmt: CheckpointFormat, run: Run) -> Converter:
        from core_ucp.conversion import planned

        return planned(source, fmt, run, to=self.name)


def nobody(path: Path) -> bool:
    """Recognise nothing: what is only made is read by a format of core."""
    return False


def resume_elsewhere(run: Run, tour: Any) -> Iterable[Row]:
    """Go on from the quickstart's checkpoint on other ranks."""
    from core_ucp.quickstart.step import resume_elsewhere

    return resume_elsewhere(run, tour)


def digests(run: Run) -> Iterable[Reading]:
    """Measure the speed of digests, where there is what computes them."""
    missing = [name for name in ("torch", "numpy") if find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        advice = f"pip install {' '.join(missing)}"
        return [Reading(name="digests", status="skip", value=f"needs {needs}", advice=advice)]
    from core_ucp import probes

    return probes.digests(run)


def conversion(run: Run) -> Iterable[Reading]:
    """Measure a conversion on the disk of the run's folder."""
    from core_ucp import probes

    return probes.conversion(run)

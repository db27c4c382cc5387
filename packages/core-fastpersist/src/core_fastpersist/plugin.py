"""What this package contributes to core: thin, with the work imported where it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core import (
    CheckpointFormat,
    Hooks,
    Probe,
    Reading,
    RunEnded,
    Step,
    Storage,
    hookimpl,
    override,
)

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlanner
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

    from core import ByteSink, ByteSource, Event, Row, Run, Settings
    from core.contributions import CheckpointContribution, RecipeContribution


class Plugin(Hooks):
    """Checkpoints at the speed of the disk."""

    @override
    @hookimpl
    def core_settings(self) -> Iterable[type[Settings]]:
        from core_fastpersist.settings import FastPersistSettings

        yield FastPersistSettings

    @override
    @hookimpl
    def core_checkpoints(self) -> Iterable[CheckpointContribution]:
        yield CheckpointFormat(
            name="fastpersist",
            summary="DCP's own files past the page cache, with digests; stock DCP reads them.",
            detect=is_native,
            reader=native_reader,
            writer=native_writer,
            planner=balanced_planner,
            preference=10,
            works=supported,
            extends="dcp",
        )
        yield CheckpointFormat(
            name="fastpersist-safetensors",
            summary="Sharded safetensors past the page cache, with digests; any reader opens them.",
            detect=is_sharded,
            reader=sharded_reader,
            writer=sharded_writer,
            planner=balanced_planner,
            works=supported,
            extends="safetensors",
        )
        yield Storage(
            name="direct",
            summary="Files past the page cache, held against their digests.",
            sink=direct_sink,
            source=direct_source,
            preference=10,
            works=supported,
        )

    @override
    @hookimpl
    def core_commands(self) -> Iterable[click.Command]:
        from core_fastpersist.commands import fastpersist

        yield fastpersist

    @override
    @hookimpl
    def core_event(self, run: Run, event: Event) -> None:
        if isinstance(event, RunEnded) and "core_fastpersist.dcp.session" in sys.modules:
            from core_fastpersist.dcp.session import close

            close(run)

    @override
    @hookimpl
    def core_recipes(self) -> Iterable[RecipeContribution]:
        yield Step(
            recipe="quickstart",
            name="every-step",
            summary="Saves a checkpoint after every training step, and measures what that costs.",
            main=every_step,
            order=10,
        )

    @override
    @hookimpl
    def core_probes(self) -> Iterable[Probe]:
        yield Probe(
            name="direct-io",
            summary="Whether checkpoints can go past the page cache, and how fast the disk is.",
            measure=direct_io,
        )
        yield Probe(
            name="speed",
            summary="Durable saves and cold loads against torch, safetensors, DCP and the disk.",
            measure=speed,
            slow=True,
        )


# Checkpoints


def supported(path: Path) -> str:
    """Why nothing of this can be used, or an empty string; a disk without direct I/O is no reason."""
    return "" if sys.platform == "linux" else "it needs the direct I/O of Linux"


def is_native(path: Path) -> bool:
    """Whether a folder is a DCP checkpoint with digests."""
    return (path / ".metadata").is_file() and (path / ".metadata.xxh3.json").is_file()


def native_writer(path: Path, run: Run) -> StorageWriter:
    """Write a DCP folder with what the run has staged before."""
    from core_fastpersist.dcp.native import NativeWriter
    from core_fastpersist.dcp.session import session_of

    return NativeWriter(path, session_of(run).staging)


def native_reader(path: Path, run: Run) -> StorageReader:
    """Read a DCP folder."""
    from core_fastpersist.dcp.reader import NativeReader

    return NativeReader(path)


def is_sharded(path: Path) -> bool:
    """Whether a folder has safetensors files that are shards."""
    return path.is_dir() and any(path.glob("shard-*.safetensors"))


def sharded_writer(path: Path, run: Run) -> StorageWriter:
    """Write safetensors shards with what the run has staged before."""
    from core_fastpersist.dcp.session import session_of
    from core_fastpersist.dcp.shards import SafetensorsWriter

    return SafetensorsWriter(path, session_of(run).staging)


def sharded_reader(path: Path, run: Run) -> StorageReader:
    """Read safetensors shards."""
    from core_fastpersist.dcp.shards_reader import SafetensorsReader

    return SafetensorsReader(path)


def balanced_planner(run: Run) -> SavePlanner:
    """Share the writing of replicated state as the settings say."""
    from core_fastpersist.dcp.session import session_of

    return session_of(run).planner


def direct_sink(path: Path) -> ByteSink:
    """Write files into a folder."""
    from core_fastpersist.storage import DirectSink

    return DirectSink(path)


def direct_source(path: Path) -> ByteSource:
    """Read files of a folder."""
    from core_fastpersist.storage import DirectSource

    return DirectSource(path)


def every_step(run: Run, tour: Any) -> Iterable[Row]:
    """Train on with a checkpoint after every step."""
    from core_fastpersist import quickstart

    return quickstart.every_step(run, tour)


def direct_io(run: Run) -> Iterable[Reading]:
    """Look at the disk of the run's folder."""
    from core_fastpersist.probes import disk, processes

    yield from disk(run)
    yield from processes(run)


def speed(run: Run) -> Iterable[Reading]:
    """Measure on the disk of the run's folder."""
    from core_fastpersist.bench.probe import readings

    return readings(run)

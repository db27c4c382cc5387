"""Conversion between checkpoint formats: the reader of one and the writer of the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader

from core.checkpoints import layout
from core.choice import choose
from core.contributions import CheckpointFormat
from core.errors import CheckpointError
from core.plugins import Contributed
from core.storage import new_folder, require_free

if TYPE_CHECKING:
    from core.run import Run

Progress = Callable[[str, int], None]
"""Called with the name and the bytes of every tensor before it is converted."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion does, known before a byte of a tensor is read.

    Attributes:
        source: path that is read.
        target: folder that appears.
        source_format: format found in ``source``.
        target_format: format of ``target``.
        tensors: shape, dtype and chunks of every tensor by name.
        skipped: names of entries that are no tensors and are left out on request.
    """

    source: Path
    target: Path
    source_format: CheckpointFormat
    target_format: CheckpointFormat
    tensors: dict[str, TensorStorageMetadata]
    skipped: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size_in_bytes(tensor) for tensor in self.tensors.values())


def detect(path: Path, run: Run) -> Contributed[CheckpointFormat]:
    """Find the format of what is at ``path``; a dialect goes before the format that it extends.

    Raises:
        CheckpointError: when no format, or more than one, recognises it.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    formats = run.checkpoints.formats()
    found = [c for c in formats if c.value.reader is not None and c.value.detect(path)]
    extended = {c.value.extends for c in found}
    dialects = [c for c in found if not extended & {c.value.name, c.id}]
    if len(dialects) == 1:
        return dialects[0]
    names = ", ".join(sorted(c.value.name for c in (found or formats)))
    state = f"looks like {names}" if found else "is of no known format"
    fix = "`core convert --from` names one" if found else f"known formats: {names}"
    raise CheckpointError(f"{path} {state}", fix=fix)


def plan(
    source: Path,
    target: Path,
    to: str,
    run: Run,
    *,
    from_format: str = "auto",
    skip_objects: bool = False,
) -> tuple[Conversion, StorageReader]:
    """Check a conversion without writing anything.

    Args:
        source: checkpoint file or folder.
        target: folder to create; must not exist.
        to: name of the target format.
        run: the run whose plugins offer the formats.
        from_format: name of the source's format; ``auto`` finds it by looking.
        skip_objects: leave out entries that are no tensors instead of refusing them.

    Raises:
        CheckpointError: for an unknown or damaged source, or a target that exists or overlaps it.
        PluginError: for an unknown format.
    """
    _require_apart(source, target)
    read_as = _source_format(source, from_format, run)
    written_as = choose(
        "checkpoint format",
        to,
        run.checkpoints.formats(),
        lambda f: "" if f.writer else "it cannot be written",
    ).value
    assert read_as.reader is not None
    reader = read_as.reader(source, run)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    entries = metadata.state_dict_metadata
    tensors = {n: e for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    objects = tuple(name for name in entries if name not in tensors)
    if objects and not skip_objects:
        raise CheckpointError(
            f"{source} has {len(objects)} entries that are no tensors: {', '.join(objects[:5])}",
            why="they are pickles, which are not carried over",
            fix="pass --skip-objects to leave them out",
        )
    return Conversion(source, target, read_as, written_as, tensors, objects), reader


def execute(
    conversion: Conversion, reader: StorageReader, run: Run, progress: Progress | None = None
) -> None:
    """Carry the conversion out, one tensor in memory at a time.

    Raises:
        CheckpointError: when reading or writing fails; the target does not exist then.
    """
    with new_folder(conversion.target) as folder:
        _write(conversion, reader, run, progress, folder)
        _carry_manifest(conversion, folder)


def size_in_bytes(tensor: TensorStorageMetadata) -> int:
    """Bytes of a whole tensor."""
    return math.prod(tensor.size) * tensor.properties.dtype.itemsize


def _require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is taken, or that lies in the source; links are followed."""
    real_source, real_target = source.resolve(), target.resolve()
    if real_source == real_target:
        raise CheckpointError(f"{source} and {target} are the same", fix="choose another target")
    if real_source in real_target.parents:
        raise CheckpointError(f"{target} lies inside of {source}", fix="choose another target")
    if real_target in real_source.parents:
        raise CheckpointError(f"{source} lies inside of {target}", fix="choose another target")
    require_free(target)


def _source_format(source: Path, name: str, run: Run) -> CheckpointFormat:
    if name == "auto":
        return detect(source, run).value
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    return choose(
        "checkpoint format",
        name,
        run.checkpoints.formats(),
        lambda f: "" if f.reader else "it cannot be read",
    ).value


def _write(
    conversion: Conversion,
    reader: StorageReader,
    run: Run,
    progress: Progress | None,
    folder: Path,
) -> None:
    """Write all tensors into ``folder``, as DCP does it, under a planner of our own."""
    assert conversion.target_format.writer is not None
    writer = conversion.target_format.writer(folder, run)
    planner = _StreamingPlanner(conversion.tensors, reader, progress)
    writer.reset()
    writer.set_up_storage_writer(True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    (final,) = writer.prepare_global_plan([local])
    results = writer.write_data(final, planner).wait()
    metadata = Metadata({name: _one_chunk(tensor) for name, tensor in conversion.tensors.items()})
    writer.finish(metadata, [results])


class _StreamingPlanner(SavePlanner):
    """Hands the writer one tensor at a time, read when the writer asks for it."""

    def __init__(
        self,
        tensors: dict[str, TensorStorageMetadata],
        reader: StorageReader,
        progress: Progress | None,
    ) -> None:
        self._tensors = tensors
        self._reader = reader
        self._progress = progress

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_whole(name, tensor) for name, tensor in self._tensors.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        name = write_item.index.fqn
        described = self._tensors[name]
        if self._progress is not None:
            self._progress(name, size_in_bytes(described))
        tensor = torch.empty(described.size, dtype=described.properties.dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: tensor}, Metadata({name: described}), True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(plan, planner).wait()
        return tensor


def _whole(name: str, tensor: TensorStorageMetadata) -> WriteItem:
    start = torch.Size([0] * len(tensor.size))
    chunk = ChunkStorageMetadata(offsets=start, sizes=tensor.size)
    return WriteItem(
        index=MetadataIndex(name, start),
        type=WriteItemType.TENSOR,
        tensor_data=TensorWriteData(chunk=chunk, properties=tensor.properties, size=tensor.size),
    )


def _one_chunk(tensor: TensorStorageMetadata) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * len(tensor.size)), tensor.size)
    return dataclasses.replace(tensor, chunks=[chunk])


def _carry_manifest(conversion: Conversion, folder: Path) -> None:
    """Keep what a run's checkpoint says of itself, so that it stays loadable by ``run.load``."""
    if not (conversion.source / layout.MANIFEST).is_file():
        return
    manifest = layout.Manifest.read(conversion.source)
    name = conversion.target_format.name
    changed = dataclasses.replace(manifest, format=name, files=layout.file_sizes(folder))
    changed.write(folder)

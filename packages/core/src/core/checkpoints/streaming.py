"""The way from any format to any other: tensors go from reader to writer one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
from core.checkpoints.settings import CheckpointSettings
from core.checkpoints.values import encode
from core.contributions import CheckpointFormat, Progress
from core.errors import CheckpointError

if TYPE_CHECKING:
    from core.run import Run


@dataclass(frozen=True)
class Streamed:
    """A conversion by way of a DCP reader and a DCP writer.

    Attributes:
        source: path that is read.
        source_format: format of the source.
        target_format: format that is written.
        reader: set up on the source.
        run: the run whose settings the writer heeds.
        entries: shape, dtype and chunks of every tensor by name.
        skipped: names of entries that are no tensors and are left out on request.
    """

    source: Path
    source_format: CheckpointFormat
    target_format: CheckpointFormat
    reader: StorageReader
    run: Run
    entries: Mapping[str, TensorStorageMetadata]
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        return sum(_bytes(tensor) for tensor in self.entries.values())

    def describe(self) -> Mapping[str, Any]:
        return {}

    def write(self, folder: Path, progress: Progress) -> None:
        """Write all tensors into ``folder``, as DCP does it, under a planner of our own."""
        assert self.target_format.writer is not None
        writer = self.target_format.writer(folder, self.run)
        planner = _StreamingPlanner(self.entries, self.reader, progress)
        writer.reset()
        writer.set_up_storage_writer(True)
        local = writer.prepare_local_plan(planner.create_local_plan())
        (final,) = writer.prepare_global_plan([local])
        results = writer.write_data(final, planner).wait()
        metadata = Metadata({name: _one_chunk(tensor) for name, tensor in self.entries.items()})
        writer.finish(metadata, [results])
        manifest = described(self.source, self.source_format, self.run)
        if manifest is not None:
            # What it says of itself goes along, so that `run.load` loads the new one, too.
            sizes = layout.file_sizes(folder)
            dataclasses.replace(manifest, format=self.target_format.name, files=sizes).write(folder)


def streamed(
    source: Path,
    read_as: CheckpointFormat,
    written_as: CheckpointFormat,
    run: Run,
    *,
    skip_objects: bool = False,
) -> Streamed:
    """Plan a conversion by reader and writer; nothing of a tensor is read.

    Raises:
        CheckpointError: for a damaged source, or one with entries that are no tensors.
    """
    assert read_as.reader is not None
    require_heeded(source, read_as, run)
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
    return Streamed(source, read_as, written_as, reader, run, tensors, objects)


class _StreamingPlanner(SavePlanner):
    """Hands the writer one tensor at a time, read when the writer asks for it."""

    def __init__(
        self,
        tensors: Mapping[str, TensorStorageMetadata],
        reader: StorageReader,
        progress: Progress,
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
        self._progress(name, _bytes(described))
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


def _bytes(tensor: TensorStorageMetadata) -> int:
    """Bytes of a whole tensor."""
    return math.prod(tensor.size) * tensor.properties.dtype.itemsize


def require_heeded(source: Path, fmt: CheckpointFormat, run: Run) -> None:
    """Refuse rules that the reader of a checkpoint would ignore.

    Raises:
        CheckpointError: naming the rules and the format.
    """
    rules = run.settings(CheckpointSettings).rules
    if rules and not fmt.heeds_rules:
        raise CheckpointError(
            f"the rules {rules!r} would be ignored",
            why=f"{source} is read as {fmt.name}, which knows where its tensors lie",
            fix="leave `checkpoint.rules` out, or convert to a format that heeds them",
        )


def described(source: Path, fmt: CheckpointFormat, run: Run) -> layout.Manifest | None:
    """What a checkpoint says of itself, or else its format of it; ``None`` where neither does."""
    if (source / layout.MANIFEST).is_file():
        return layout.Manifest.read(source)
    if fmt.describe is None:
        return None
    found = fmt.describe(source, run)
    # A description has no tensors: those are found by the reader.
    values = {name: encode(value, name, {}) for name, value in found.values.items()}
    return layout.Manifest(found.step, fmt.name, 0, values, {}, {})

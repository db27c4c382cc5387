"""Reading a checkpoint that exists: what it says of itself, its reader, and its tensors."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader

from core.checkpoints.convert import detect
from core.checkpoints.layout import MANIFEST, Manifest
from core.checkpoints.save import root_cause
from core.checkpoints.streaming import described, require_heeded
from core.choice import choose
from core.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from core.run import Run


@dataclass(frozen=True)
class Introduced:
    """What is known of a checkpoint before it is read.

    Attributes:
        manifest: its own; for another program's, what its format says of it.
        translated: whether its names are those of torch's state dicts, not those of a state.
    """

    manifest: Manifest
    translated: bool = False


def introduce(folder: Path, run: Run) -> Introduced:
    """Read what a checkpoint says of itself, or have its format say it.

    Raises:
        CheckpointError: when there is nothing, or nothing that a format recognises.
    """
    if (folder / MANIFEST).is_file() or not folder.exists():
        own = Manifest.read(folder)
        # No rank has saved what was converted: its format has said this of it.
        return Introduced(own, translated=not own.world_size)
    found = detect(folder, run).value
    require_heeded(folder, found, run)
    said = described(folder, found, run)
    if said is None:
        said = Manifest(0, found.name, 0, {}, {}, {})
    return Introduced(said, translated=True)


def open_reader(folder: Path, manifest: Manifest, run: Run) -> StorageReader:
    """Open a checkpoint with the format that its manifest names.

    Raises:
        PluginError: when no active plugin has that format.
    """
    chosen = choose(
        "checkpoint format",
        manifest.format,
        run.checkpoints.formats(),
        lambda f: "" if f.reader else "it cannot be read",
    ).value
    assert chosen.reader is not None
    return chosen.reader(folder, run)


def read(
    folder: Path, reader: StorageReader, tensors: dict[str, Tensor], group: ProcessGroup | None
) -> None:
    """Fill ``tensors`` from a checkpoint; all ranks of ``group`` call it together.

    Raises:
        CheckpointError: with the reason of the first rank that failed.
    """
    try:
        load(
            dict(tensors),
            storage_reader=reader,
            planner=TensorPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(f"cannot load {folder}", why=root_cause(error)) from error


class TensorPlanner(DefaultLoadPlanner):
    """DCP's planner for tensors: an object, which is a pickle, is refused."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn!r} is a pickled object, not a tensor")

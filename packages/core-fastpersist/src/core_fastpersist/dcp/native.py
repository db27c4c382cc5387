"""The DCP writer: one file a rank in torch's own format, written past the page cache.

Stock ``dcp.load`` reads what it writes. DCP's format allows gaps between its tensors, so every large
tensor gets a place in the file that is congruent with its address: direct I/O then takes it from where
it lies, whoever allocated it.
"""

from __future__ import annotations

import io
import operator
import pickle
import threading
import uuid
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from core.disk import TEMPORARY, disk_errors, replace_file, sync
from core_fastpersist.coverage import sidecar_of, write_digests
from core_fastpersist.dcp.blobs import frame
from core_fastpersist.dcp.image import Image
from core_fastpersist.dcp.staged import StagingWriter
from core_fastpersist.direct.digests import Digests, digest
from core_fastpersist.direct.pieces import HostBytes, Piece, Source
from core_fastpersist.direct.room import writing
from core_fastpersist.tensors import LaterBytes, source_of

METADATA = ".metadata"
_ALIGNED = 4096
_LARGE = 32 * 2**10


class NativeWriter(StagingWriter):
    """Writes torch's DCP format at the speed of the disk.

    Takes the place of ``FileSystemWriter`` in ``dcp.save`` and ``dcp.async_save``. Saving twice into
    one folder is safe: files get new names, and the new ``.metadata`` replaces the old one at once.

    Args:
        path: folder of the checkpoint.
        staging: how tensors are staged and files carried; shared by the checkpoints of a run.

    Example:
        >>> import tempfile, torch
        >>> import torch.distributed.checkpoint as dcp
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"w": torch.ones(3)}, storage_writer=NativeWriter(folder))
        >>> state = {"w": torch.zeros(3)}
        >>> dcp.load(state, checkpoint_id=folder)
        >>> state["w"]
        tensor([1., 1., 1.])
    """

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with disk_errors(f"cannot create {self.path}"):
            Path(self.path).mkdir(parents=True, exist_ok=True)
        if self.rank is not None and not self.use_collectives:
            return super().prepare_local_plan(plan)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder = Path(self.path)
        results: list[WriteResult] = []
        try:
            if plan.items:
                name = _free_name(folder, plan.storage_data.prefix)
                image = self._image(plan.items, planner)
                path = folder / name
                digests = self.carrier.write(path, image.size, image.pieces)
                write_digests(path, digests)
                results = image.results(name)
            with disk_errors(f"cannot make {folder} durable"):
                sync(folder)
        finally:
            self.release()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _image(self, items: list[WriteItem], planner: SavePlanner) -> Image:
        """The image of this rank's file; that of the last checkpoint, if it has the same memory."""
        staged = self.staged_checkpoint
        if staged is None or staged.live is not None:
            return _lay_out(items, planner)
        last = staged.area.image
        if last is not None and last.items is items:
            return last
        image = _lay_out(items, planner)
        if all(item.type != WriteItemType.BYTE_IO for item in items):
            staged.area.image = image
        return image

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the checkpoint visible: metadata and their digest, durable, in place at once."""
        found = [result for one in results for result in one]
        own = self.rank if self.rank is not None and not self.use_collectives else None
        path = Path(self._get_metadata_path(own))
        content, whole = self._described(metadata, results)
        again = path.exists()
        if again:  # metadata and the digests of others, seen together, would be refused
            sidecar_of(path).unlink(missing_ok=True)
            sync(path.parent)
            _replace(path, content)
        write_digests(path, whole)
        if not again:
            _replace(path, content)
        sync(path.parent)
        if self.use_collectives:
            _remove_others(path.parent, {result.storage_data.relative_path for result in found})

    def _described(
        self, metadata: Metadata, results: list[list[WriteResult]]
    ) -> tuple[bytes, Digests]:
        """Metadata as bytes; those of the last checkpoint, if nothing in them is new."""
        area = None if self.staged_checkpoint is None else self.staged_checkpoint.area
        key = (metadata.state_dict_metadata, metadata.planner_data, *results)
        if area is not None and area.described is not None:
            before, content, digests = area.described
            if len(before) == len(key) and all(map(operator.is_, before, key)):
                return content, digests
        metadata.version = CURRENT_DCP_VERSION
        found = (result for one in results for result in one)
        metadata.storage_data = {result.index: result.storage_data for result in found}
        # Not where it was saved: a checkpoint is moved to its place when it is complete.
        metadata.storage_meta = None
        content = pickle.dumps(metadata)
        digests = Digests(0, max(_ALIGNED, len(content)), len(content), (digest(content),))
        if area is not None:
            area.described = key, content, digests
        return content, digests


def _free_name(folder: Path, prefix: str) -> str:
    """DCP's own name for a rank's file, or one that nobody has in a folder that is saved into again."""
    name = f"{prefix}0{DEFAULT_SUFFIX}"
    return (
        name if not (folder / name).exists() else f"{prefix}{uuid.uuid4().hex[:8]}{DEFAULT_SUFFIX}"
    )


def _lay_out(items: list[WriteItem], planner: SavePlanner) -> Image:
    pieces: list[Piece] = []
    places: list[tuple[WriteItem, int, int]] = []
    position = 0
    lock = threading.Lock()
    for item in items:
        before, source, after = _parts(item, planner, lock)
        first = position + len(before)
        if source.nbytes >= _LARGE:
            shift = Piece(0, source).shift or 0
            first += (shift - first) % _ALIGNED
        offset, end = first - len(before), first + source.nbytes
        pieces += [
            Piece(offset, HostBytes(before)),
            Piece(first, source),
            Piece(end, HostBytes(after)),
        ]
        position = end + len(after)
        places.append((item, offset, position - offset))
    return Image(items, position, pieces, places)


def _parts(
    item: WriteItem, planner: SavePlanner, lock: threading.Lock
) -> tuple[bytes, Source, bytes]:
    """Bytes before an item's elements, the elements, and bytes after them."""
    if item.type == WriteItemType.BYTE_IO:
        data = planner.resolve_data(item)
        assert isinstance(data, io.BytesIO)
        return b"", HostBytes(data.getbuffer()), b""
    assert item.tensor_data is not None
    shape = tuple(item.tensor_data.chunk.sizes)
    around = frame(item.tensor_data.properties.dtype, shape)

    def resolve() -> Tensor:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        return data

    # A planner of DCP hands out what it has; another one may make each tensor when it is asked.
    if isinstance(planner, DefaultSavePlanner):
        return around.before, source_of(resolve(), item.index.fqn), around.after
    nbytes = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
    return around.before, LaterBytes(item.index.fqn, nbytes, resolve, lock), around.after


def _replace(path: Path, content: bytes) -> None:
    with writing(path, len(content)):
        replace_file(path, content)


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """Remove the data files of a checkpoint that this one has replaced, and what kills have left."""
    for left in folder.glob(f".*{TEMPORARY}*"):
        left.unlink(missing_ok=True)
    for path in folder.glob(f"__*{DEFAULT_SUFFIX}"):
        if path.name not in wanted:
            sidecar_of(path).unlink(
                missing_ok=True
            )  # first: digests of no file would stay for ever
            path.unlink(missing_ok=True)

"""The DCP format: what ``torch.distributed.checkpoint`` writes, read without its pickles."""

from __future__ import annotations

import io
import os
from io import BufferedWriter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage] # stock readers unpickle this class
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from core.checkpoints.blobs import Slice, locate
from core.checkpoints.boxes import fill
from core.checkpoints.metadata import read_metadata
from core.disk import disk_errors, plain_name
from core.errors import CheckpointError
from core.storage import ByteSource, FileSource

if TYPE_CHECKING:
    from core.run import Run


def reader(path: Path, run: Run) -> DcpReader:
    """Open a DCP folder."""
    return DcpReader(path, run.checkpoints.storage(path).value.source(path))


def writer(path: Path, run: Run) -> DcpWriter:
    """Write a DCP folder that stock ``dcp.load`` reads."""
    return DcpWriter(path, sync_files=True)


class DcpWriter(FileSystemWriter):
    """DCP's writer, holding one tensor at a time where DCP's own keeps them until the file ends.

    It writes in one thread, because DCP loses the errors of further ones.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        path = Path(self.path) / name
        with disk_errors(f"cannot write {path}"), path.open("wb") as file:
            results = [_write_item(file, name, item, planner) for item in plan.items]
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_item(
    file: BufferedWriter, name: str, item: WriteItem, planner: SavePlanner
) -> WriteResult:
    offset, data = file.tell(), planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:
        tensor = data.detach().cpu()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        _save(tensor if whole else tensor.clone(), file)
    length = file.tell() - offset
    return WriteResult(item.index, length, _StorageInfo(name, offset, length))


def _save(tensor: torch.Tensor, file: BufferedWriter) -> None:
    """``torch.save``, with the disk's own error where torch speaks of positions only."""
    watched = _Watched(file)
    try:
        torch.save(tensor, cast(IO[bytes], watched))
    except RuntimeError as error:
        if watched.refusal is not None:
            raise watched.refusal from error
        raise


class _Watched(io.RawIOBase):
    """Writes to a file, and keeps the error with which it refuses."""

    def __init__(self, file: BufferedWriter) -> None:
        self._file = file
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.refusal = error
            raise


class DcpReader(FileSystemReader):
    """Reads a DCP folder: no pickle beyond a closed list of classes, no copy of a whole tensor."""

    def __init__(self, path: Path, source: ByteSource | None = None) -> None:
        super().__init__(path)
        self._source = source or FileSource(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_metadata(Path(self.path))
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            self._check(info)
            if item.type == LoadItemType.BYTE_IO:
                blob = bytearray(info.length)
                self._source.read_into(info.relative_path, info.offset, blob)
                planner.load_bytes(item, io.BytesIO(blob))
            else:
                self._read_tensor(item, info, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, info: _StorageInfo) -> None:
        """Refuse an entry that leaves the folder or its file, or that is packed in any way."""
        name = plain_name(info.relative_path)
        if info.transform_descriptors:
            packed = ", ".join(info.transform_descriptors)
            raise CheckpointError(
                f"{name} is packed with {packed}", why="only plain files are read"
            )
        end = info.offset + info.length
        if min(info.offset, info.length) < 0 or end > self._source.size(name):
            raise CheckpointError(f"{name} is damaged", why=f"an entry would end at byte {end:,}")

    def _read_tensor(self, item: ReadItem, info: Any, planner: LoadPlanner) -> None:
        blob = self._source, info.relative_path, info.offset, info.length
        stored = locate(Slice(*blob))
        target = planner.resolve_tensor(item).detach()
        if stored is not None:
            fill(target, self._source, stored, item.storage_offsets)
        else:
            target.copy_(_load(Slice(*blob), item))
        planner.commit_tensor(item, target)


def _load(blob: Slice, item: ReadItem) -> torch.Tensor:
    """Load a box of an unusual tensor, such as a permuted one, by way of the whole."""
    try:
        tensor: torch.Tensor = torch.load(
            io.BufferedReader(blob), map_location="cpu", weights_only=True
        )
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{blob.name} is damaged", why=reason) from None
    return tensor

"""Saving one file: complete and durable under its name, or not there.

The data are written and synced first and the header last, under a temporary name. A rename replaces
what was there; whoever has the old file open or mapped keeps it.
"""

from __future__ import annotations

import fcntl
import glob
import io
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from core.checkpoints.save import root_cause
from core.disk import TEMPORARY, disk_errors, sync
from core.errors import CheckpointError
from core.storage import require_free
from core_fastpersist.direct.alignment import alignment_of
from core_fastpersist.direct.newfile import NewFile, WriteOptions, Written
from core_fastpersist.direct.pieces import HostBytes, Piece
from core_fastpersist.files.header import ALIGNMENT, PREFIX, Draft, Entry, draft
from core_fastpersist.files.layout import Run, arrange
from core_fastpersist.files.leaves import Stored
from core_fastpersist.files.skeleton import skeleton
from core_fastpersist.files.sources import pieces_of
from core_fastpersist.files.tree import Encoder

Format = Literal["safetensors", "pt"]
PT_SUFFIXES = (".pt", ".pth")
_PICKLES = PREFIX + "pickles"


@dataclass(frozen=True)
class SaveReport:
    """What was written.

    Args:
        path: the file.
        bytes: its size.
        straight: bytes that went to the disk from where they lay, without a copy.
        copied: bytes that went through a buffer; with padding, so that the sum may exceed ``bytes``.
        chunks: number of chunks that have a digest.
        direct: whether the page cache was bypassed.
    """

    path: Path
    bytes: int
    straight: int
    copied: int
    chunks: int
    direct: bool


def save(
    obj: Any,
    path: str | Path,
    *,
    options: WriteOptions | None = None,
    format: Format | None = None,
    overwrite: bool = True,
    pickle_objects: bool = False,
) -> SaveReport:
    """Save a tree of tensors and plain values into one file that every stock tool reads.

    Safetensors files hold every tensor under its dotted name, and the tree and digests in their
    metadata; tensors that share memory share it again after :func:`~core_fastpersist.load`. ``.pt``
    files are read by ``torch.load(weights_only=True, mmap=True)``.

    The call returns when the file is durable. Until then the previous file is untouched.

    Args:
        obj: mappings, lists and tuples of tensors, arrays, numbers, strings and bytes. It must not
            change until the call returns.
        path: the file; its folder is created.
        options: how it is written.
        format: ``"safetensors"`` or ``"pt"``; by default ``"pt"`` for ``.pt`` and ``.pth``.
        overwrite: whether an existing file is replaced.
        pickle_objects: whether objects of other types are pickled into a safetensors file. Reading
            them back may need ``load(..., trust_pickles=True)``.

    Raises:
        CheckpointError: when the tree holds what no file can hold, the path is taken, or the disk
            refuses; then no new file is there.
    """
    path = Path(path)
    options = options or WriteOptions()
    if path.is_dir() or not path.name:
        raise CheckpointError(f"cannot write {path}", why="it is a folder", fix="name a file")
    if not overwrite:
        require_free(path)
    with disk_errors(f"cannot create {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen = format or ("pt" if path.suffix in PT_SUFFIXES else "safetensors")
    temporary = path.with_name(f".{path.name}{TEMPORARY}{uuid.uuid4().hex[:8]}")
    _remove_leftovers(path)
    write = _write_pt if chosen == "pt" else _write_safetensors

    def commit() -> None:
        if not overwrite:
            require_free(path)
        temporary.replace(path)
        sync(path.parent)

    try:
        with disk_errors(f"cannot write {path}"), torch.no_grad():
            # Before the file is closed: it is locked until then, and no leftover for anybody.
            size, chunks, written = write(obj, temporary, options, pickle_objects, commit)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return SaveReport(path, size, written.straight, written.copied, chunks, written.direct)


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed process has left of the same file; one that still writes holds a lock."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY}*"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _write_safetensors(
    obj: Any, temporary: Path, options: WriteOptions, pickling: bool, commit: Callable[[], None]
) -> tuple[int, int, Written]:
    found = alignment_of(temporary.parent)
    runs, plan = _plan(obj, max(options.chunk, found.offset), found.memory, pickling)
    data = list(pieces_of(runs, plan.start))
    with NewFile(temporary, plan.size, options) as file:
        digests = file.write(data, start=plan.start, keep_head=plan.start)
        file.sync()
        head = Piece(0, HostBytes(plan.block(digests)))
        file.write_head([head, *data], keep_head=plan.start)
        file.sync()
        commit()
    return plan.size, len(digests.hashes), file.written


def _plan(obj: Any, chunk: int, modulus: int, pickling: bool) -> tuple[list[Run], Draft]:
    """Order of the bytes, and the header that describes them."""
    encoder = Encoder(pickling=pickling)
    root = encoder.encode(obj)
    stored = encoder.leaves.finish()
    tree = {"root": root, "pickles": None}
    if encoder.pickled:
        tree["pickles"] = encoder.leaves.free_name(_PICKLES)
        stored.append(_pickles(tree["pickles"], encoder.pickled))
    runs, residue = arrange(stored, modulus)
    entries: list[Entry] = []
    end = 0
    for part in (part for run in runs for part in run.parts):
        entries.append(Entry(part.name, part.dtype, part.shape, end, end + part.nbytes))
        end += part.nbytes
    return runs, draft(entries, tree, chunk=chunk, residue=residue, alignment=ALIGNMENT)


def _pickles(name: str, objects: Sequence[Any]) -> Stored:
    """Objects as one pickle that ``torch.load`` reads."""
    blob = io.BytesIO()
    try:
        torch.save(list(objects), blob)
    except Exception as error:
        kinds = sorted({type(item).__qualname__ for item in objects})
        raise CheckpointError(
            f"cannot pickle what is saved ({', '.join(kinds)})", why=root_cause(error)
        ) from error
    data = torch.frombuffer(bytearray(blob.getvalue()), dtype=torch.uint8)
    return Stored(name, "U8", tuple(data.shape), data, 1)


def _write_pt(
    obj: Any, temporary: Path, options: WriteOptions, _: bool, commit: Callable[[], None]
) -> tuple[int, int, Written]:
    pieces, size = skeleton(obj)
    with NewFile(temporary, size, options) as file:
        digests = file.write(pieces, keep_head=ALIGNMENT)
        file.sync()
        file.write_head(pieces, keep_head=ALIGNMENT)
        file.sync()
        commit()
    return size, len(digests.hashes), file.written

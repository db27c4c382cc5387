"""``.pt`` files: torch writes all but the tensors' bytes, which are put in from where they lie.

``torch.serialization.skip_data`` makes ``torch.save`` leave room where the bytes of a storage go, and
a storage alignment of 4096 has the room begin at a page. What torch writes are a few hundred bytes for
each storage and the padding before it; nothing of the size of the state is held.

The checksums in the zip directory are those of no bytes: ``torch.load`` does not look at them, and
``zipfile.testzip`` complains.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from types import ModuleType
from typing import IO, Any, cast

import torch
from torch.utils.serialization import config

from core.checkpoints.save import root_cause
from core.errors import CheckpointError
from core_fastpersist.direct.pieces import HostBytes, Piece
from core_fastpersist.files.header import ALIGNMENT
from core_fastpersist.files.sources import storage_bytes

_lock = Lock()


def skeleton(obj: Any) -> tuple[list[Piece], int]:
    """Lay out a ``.pt`` file.

    Args:
        obj: anything that ``torch.save`` takes.

    Returns:
        the pieces of the file, with the storages among them, and its size in bytes.

    Raises:
        CheckpointError: when ``torch.save`` refuses the object.
    """
    image = _Image()
    module, storages = _recording_pickle()
    try:
        with _aligned(), torch.serialization.skip_data():
            torch.save(obj, cast(IO[bytes], image), pickle_module=module)
    except Exception as error:
        raise CheckpointError("cannot save this as .pt", why=root_cause(error)) from error
    full = [storage for storage in storages.values() if storage.nbytes()]
    if [storage.nbytes() for storage in full] != [size for _, size in image.holes]:
        raise CheckpointError(
            "cannot save this as .pt",
            why=f"torch {torch.__version__} left room for other storages than it named",
            fix="save as safetensors",
        )
    data = [Piece(at, storage_bytes(s)) for (at, _), s in zip(image.holes, full, strict=True)]
    return sorted([*image.pieces, *data], key=lambda piece: piece.offset), image.position


@contextmanager
def _aligned() -> Generator[None]:
    """Have torch begin storages at pages: a setting of the process, as torch offers no other way."""
    with _lock:
        before = config.save.storage_alignment
        config.save.storage_alignment = ALIGNMENT
        try:
            yield
        finally:
            config.save.storage_alignment = before


class _Image:
    """A file that is written once from front to back, with holes."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.holes: list[tuple[int, int]] = []
        self.position = 0

    def write(self, data: bytes | memoryview) -> int:
        # torch hands out views of a buffer that it uses again.
        self.pieces.append(Piece(self.position, HostBytes(bytes(data))))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or offset < 0:
            raise ValueError("this file is written from front to back")
        self.holes.append((self.position, offset))
        self.position += offset
        return self.position

    def flush(self) -> None:
        pass


def _recording_pickle() -> tuple[ModuleType, dict[str, torch.UntypedStorage]]:
    """A pickle module for ``torch.save``, and the storages that it meets, in their order.

    ``torch.save`` derives a pickler that names storages by ``persistent_id``; the numbers that it
    gives are those of the holes.
    """
    storages: dict[str, torch.UntypedStorage] = {}

    class Pickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:
            name = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                found = name(self, obj)
                if found is not None:
                    storages.setdefault(found[2], getattr(obj, "_untyped_storage", obj))
                return found

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

    module = ModuleType("core_fastpersist.pickle")
    vars(module)["Pickler"] = Pickler
    return module, storages

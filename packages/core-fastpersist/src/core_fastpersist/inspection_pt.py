"""The records of a ``.pt`` file, which is a zip archive; its pickle is not opened."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

from core.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<26xHH")


def is_pt(path: Path) -> bool:
    """Whether a file is a zip archive, as ``torch.save`` makes them."""
    return zipfile.is_zipfile(path)


def describe(path: Path) -> dict[str, Any]:
    """Header facts, and the storages with their places.

    Raises:
        CheckpointError: when the archive is damaged, or not one of torch.
    """
    from core_fastpersist.inspection import alignment

    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            rows = []
            for info in archive.infolist():
                file.seek(info.header_offset)
                name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                offset = info.header_offset + _LOCAL_HEADER.size + name + extra
                rows.append(
                    {
                        "record": info.filename.partition("/")[2],
                        "bytes": info.file_size,
                        "offset": offset,
                        "alignment": alignment(offset),
                    }
                )
    except (zipfile.BadZipFile, struct.error, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged", why=str(error)) from None
    storages = [row for row in rows if row["record"].startswith("data/")]
    if not any(row["record"] == "data.pkl" for row in rows):
        raise CheckpointError(f"{path} is a zip archive of something else", why="no data.pkl")
    return {
        "file": str(path),
        "header": {
            "kind": "torch.save",
            "bytes": path.stat().st_size,
            "storages": len(storages),
            "bytes of storages": sum(row["bytes"] for row in storages),
        },
        "records": rows,
    }

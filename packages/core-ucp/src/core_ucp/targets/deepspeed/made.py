"""Files and wanted atoms of a target, as they come together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from core_ucp.files.new_archives import Archive
from core_ucp.targets.target import Digests, NewFile, Target, Wanted
from core_ucp.view.boxes import Boxes, Table
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

_SEALERS = 2


class Made:
    """What is collected while a target is built."""

    def __init__(self) -> None:
        self.files: list[NewFile] = []
        self.archives: list[Archive] = []
        self.wanted: list[Wanted] = []
        self.remarks: list[str] = []

    def add(self, archive: Archive) -> int:
        """Add a file; return its index."""
        self.archives.append(archive)
        self.files.append(archive.file)
        return len(self.files) - 1

    def want(self, key: str, shape: Sequence[int], dtype: torch.dtype, pieces: Pieces) -> None:
        """Have an atom written to some places."""
        if len(pieces):
            self.wanted.append(Wanted(key, Atom(tuple(shape), dtype, pieces)))

    def want_dense(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, file: int, offset: int
    ) -> None:
        """Have a whole atom written in row-major order."""
        self.want(key, shape, dtype, Pieces.dense(shape, file, offset, dtype.itemsize))

    def want_copies(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, files: Table, offsets: Table
    ) -> None:
        """Have an atom of one element written to several files."""
        grid = (len(files), len(shape))
        boxes = Boxes(np.zeros(grid, np.int64), np.ones(grid, np.int64))
        stride = np.full(grid, dtype.itemsize, np.int64)
        self.want(key, shape, dtype, Pieces(boxes, files, offsets, stride))

    def target(self) -> Target:
        """All of it."""
        archives = list(self.archives)

        def seal(folder: Path, digests: Digests) -> None:
            with ThreadPoolExecutor(_SEALERS) as pool:
                list(pool.map(lambda archive: archive.seal(folder / archive.file.name), archives))

        return Target(tuple(self.files), tuple(self.wanted), seal, tuple(self.remarks))

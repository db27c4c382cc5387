"""A Hugging Face folder that is written: safetensors files of a bounded size, and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from core.disk import disk_errors
from core.errors import CheckpointError
from core_fp6.streaming.source import INDEX, SINGLE

if TYPE_CHECKING:
    from torch import Tensor

SHARD_SIZE = 2 * 2**30
"""Bytes of a file unless asked otherwise."""


class Shards:
    """Collects tensors and writes a file whenever enough have come together.

    Args:
        folder: an empty folder.
        limit: bytes of the tensors of one file, and so of what is kept in memory. A single tensor
            may have more, and gets a file of its own.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._waiting: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor.

        Raises:
            CheckpointError: when the disk refuses.
        """
        waiting = sum(each.nbytes for each in self._waiting.values())
        if self._waiting and waiting + tensor.nbytes > self._limit:
            self._write()
        self._waiting[name] = tensor.contiguous()
        self.nbytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, name the files by their number, and write the index.

        Raises:
            CheckpointError: when the disk refuses.
        """
        self._write()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        with disk_errors(f"cannot write {self._folder}"):
            for number, names in enumerate(self._files, 1):
                file = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
                self._part(number).rename(self._folder / file)
                weight_map |= dict.fromkeys(names, file)
            if count > 1:
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
                text = json.dumps(index, indent=2, sort_keys=True)
                (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _write(self) -> None:
        path = self._part(len(self._files) + 1)
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot write {path}", why=str(error), fix="free space or choose another disk"
            ) from error
        self._files.append([*self._waiting])
        self._waiting = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05}"

"""What others do: each writes a state to a new path and returns when it is durable."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from core.disk import sync
from core_fastpersist.bench.state import State

Save = Callable[[Path], object]
Load = Callable[[Path], State]

TORCH_SAVE = "torch.save + fsync"
TORCH_LOAD = "torch.load"


def saves(state: State) -> dict[str, Save]:
    """The ways to save ``state`` that need nothing of this package.

    What they leave out is left out: none syncs the folder, and only DCP syncs files unasked.
    """

    def torch_save(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def safetensors(path: Path) -> None:
        save_file(state, path)
        sync(path)

    def dcp_save(path: Path) -> None:
        with alone():
            save(dict(state), storage_writer=_writer(path), no_dist=True)

    def dcp_async(path: Path) -> None:
        with alone():
            writing = async_save(dict(state), storage_writer=_writer(path), no_dist=True)
        cast(Future[Any], writing).result()

    return {
        TORCH_SAVE: torch_save,
        "safetensors.save_file + fsync": safetensors,
        "dcp.save": dcp_save,
        "dcp.async_save, until durable": dcp_async,
    }


def loads() -> dict[str, tuple[str, Load]]:
    """Ways to load into new memory, each with the way to save that it reads."""
    return {
        TORCH_LOAD: (TORCH_SAVE, _torch_load),
        "safetensors.load_file": ("safetensors.save_file + fsync", load_file),
    }


def _torch_load(path: Path) -> State:
    found: State = torch.load(path, weights_only=True)
    return found


def _writer(path: Path) -> FileSystemWriter:
    return FileSystemWriter(path, sync_files=True)


def alone() -> warnings.catch_warnings[None]:
    """Without DCP's remark that there is one process only."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)

"""Step folders of a run: names, manifests, which is the newest valid one, who owns the folder.

A checkpoint is a folder ``step-00000120`` with the files of its format and a ``manifest.json`` that
lists them with their sizes. It is written under a temporary name and renamed when it is complete,
so a folder with a step's name and no valid manifest is not a checkpoint.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from pydantic import TypeAdapter

from core.disk import TEMPORARY, disk_errors, plain_name, sync_file
from core.errors import CheckpointError

logger = logging.getLogger("core")
MANIFEST = "manifest.json"
VERSION = 1
_CHECK = "blake2b"
_COMPARED = {"api": "hooks", "plugins": "plugins", "plan": "planned transforms"}
_STEP = re.compile(r"step-(\d{8,})")
_LARGEST_MANIFEST = 256 * 2**20


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder says of itself.

    Args:
        step: optimizer steps done when it was saved.
        format: name of the checkpoint format of the other files.
        world_size: number of ranks that saved it.
        values: non-tensor state by key.
        run: plugins, plan and settings of the run that saved it.
        files: size in bytes of every other file.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    step: Annotated[int, Ge(0)]
    format: str
    world_size: Annotated[int, Ge(0)]
    values: dict[str, Any]
    run: dict[str, Any]
    files: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write and sync it in ``folder``."""
        text = json.dumps({"version": VERSION, **vars(self)})
        text = f'{text[:-1]}, "{_CHECK}": "{_digest(text)}"}}'
        with disk_errors(f"cannot write {folder / MANIFEST}"):
            sync_file(folder / MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it and check that every file it lists is there in its full size.

        Raises:
            CheckpointError: naming the file that is missing, truncated or not understood.
        """
        path = folder / MANIFEST
        found = _status(f"{folder}/{MANIFEST}")
        if found is None:
            raise CheckpointError(f"{folder} is no checkpoint", why=f"it has no {MANIFEST}")
        if found.st_size > _LARGEST_MANIFEST:
            raise CheckpointError(f"{path} is no manifest", why="it is too large")
        manifest = _parsed(path, found.st_ino, found.st_size, found.st_mtime_ns)
        _require_files(folder, manifest.files)
        return manifest

    def differences(self, now: Mapping[str, Any]) -> list[str]:
        """What the run that saved has not in common with the run described by ``now``."""
        return [
            f"the {what} of the checkpoint differ: {_difference(self.run, now, key)}"
            for key, what in _COMPARED.items()
            if self.run and self.run.get(key) != now.get(key)
        ]


@lru_cache(maxsize=64)
def _parsed(path: Path, *stamp: int) -> Manifest:
    """A manifest as it was when it had a stamp: pruning reads the same ones after every save."""
    with disk_errors(f"cannot read {path}"):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        check = content.pop(_CHECK, None)
        if check is not None and check != _digest(json.dumps(content)):
            raise ValueError("it is not as it was written")
        version = content.pop("version")
        if version != VERSION:
            raise CheckpointError(f"{path} has version {version}", why=f"known: {VERSION}")
        manifest = _checker().validate_json(json.dumps(content))
        for name in manifest.files:
            _inside(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged", why=reason) from None
    return manifest


def _require_files(folder: Path, files: Mapping[str, int]) -> None:
    for name, size in files.items():
        found = _status(f"{folder}/{name}")
        if found is None or found.st_size != size:
            state = "missing" if found is None else f"{found.st_size:,} bytes long, not {size:,}"
            raise CheckpointError(f"{folder / name} is {state}", fix="use an older checkpoint")


def _status(path: str) -> os.stat_result | None:
    """The status of a file, or ``None`` where there is none."""
    try:
        # Not by a Path: this is asked of every file after every save.
        found = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", why=error.strerror or str(error)) from None
    return found if stat.S_ISREG(found.st_mode) else None


def _digest(text: str) -> str:
    """What a flipped bit changes; no protection against an attacker."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def _checker() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _difference(saved: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    before, after = (json.dumps(side.get(key), indent=1).splitlines() for side in (saved, now))
    changed = [line for line in difflib.ndiff(before, after) if line[:1] in "+-"]
    return " ".join(line.replace("  ", "") for line in changed)


def _inside(name: str) -> str:
    """Return a relative path if it stays inside its folder."""
    for part in PurePosixPath(name).parts:
        plain_name(part)
    return name


def step_folder(directory: Path, step: int) -> Path:
    """Final path of the checkpoint of ``step``."""
    return directory / f"step-{step:08d}"


def steps(directory: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints by step, newest first, without looking inside."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        found = [(m, e.name) for e in entries if (m := _STEP.fullmatch(e.name)) and e.is_dir()]
    return sorted(((int(m[1]), directory / name) for m, name in found), reverse=True)


def newest_valid(directory: Path) -> tuple[Path, Manifest, list[str]]:
    """Find the newest checkpoint that is whole.

    Returns:
        its folder, its manifest, and a sentence for every newer one that had to be skipped.

    Raises:
        CheckpointError: when there is none.
    """
    skipped: list[str] = []
    for _, path in steps(directory):
        try:
            return path, Manifest.read(path), skipped
        except CheckpointError as error:
            skipped.append(f"{error.what}: {error.why}" if error.why else error.what)
    why = "; ".join(skipped) or "there is none yet"
    raise CheckpointError(f"no valid checkpoint in {directory}", why=why)


def file_sizes(folder: Path) -> dict[str, int]:
    """Sizes of all files of a folder but the manifest, by relative path."""
    sizes: dict[str, int] = {}
    for inside, _, names in os.walk(folder, onerror=_raise):
        below = inside[len(str(folder)) + 1 :]
        for name in names:
            found = _status(f"{inside}/{name}")
            if found is not None:
                sizes[f"{below}/{name}" if below else name] = found.st_size
    sizes.pop(MANIFEST, None)
    return dict(sorted(sizes.items()))


def _raise(error: OSError) -> None:
    raise error


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` valid checkpoints; 0 keeps everything.

    Damaged ones do not count, and stay for their owner to look at. What cannot be removed stays,
    with a warning: the checkpoint just saved is none the worse.
    """
    valid = [path for _, path in steps(directory) if _is_valid(path)] if keep else []
    for path in valid[keep:]:
        doomed = path.with_name(f"{path.name}{TEMPORARY}removed")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error.strerror)


def _is_valid(folder: Path) -> bool:
    try:
        Manifest.read(folder)
    except CheckpointError:
        return False
    return True


def set_aside(directory: Path, after: int) -> list[Path]:
    """Rename the checkpoints of later steps: a run that went back to ``after`` writes its own.

    Returns:
        where they are now.
    """
    moved = []
    for step, path in steps(directory):
        if step > after:
            target = path.with_name(f"{path.name}.abandoned-{uuid.uuid4().hex[:8]}")
            path.rename(target)
            moved.append(target)
    return moved


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted save left behind; only the owner of the lock may call it."""
    for path in _leftovers(directory):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(directory: Path) -> Iterator[Path]:
    return (path for path in directory.iterdir() if TEMPORARY in path.name and path.is_dir())


class Lock:
    """Exclusive ownership of a checkpoint directory by one job, released when its process ends.

    Raises:
        CheckpointError: when another job saves into ``directory``.
    """

    def __init__(self, directory: Path) -> None:
        with disk_errors(f"cannot create {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise CheckpointError(
                f"another job saves into {directory}", fix="choose another folder for this run"
            ) from None

    def release(self) -> None:
        """Give it up."""
        os.close(self._descriptor)

"""How many bytes chunks may take outside of the device, and whether a sequence fits into them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from core.errors import CoreError
from core_fpdt.store.file import free_space, usable_folder

SHARE = 0.8
"""Of what is available: the rest is for everything else that runs."""

_CGROUPS = Path("/sys/fs/cgroup")
_GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """What the chunks of this process may take.

    Args:
        available: bytes.
        where: what they are of.
        fix: how there could be more of it.
    """

    available: int
    where: str
    fix: str

    def require(self, bytes_for: Callable[[int], int], tokens: int) -> None:
        """Refuse a sequence whose chunks do not fit, before the first step.

        Args:
            bytes_for: bytes that this rank needs for a sequence of so many tokens; grows with them.
            tokens: in the whole sequence.

        Raises:
            CoreError: with what is needed, what there is, and the longest sequence that fits.

        Example:
            >>> Budget(2**20, "host memory", "").require(lambda tokens: 1024 * tokens, 100)
        """
        needed = bytes_for(tokens)
        if needed <= self.available:
            return
        longest = longest_that_fits(bytes_for, tokens, self.available)
        raise CoreError(
            f"a sequence of {tokens:,} tokens needs {_gib(needed)} of {self.where} on each rank",
            why=f"there are {_gib(self.available)}; the longest one that fits has {longest:,} tokens",
            fix="take a shorter sequence or more ranks, lower fpdt.keep_output, switch "
            f"fpdt.keep_keys off, or {self.fix}",
        )


def host_budget(gib: float = 0.0, ranks: int | None = None) -> Budget:
    """Host memory for the chunks of this process.

    Args:
        gib: ``fpdt.host_memory``; 0 takes 80 % of what is available, shared by the ranks here.
        ranks: processes on this machine; from the environment if not given.
    """
    available = int(gib * _GIB)
    if not gib:
        free = min(psutil.virtual_memory().available, cgroup_room())
        available = int(SHARE * free) // (ranks or ranks_here())
    return Budget(available, "host memory", "raise fpdt.host_memory")


def disk_budget(folder: str = "", ranks: int | None = None) -> Budget:
    """What is free on a disk, shared by the ranks here.

    Args:
        folder: as for :class:`core_fpdt.store.file.FileStore`.
        ranks: as for :func:`host_budget`.
    """
    path = usable_folder(folder)
    fix = "name a folder on a larger disk as fpdt.folder"
    return Budget(free_space(path) // (ranks or ranks_here()), f"the disk of {path}", fix)


def longest_that_fits(bytes_for: Callable[[int], int], limit: int, available: int) -> int:
    """Most tokens, up to ``limit``, whose chunks fit into ``available`` bytes; 0 if none do."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_for(middle) <= available:
            low = middle
        else:
            high = middle - 1
    return low


def ranks_here() -> int:
    """Processes of this job on this machine, as ``torchrun`` tells them."""
    with suppress(ValueError):
        return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return 1


def cgroup_room(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take within its control groups, of version 1 and 2.

    Pages of files that can be dropped count as free. Without a limit it is a very large number.

    Args:
        root: where control groups are mounted.
        own: tells which ones this process is in.
    """
    rooms = [2**63]
    for folder in _groups(root, own):
        for limit, usage, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            # "max" is no number: no limit.
            with suppress(OSError, ValueError):
                most, taken = _number(folder / limit), _number(folder / usage)
                rooms.append(max(most - taken + _stat(folder / "memory.stat", idle), 0))
    return min(rooms)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Folders of the groups of this process, and of those around them."""
    yield root
    yield root / "memory"
    with suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            mount = root / controllers
            parts = [part for part in path.split("/") if part]
            for count in range(1, len(parts) + 1):
                yield mount.joinpath(*parts[:count])


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _stat(path: Path, name: str) -> int:
    with suppress(OSError):
        for line in path.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.4g} GiB"

"""What this machine has to give."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def available_memory(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that are free or can be freed, within the limit of a container.

    Args:
        proc: where the kernel tells of memory.
        group: folder of the control group.
    """
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        found = min(found, max(0, limit - used))
    return found

"""Settings of the section ``[fastpersist]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from core.contributions import Settings


@dataclass(frozen=True, kw_only=True)
class FastPersistSettings(Settings):
    """How checkpoints are staged and written."""

    mode: Literal["auto", "copy", "live"] = "auto"
    """``copy`` copies the state at the call, and nothing waits; ``live`` writes tensors from where
    they lie, and the next optimizer step waits; ``auto`` copies where ``memory`` allows."""

    writer: Literal["auto", "thread", "process"] = "auto"
    """Who writes copies: a process of its own, which is ``auto``, or threads of the trainer. Live
    tensors are always written by threads."""

    writers: Literal["none", "replica", "socket", "machine"] = "replica"
    """Which ranks share the writing of what all of them hold: the first, all, one of each processor
    socket, or one of each machine."""

    memory: Annotated[float, Ge(0)] = 0.0
    """GiB that copies may take on each rank; 0 for half of the available memory."""

    audits: Annotated[int, Ge(0)] = 2
    """Checkpoints in which a tensor must have kept still between submit and optimizer step before
    mode ``live`` writes it without a copy."""

    chunk: Annotated[int, Ge(1), Le(256)] = 16
    """MiB of one write and of one digest; rounded up to a power of two."""

    threads: Annotated[int, Ge(1), Le(4)] = 4
    """Threads that write at once."""

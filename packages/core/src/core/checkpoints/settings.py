"""Settings of the section ``[checkpoint]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from core.contributions import Settings


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Where and how a run saves its checkpoints."""

    format: str = "auto"
    """Name of a checkpoint format, or ``auto`` for the best one that works on this disk."""

    storage: str = "auto"
    """Name of the storage that carries the bytes of readers, of converters and of the formats that
    ask for one, or ``auto`` for the best that works on the disk in question."""

    directory: str = ""
    """Folder of the checkpoints; empty for ``checkpoints`` in the run's folder."""

    keep: Annotated[int, Ge(0)] = 3
    """How many of the newest checkpoints to keep; 0 keeps all."""

    rules: str = ""
    """How the parameters of foreign checkpoints are laid out, where the files do not say it: a TOML
    file, or the name of rules that a plugin brings."""
